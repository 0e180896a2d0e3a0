"""Events that happen once in a run, between two processes."""

import io
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import checkpoint as dcp

from benchmarks.same_bits.methods import METHODS, OPTIMIZERS, Chosen
from benchmarks.same_bits.public import public as tw
from benchmarks.same_bits.training import STEPS, Found, Network, Ranks, Run, simulated, start

Event = Callable[[Ranks], Found]
ENGINES = (("ddp", "cpu"), ("bare", "reference"))
"""The other way round than in the grid."""
RESUMED = (
    "dgc-all_gather", "dgc-state", "dgc-warmup", "topk-all_gather", "topk-two_phase", "powersgd", "scalecom",
    "ef21_sgdm-all_gather", "ef21_bc-all_gather", "econtrol-all_gather", "demo", "signsgd-two_phase", "qsgd-two_phase",
    "onebit_adam-two_phase", "zeroone_adam-two_phase", "onebit_lamb-two_phase",
)  # fmt: skip
CHANGES = (
    ("dgc-all_gather", "topk-all_gather"), ("topk-all_gather", "dgc-all_gather"), ("dgc-all_gather", "dense"),
    ("ef21_sgdm-all_gather", "topk-all_gather"), ("topk-all_gather", "ef21-all_gather"),
    ("powersgd", "dgc-all_gather"), ("qsgd-two_phase", "powersgd"), ("dense", "lean-all_gather"),
    ("econtrol-all_gather", "ef14-two_phase"),
)  # fmt: skip


def through_file(state: Any) -> Any:
    """The tensors that are read of a state that was written."""
    torch.save(state, buffer := io.BytesIO())
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def _resumed(method: str, engine: str, kernels: str, ranks: Ranks) -> Found:
    run = start(ranks, engine, method, kernels=kernels)
    run.train(0, 1, 2)
    state = through_file(run.saved())
    run.wire.detach()
    again = start(ranks, engine, method, kernels=kernels)
    again.load_trained(state)
    again.wire.load_state_dict(state["wire"])
    again.train(3, 4, 5)
    return again.found()


def _resumed_from_folder(engine: str, kernels: str, ranks: Ranks) -> Found:
    run = start(ranks, engine, "dgc-all_gather", kernels=kernels)
    run.train(0, 1, 2)
    with tempfile.TemporaryDirectory() as folder:
        place = [folder]
        dist.broadcast_object_list(place, src=0, group=ranks.pair)
        where = Path(place[0]) / "saved"
        dcp.save({"wire": run.wire}, checkpoint_id=where, process_group=ranks.pair)
        run.train(3)
        run.wire.load(where)
        dist.barrier(group=ranks.pair)
    run.train(3, 4)
    return run.found()


def _changed(first: str, second: str, engine: str, kernels: str, ranks: Ranks) -> Found:
    run = start(ranks, engine, first, kernels=kernels)
    run.train(0, 1, 2)
    run.wire.set_method(METHODS[second].make())
    run.train(3, 4, 5)
    return run.found()


def _reattached(engine: str, kernels: str, ranks: Ranks) -> Found:
    run = start(ranks, engine, "dgc-all_gather", kernels=kernels)
    run.train(0, 1, 2)
    run.wire.detach()
    run.attach(METHODS["topk-int4-all_gather"].make())
    run.train(3, 4, 5)
    return run.found()


def _overflow(method: str, scaled: bool, engine: str, kernels: str, ranks: Ranks) -> Found:
    options = {"scaler": torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)} if scaled else {}
    run = start(ranks, engine, method, kernels=kernels, **options)
    run.train(*range(STEPS), broken=2)
    return run.found()


def _accumulated(method: str, engine: str, kernels: str, ranks: Ranks) -> Found:
    run = start(ranks, engine, method, kernels=kernels)
    run.train(*range(4), parts=2)
    return run.found()


