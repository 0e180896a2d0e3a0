"""torchrun: the snippet of docs/engines.md. tests/engines/test_faults.py has real restarts, of examples/elastic.py."""

import os

import torch

from tests.integrations.common import batch, check, facts, memory, small_model, snippet


def _begin(code, rank, seed, latest):
    remembered = {}

    def train(ddp, optimizer, step):
        remembered.setdefault(step, memory(names["wire"]))
        ddp(batch(rank, step)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    names = {"model": small_model(seed), "torch": torch, "latest": latest, "train": train}
    exec(code, names)
    names["wire"].detach()
    return names, remembered[20]


def _run(rank, code, folder):
    before = os.getcwd()
    os.chdir(folder)
    first, saved = _begin(code, rank, 0, None)
    second, loaded = _begin(code, rank, 1, "run/step-20")
    os.chdir(before)
    return facts(first["wire"].ledger, saved, loaded, first["model"], second["model"])


def test_snippet(world2, tmp_path):
    check(world2.run(_run, snippet("torchrun"), str(tmp_path), timeout=120.0))
