"""Accuracy by method: character models, simulated workers, seeds.

    python -m benchmarks.convergence --json convergence.json
    python -m benchmarks.convergence --model transformer --steps 400 --json adamw.json

``lstm`` is the demo's model with momentum SGD: what values in few bits, two phases and short states cost DGC.
``transformer`` is trained by AdamW with a cosine learning rate: the methods that leave the optimizer alone. Every case
starts from the same weights and sees the same batches as the others of its seed. The figure is the held-out loss, in
nats a character; ``low`` and ``high`` are its range over the seeds.
"""

import argparse
import statistics
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import nn
from torch.optim.lr_scheduler import ConstantLR, CosineAnnealingLR

from thinwire import Method, Warmup, cast, dense, dgc, lean, maxmin, powersgd, qsgd, simulate, topk
from thinwire._version import __version__
from thinwire.cli import text as demo_text
from thinwire.cli.demo_models import CharLM, loss_of, transformer
from thinwire.methods import ef21_sgdm
from thinwire.report.results import Row, meta, write

CLIP = 1.0
LSTM = {
    "dgc": {},
    "dgc_int4": {"values": "int4"},
    "dgc_sign": {"values": "sign"},
    "dgc_two_phase": {"route": "two_phase"},
    "dgc_two_phase_2": {"route": "two_phase", "second": 2.0},
    "dgc_int4_two_phase": {"values": "int4", "route": "two_phase"},
    "dgc_int4_two_phase_2": {"values": "int4", "route": "two_phase", "second": 2.0},
    "dgc_two_phase_x4": {"route": "two_phase", "density": 0.004},
    "dgc_two_phase_x8": {"route": "two_phase", "density": 0.008},
    "dgc_int4_two_phase_x4": {"values": "int4", "route": "two_phase", "density": 0.004},
    "dgc_int4_two_phase_2_x4": {"values": "int4", "route": "two_phase", "second": 2.0, "density": 0.004},
    "dgc_int4_two_phase_x8": {"values": "int4", "route": "two_phase", "density": 0.008},
    "dgc_bf16_state": {"state": "bfloat16"},
}
TRANSFORMER: dict[str, Callable[[Warmup], Method]] = {
    "bf16": lambda _: replace(cast("bfloat16"), clip=CLIP),
    "topk_1%": lambda warmup: topk(0.01, warmup=warmup, clip=CLIP),
    "topk_1%_int4": lambda warmup: topk(0.01, values="int4", warmup=warmup, clip=CLIP),
    "topk_0.1%": lambda warmup: topk(0.001, warmup=warmup, clip=CLIP),
    "ef21_sgdm_1%": lambda warmup: ef21_sgdm(0.01, warmup=warmup, clip=CLIP),
    "powersgd_4": lambda warmup: powersgd(4, warmup=warmup, clip=CLIP),
    "powersgd_1": lambda warmup: powersgd(1, warmup=warmup, clip=CLIP),
    "maxmin_4_bits": lambda _: replace(maxmin(4), clip=CLIP),
    "maxmin_4_bits_ef": lambda _: replace(maxmin(4, block=64, feedback=True), clip=CLIP),
    "qsgd_4_bits": lambda _: replace(qsgd(4), clip=CLIP),
    "lean_0.06": lambda warmup: lean(0.06, momentum=False, warmup=warmup, clip=CLIP),
}


def lstm(case: str, vocabulary: int, args: argparse.Namespace) -> tuple[nn.Module, torch.optim.Optimizer, Method]:
    model = CharLM(vocabulary, 64, args.hidden)
    options = {"density": args.density, "clip": CLIP, "warmup": Warmup(max(4, args.steps // 10))}
    method = dense(clip=CLIP) if case == "dense" else dgc(**options | LSTM[case])
    return model, torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.9), method


def gpt(case: str, vocabulary: int, args: argparse.Namespace) -> tuple[nn.Module, torch.optim.Optimizer, Method]:
    model = transformer(vocabulary, width=96, length=32)
    method = dense(clip=CLIP) if case == "dense" else TRANSFORMER[case](Warmup(max(4, args.steps // 10)))
    return model, torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01), method


MODELS = {
    "lstm": (lstm, ("dense", *LSTM), partial(ConstantLR, factor=1.0)),
    "transformer": (gpt, ("dense", *TRANSFORMER), None),
}


def train(case: str, seed: int, args: argparse.Namespace) -> tuple[float, float]:
    """Held-out loss, and bytes a worker sent, after the last step."""
    text = demo_text.load()
    torch.manual_seed(seed)
    build, _, fixed = MODELS[args.model]
    model, optimizer, method = build(case, len(text.vocabulary), args)
    schedule = fixed(optimizer) if fixed else CosineAnnealingLR(optimizer, args.steps)
    result = simulate(
        model,
        method,
        optimizer=optimizer,
        batches=lambda worker, step: text.batch(step, worker, 2, 32, seed),
        loss=loss_of,
        workers=args.workers,
        steps=args.steps,
        seed=seed,
        after_step=lambda step, loss: schedule.step(),
    )
    length = 128 if fixed else 32
    with torch.no_grad():
        return loss_of(model, text.held_out_batch(8192 // length, length)).item(), result.ledger.rows[-1].wire_bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="lstm", choices=list(MODELS))
    parser.add_argument("--cases", nargs="+", help="of the model; all by default")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--density", type=float, default=0.001)
    parser.add_argument("--json")
    args = parser.parse_args()
    known = MODELS[args.model][1]
    if unknown := [case for case in args.cases or () if case not in known]:
        parser.error(f"{unknown[0]!r} is not one of {', '.join(known)}")
    torch.set_num_threads(1)
    rows: list[Row] = []
    print("| case | held-out loss | of each seed | bytes a worker sends a step |\n|---|---|---|---|")
    for case in args.cases or known:
        runs = [train(case, seed, args) for seed in range(args.seeds)]
        losses, sent = [loss for loss, _ in runs], runs[0][1]
        rows += [
            Row(case, "heldout_loss", statistics.median(losses), min(losses), max(losses)),
            Row(case, "wire_bytes", sent),
        ]
        each = ", ".join(f"{loss:.3f}" for loss in losses)
        print(f"| {case} | {statistics.median(losses):.3f} | {each} | {sent:,.0f} |", flush=True)
        if args.json:  # after each, so that a run that is ended leaves what it has
            write(args.json, meta(__version__, **vars(args)), rows)


if __name__ == "__main__":
    main()
