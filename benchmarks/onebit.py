"""1-bit Adam against Adam: a character transformer, simulated workers, equal steps, seeds.

    python -m benchmarks.onebit --data ../shared/data --json onebit.json

Both cases of a seed start from the same weights and see the same batches. Losses are held-out, in nats a character, and
``low`` and ``high`` their range over the seeds; ratios are bytes of dense Adam over these, with scales and heads.
"""

import argparse
import statistics
from pathlib import Path

import torch

from thinwire import dense, onebit_adam, simulate, zeroone_adam
from thinwire._version import __version__
from thinwire.cli import text as demo_text
from thinwire.cli.demo_models import loss_of, transformer
from thinwire.optim import OneBitAdam, ZeroOneAdam
from thinwire.report.results import Row, meta, write

CASES = ("adam", "onebit_adam", "zeroone_adam")
BETAS = (0.9, 0.99)
"""With 0.999 the variance of so short a training would still move."""


def text_of(data: str | None) -> demo_text.Text:
    path = Path(data or "") / "tinyshakespeare.txt"
    return demo_text.read(path) if data and path.exists() else demo_text.load()


def train(case: str, seed: int, text: demo_text.Text, args: argparse.Namespace) -> tuple[float, list[float]]:
    """Held-out loss after the last step, and the ratio to dense of each step's bytes."""
    torch.manual_seed(seed)
    model = transformer(len(text.vocabulary), width=args.width, length=args.length)
    freeze_step = max(1, round(args.dense * args.steps))
    options = {"lr": args.lr, "betas": BETAS}
    if case == "adam":
        method, optimizer = dense(), torch.optim.Adam(model.parameters(), **options)
    elif case == "onebit_adam":
        method = onebit_adam(block=args.block)
        optimizer = OneBitAdam(model.parameters(), **options, freeze_step=freeze_step)
    else:
        method, optimizer = zeroone_adam(block=args.block), ZeroOneAdam(model.parameters(), **options)
    rise = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, 1.0, max(1, freeze_step // 2))
    fall = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.steps, 0.1 * args.lr)
    schedule = torch.optim.lr_scheduler.ChainedScheduler([rise, fall])
    result = simulate(
        model,
        method,
        optimizer=optimizer,
        batches=lambda worker, step: text.batch(step, worker, args.batch, args.length, seed),
        loss=loss_of,
        workers=args.workers,
        steps=args.steps,
        seed=seed,
        after_step=lambda step, loss: schedule.step(),
    )
    with torch.no_grad():
        loss = loss_of(model, text.held_out_batch(128, args.length)).item()
    rows = result.ledger.rows
    return loss, [row.wire_bytes / row.dense_bytes for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=CASES)
    parser.add_argument("--data", help="a folder with tinyshakespeare.txt; without it, the demo's text")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--dense", type=float, default=0.15, help="share of the steps before the variance is frozen")
    parser.add_argument("--block", type=int, default=4096)
    parser.add_argument("--json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    text = text_of(args.data)
    rows: list[Row] = []
    print("| case | held-out loss | of each seed | ratio at the end | ratio of the whole |\n|---|---|---|---|---|")
    for case in args.cases:
        runs = [train(case, seed, text, args) for seed in range(args.seeds)]
        losses, shares = [loss for loss, _ in runs], runs[0][1]
        late, whole = 1.0 / min(shares), 1.0 / statistics.fmean(shares)
        rows += [
            Row(case, "heldout_loss", statistics.median(losses), min(losses), max(losses)),
            Row(case, "ratio_compressed", late),
            Row(case, "ratio", whole),
        ]
        each = ", ".join(f"{loss:.3f}" for loss in losses)
        print(f"| {case} | {statistics.median(losses):.3f} | {each} | {late:.1f} | {whole:.1f} |", flush=True)
    if args.json:
        write(args.json, meta(__version__, **vars(args)), rows)


if __name__ == "__main__":
    main()