def _side(method: str, engine: str, kernels: str, ranks: Ranks) -> Found:
    """A layer that now one rank uses, now none."""
    wrap = {"find_unused_parameters": True} if engine == "ddp" else None
    run = start(ranks, engine, method, Network(side=True), kernels=kernels, wrap=wrap)
    run.train(*range(STEPS))
    return run.found()


def _shaped(method: str, engine: str, kernels: str, ranks: Ranks, **network: Any) -> Found:
    run = start(ranks, engine, method, Network(**network), kernels=kernels)
    run.train(*range(3))
    return run.found()


def _with(method: str, engine: str, kernels: str, ranks: Ranks, **options: Any) -> Found:
    run = start(ranks, engine, method, kernels=kernels, **options)
    run.train(*range(STEPS))
    return run.found()


def _several(engine: str, kernels: str, ranks: Ranks) -> Found:
    inner = Network()
    both = [OPTIMIZERS["momentum"]([inner.first.weight, inner.first.bias])]
    both += [OPTIMIZERS["nesterov"]([*inner.norm.parameters(), *inner.last.parameters()])]
    run = start(ranks, engine, "dgc-all_gather", inner, kernels=kernels, optimizers=both)
    run.train(*range(STEPS))
    return run.found()


def _planned(method: str, engine: str, kernels: str, ranks: Ranks) -> Found:
    run: Run = start(ranks, engine, method, kernels=kernels, policy=tw.LGreCo(every=4, looks=2))
    run.train(*range(8))
    return run.found()


def _planned_alone(method: str, ranks: Ranks) -> Found:
    """Both ranks simulate the same."""
    return simulated(method, 2, "reference", steps=8, policy=tw.LGreCo(every=4, looks=2))


def _refused(ranks: Ranks) -> Found:
    """A method that the optimizer does not fit."""
    return start(ranks, "bare", Chosen(lambda: tw.dgc(0.01), "adamw")).found()


def cells() -> dict[str, Event]:
    found: dict[str, Event] = {"refused/dgc/adamw": _refused}
    for method in ("topk-all_gather", "powersgd", "qsgd-two_phase"):
        found[f"policy/{method}/sim"] = partial(_planned_alone, method)
    for i, (engine, kernels) in enumerate(ENGINES):
        each: dict[str, Callable[..., Found]] = {
            "folder/dgc": _resumed_from_folder,
            "reattached/dgc": _reattached,
            "several/dgc": _several,
            **{f"resumed/{method}": partial(_resumed, method) for method in RESUMED[i::2]},
            **{f"changed/{first}/{second}": partial(_changed, first, second) for first, second in CHANGES[i::2]},
        }
        for method in ("dense", "dgc-all_gather", "topk-two_phase", "powersgd", "ef21_sgdm-all_gather"):
            each[f"overflow/{method}"] = partial(_overflow, method, True)
            each[f"nonfinite/{method}"] = partial(_overflow, method, False)
            each[f"side/{method}"] = partial(_side, method)
        for method in ("dgc-all_gather", "topk-two_phase"):
            each[f"accumulated/{method}"] = partial(_accumulated, method)
            each[f"bfloat16/{method}"] = partial(_shaped, method, dtype=torch.bfloat16)
            each[f"auto/{method}"] = partial(_with, method, emulate_link="1gbit,0.1ms")
        for method in ("topk-all_gather", "powersgd", "qsgd-two_phase"):
            each[f"policy/{method}"] = partial(_planned, method)
        for method in ("dense", "dgc-all_gather", "cast-float16"):
            each[f"large/{method}"] = partial(_shaped, method, width=2000)
        found |= {f"{name}/{engine}": partial(run, engine, kernels) for name, run in each.items()}
    for method in ("dgc-all_gather", "dgc-two_phase", "dgc-sgd", "dgc-int4-all_gather"):
        found[f"sparse/{method}/bare"] = partial(_with, method, "bare", "cpu", sparse_gradients=True)
    return found
