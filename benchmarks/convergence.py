"""What values in few bits, two phases and short states cost in accuracy: the demo's task, simulated workers, seeds.

    python -m benchmarks.convergence --json convergence.json

Every case starts from the same weights and sees the same batches as the others of its seed. The figure is the held-out
loss, in nats a character; ``low`` and ``high`` are its range over the seeds.
"""

import argparse
import statistics

import torch

from thinwire import Warmup, dense, dgc, simulate
from thinwire._version import __version__
from thinwire.demo import text as demo_text
from thinwire.demo.model import CharLM, loss_of
from thinwire.report.results import Row, meta, write

CLIP = 1.0
CASES = {
    "dense": {},
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


def train(case: str, seed: int, args: argparse.Namespace) -> tuple[float, float]:
    """Held-out loss, and bytes a worker sent, after the last step."""
    text = demo_text.load()
    torch.manual_seed(seed)
    model = CharLM(len(text.vocabulary), 64, args.hidden)
    warmup = Warmup(max(4, args.steps // 10))
    method = (
        dense(clip=CLIP)
        if case == "dense"
        else dgc(**{"density": args.density, "clip": CLIP, "warmup": warmup} | CASES[case])
    )
    result = simulate(
        model,
        method,
        optimizer=torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.9),
        batches=lambda worker, step: text.batch(step, worker, 2, 32, seed),
        loss=loss_of,
        workers=args.workers,
        steps=args.steps,
        seed=seed,
    )
    with torch.no_grad():
        return loss_of(model, text.held_out_batch(64, 128)).item(), result.ledger.rows[-1].wire_bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--density", type=float, default=0.001)
    parser.add_argument("--json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[Row] = []
    print("| case | held-out loss | of each seed | bytes a worker sends a step |\n|---|---|---|---|")
    for case in args.cases:
        runs = [train(case, seed, args) for seed in range(args.seeds)]
        losses, sent = [loss for loss, _ in runs], runs[0][1]
        rows += [
            Row(case, "heldout_loss", statistics.median(losses), min(losses), max(losses)),
            Row(case, "wire_bytes", sent),
        ]
        each = ", ".join(f"{loss:.3f}" for loss in losses)
        print(f"| {case} | {statistics.median(losses):.3f} | {each} | {sent:,.0f} |", flush=True)
    if args.json:
        write(args.json, meta(__version__, **vars(args)), rows)


if __name__ == "__main__":
    main()
