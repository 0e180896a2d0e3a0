"""Accuracy with few bits along the shards of FSDP2: a character transformer, AdamW, real processes, seeds.

    python -m benchmarks.sharded --json sharded.json

``plain`` is FSDP2 as it is; ``scatter`` compresses the reduce-scatter of gradients, ``gather`` the all-gather of
parameters. Every case starts from the same weights and sees the same batches as the others of its seed. Losses are
held-out, in nats a character, with exact weights; ``low`` and ``high`` are their range over the seeds.
"""

import argparse
import statistics

from benchmarks.lab import run_ranks
from thinwire._version import __version__
from thinwire.report.results import Row, meta, write


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", help="of sharded_rank.CASES; all by default")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--width", type=int, default=96)
    parser.add_argument("--json")
    args = parser.parse_args()
    task = {"seeds": args.seeds, "steps": args.steps, "width": args.width, "cases": args.cases}
    found = run_ranks("benchmarks.sharded_rank", task, args.workers, "none", 3600.0)[0]
    rows: list[Row] = []
    print("| case | held-out loss | of each seed | gradients, of fp32's bytes | parameters |\n|---|---|---|---|---|")
    for case, runs in found.items():
        losses, last = [run["heldout_loss"] for run in runs], runs[0]
        rows.append(Row(case, "heldout_loss", statistics.median(losses), min(losses), max(losses)))
        shares: list[str] = []
        for metric, ours, theirs in (
            ("share_of_gradients", "within_node_bytes", "within_node_dense_bytes"),
            ("share_of_parameters", "gather_bytes", "gather_dense_bytes"),
        ):
            share = last[ours] / last[theirs] if last.get(theirs) else 1.0
            rows.append(Row(case, metric, share))
            shares.append(f"{share:.3f}")
        each = ", ".join(f"{loss:.3f}" for loss in losses)
        print(f"| {case} | {statistics.median(losses):.3f} | {each} | {' | '.join(shares)} |")
    if args.json:
        write(args.json, meta(__version__, **vars(args)), rows)


if __name__ == "__main__":
    main()
