"""Hugging Face Trainer: the snippet of docs/engines.md, resuming, what is warned of and refused, and the example."""

import os
import warnings

import pytest
import torch
from torch import nn

import thinwire
from tests.integrations.common import (
    batch,
    check,
    check_example,
    environment,
    example,
    facts,
    loads,
    needs,
    small_model,
    snippet,
    written,
)

pytestmark = needs("transformers", "accelerate")
RESUMED = "train(resume_from_checkpoint='run/checkpoint-20')"


class Model(nn.Module):
    def __init__(self, seed):
        super().__init__()
        self.inner = small_model(seed)

    def forward(self, x):
        return {"loss": self.inner(x).square().mean()}


def _begin(code, seed):
    data = [{"x": batch(0, step)[0]} for step in range(500)]
    names = {"model": Model(seed), "torch": torch, "data": data}
    exec(code, names)
    return names


def _run(rank, code, folder, port):
    environment(rank, port)
    os.chdir(folder)
    first = _begin(code, 0)
    ledger = first["wired"].wire.ledger
    saved = written(f"run/checkpoint-20/thinwire-rank{rank}-of-2.pt")
    with loads() as found:
        second = _begin(code.replace("train()", RESUMED), 1)
    return facts(ledger, saved, *found, first["model"], second["model"])


def _misused(rank, code):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        quick = code.replace("max_steps=25", "max_steps=1").replace("save_steps=20", "save_strategy='no'")
        _begin(quick.replace(", max_grad_norm=0, ddp_find_unused_parameters=False", ""), 0)
    said = " ".join(str(warning.message) for warning in caught)
    elsewhere = code.replace('"run"', '"elsewhere"').replace("train()", RESUMED)
    with pytest.raises(thinwire.ThinwireError, match=r"resumes at step 20, and not from elsewhere"):
        _begin(elsewhere, 0)
    return "ddp_find_unused_parameters=False" in said, "set max_grad_norm=0" in said


def _example(rank, *arguments):
    return example("train_hf_trainer", *arguments)


def test_snippet_checkpoint_and_example(world, tmp_path):
    code = snippet("Hugging Face Trainer")
    check(world.run(_run, code, str(tmp_path), world.port, timeout=120.0))
    assert world.run(_misused, code) == [(True, True), (False, False)]
    arguments = ("--steps", "20", "--width", "32", "--layers", "1", "--folder", str(tmp_path / "example"))
    check_example("train_hf_trainer", world.run(_example, *arguments))
