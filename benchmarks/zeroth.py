"""Fine-tuning a small GPT-2 with zeroth order: held-out loss before and after, and the bytes between the ranks.

    python -m benchmarks.zeroth --json zeroth.json

AdamW makes the base model of the demo's text, English help topics in characters. It is fine-tuned on Python code,
characters too, with MeZO's step: all parameters on one rank, on ranks that share the batch (DDP-ZO), on ranks that make
one pass each (PertP), with blocks in CPU memory, and LoRA's parameters alone. Ranks are real processes on gloo; a step
sees the same characters in every case. ``adamw`` is fine-tuning with gradients, for half as many steps.
"""

import argparse
import copy
import inspect
import statistics
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.multiprocessing import get_context

import thinwire
from thinwire._version import __version__
from thinwire.cli import text as demo_text
from thinwire.cli.demo_models import Transformer, loss_of, transformer
from thinwire.report.results import Row, meta, write

RATES = {"full": 1e-4, "lora": 1e-3}
CASES = ("adamw", "full", "offloaded", "ddp_2", "pertp_2", "lora")


class Lora(nn.Module):
    """A linear layer, and a product of two narrow matrices that is trained in its place."""

    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Parameter(torch.randn(rank, base.in_features) / base.in_features**0.5)
        self.up = nn.Parameter(torch.zeros(base.out_features, rank))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + x @ self.down.T @ self.up.T


def with_lora(model: Transformer, rank: int = 4) -> Transformer:
    """Return the model with frozen weights, and adapters at its attention and its perceptrons."""
    torch.manual_seed(0)
    model.requires_grad_(False)
    for block in model.blocks:
        for name in ("qkv", "attended", "up", "down"):
            setattr(block, name, Lora(getattr(block, name), rank))
    return model


def code(vocabulary: str) -> demo_text.Text:
    """Python code in the characters of the vocabulary."""
    source = "".join(inspect.getsource(module) for module in (argparse, inspect, statistics))
    known = {character: i for i, character in enumerate(vocabulary)}
    data = torch.tensor([known[character] for character in source if character in known])
    return demo_text.Text(data[: -len(data) // 10], data[-len(data) // 10 :], vocabulary)


def base_model(args: argparse.Namespace) -> Transformer:
    """Train the model that is fine-tuned later."""
    text = demo_text.load()
    torch.manual_seed(args.seed)
    model = transformer(len(text.vocabulary), width=args.width, layers=args.layers, length=args.length)
    _adamw(model, text, args.base_steps, args, 3e-3)
    return model


def _adamw(model: nn.Module, text: demo_text.Text, steps: int, args: argparse.Namespace, lr: float) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    for step in range(steps):
        optimizer.zero_grad()
        loss_of(model, text.batch(step, 0, args.batch, args.length, args.seed)).backward()
        optimizer.step()


def tune(case: str, model: Transformer, args: argparse.Namespace) -> dict[str, float]:
    """Fine-tune on this rank, and return the figures."""
    text = code(demo_text.load().vocabulary)
    held_out = text.held_out_batch(2048 // args.length, args.length)

    def held_out_loss() -> float:
        with torch.no_grad():
            return loss_of(model, held_out).item()

    found = {"loss_before": held_out_loss()}
    started = time.perf_counter()
    if case == "adamw":
        _adamw(model, text, args.steps // 2, args, 1e-3)
        return found | {"loss_after": held_out_loss(), "seconds": time.perf_counter() - started}
    options: dict[str, object] = {"lr": RATES["lora" if case == "lora" else "full"]}
    shard, shards = 0, 1
    if case == "offloaded":
        options |= {"blocks": model.blocks, "device": "cpu"}
    elif case == "ddp_2":
        options["process_group"], shard, shards = dist.group.WORLD, dist.get_rank(), 2
    elif case == "pertp_2":
        options["mesh"] = init_device_mesh("cpu", (2,), mesh_dim_names=("pert",))
    elif case == "lora":
        model = with_lora(model)
    base = copy.deepcopy(model)
    zo = thinwire.ZerothOrder(model, **options)
    size = args.batch // shards
    for step in range(args.steps):
        windows = text.batch(step, 0, args.batch, args.length, args.seed)[shard * size : (shard + 1) * size]
        zo.step(lambda windows=windows: loss_of(model, windows))
    zo.flush()
    found |= {"seconds": time.perf_counter() - started, "loss_after": held_out_loss()}
    with tempfile.TemporaryDirectory() as folder:
        zo.save_replay(Path(folder) / "tuned.zo")
        found["replay_bytes"] = (Path(folder) / "tuned.zo").stat().st_size
        thinwire.zeroth.replay(base, Path(folder) / "tuned.zo")
    same = [torch.equal(p, q) for p, q in zip(base.parameters(), model.parameters(), strict=True)]
    found |= {"replay_is_equal": float(all(same)), "wire_bytes": max(row.wire_bytes for row in zo.ledger.rows)}
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return found | {"trained": trained, "model_bytes": 4.0 * trained, "skipped": zo.ledger.skipped}


def _rank(rank: int, case: str, model: Transformer, args: argparse.Namespace, rendezvous: str, pipe) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=2)
    found = tune(case, copy.deepcopy(model), args)  # torch gives all processes the same memory
    if rank == 0:
        pipe.send(found)
    dist.destroy_process_group()


def run(case: str, model: Transformer, args: argparse.Namespace) -> dict[str, float]:
    """Fine-tune a copy of the model, on one rank or two."""
    model = copy.deepcopy(model)
    if not case.endswith("_2"):
        return tune(case, model, args)
    context = get_context("spawn")
    ours, theirs = context.Pipe()
    with tempfile.TemporaryDirectory() as folder:
        common = (case, model, args, f"file://{folder}/rendezvous", theirs)
        ranks = [context.Process(target=_rank, args=(rank, *common)) for rank in range(2)]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join()
        if any(process.exitcode for process in ranks):
            raise SystemExit(f"{case}: a rank ended with {[process.exitcode for process in ranks]}")
        return ours.recv()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=CASES)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--base-steps", type=int, default=1500)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    model = base_model(args)
    rows: list[Row] = []
    print("| case | trained | held-out loss before | after | bytes a step | replay file, bytes | rebuilt | ms a step |")
    print("|---|---:|---:|---:|---:|---:|---|---:|")
    for case in args.cases:
        found = run(case, model, args)
        rows += [Row(case, metric, value) for metric, value in found.items()]
        steps = args.steps // 2 if case == "adamw" else args.steps
        text = [case, *(f"{found.get(key, 0):,.0f}" for key in ("trained",))]
        text += [f"{found[key]:.3f}" for key in ("loss_before", "loss_after")]
        text += [f"{found.get(key, 0):,.0f}" for key in ("wire_bytes", "replay_bytes")]
        text += ["bit for bit" if found.get("replay_is_equal") else "-", f"{found['seconds'] / steps * 1e3:.1f}"]
        print(f"| {' | '.join(text)} |", flush=True)
        if args.json:  # after each, so that a run that is ended leaves what it has
            write(args.json, meta(__version__, **vars(args)), rows)


if __name__ == "__main__":
    main()
