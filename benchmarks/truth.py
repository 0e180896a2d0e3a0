"""Check of the ledger: its bytes against the counters of the network interfaces, in the lab.

    python -m benchmarks.truth --workers 2,4 --json truth.json

For each method, 100 steps. What is taken off the counters is 66 bytes for each packet counted: Ethernet 14, IP 20,
TCP 32 with its time stamps. So packets that only acknowledge count nothing, and a packet above the MTU, which the
interface counts as one, has one header. What remains is what gloo handed to TCP: our messages, 288 bytes of
gloo's own for each (two segments, each with a header and two words that it is ready), and a barrier. These stay in,
so the model must be large enough. The ratio is that of the rank where it is worst; above 5 % the run fails.
"""

import argparse
import sys
from pathlib import Path

import thinwire
from benchmarks import truth_rank
from benchmarks.lab import run_ranks
from thinwire.report import results

LIMIT = 0.05


def measure(workers: int, link: str, steps: int, timeout: float = 600.0) -> list[results.Row]:
    """Bytes a step, the mean over ranks, and the worst ratio of counted over booked bytes, for each method."""
    task = {"methods": list(truth_rank.METHODS), "steps": steps}
    ranks = run_ranks("benchmarks.truth_rank", task, workers, link, timeout)
    rows: list[results.Row] = []
    for name in truth_rank.METHODS:
        case = f"truth/{workers}/{link}/{name}"
        for metric in ("ledger_bytes", "tcp_bytes", "nic_bytes"):
            rows.append(
                results.Row(case, metric, sum(rank[name][metric] / rank[name]["steps"] for rank in ranks) / workers)
            )
        ratios = [rank[name]["tcp_bytes"] / rank[name]["ledger_bytes"] for rank in ranks]
        worst = max(ratios, key=lambda ratio: abs(ratio - 1.0))
        rows.append(results.Row(case, "ratio", worst, min(ratios), max(ratios)))
    return rows


def true(row: results.Row) -> bool:
    return row.metric != "ratio" or abs(row.value - 1.0) <= LIMIT


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", default="2,4")
    parser.add_argument("--link", default="1gbit")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows = [row for n in args.workers.split(",") for row in measure(int(n), args.link, args.steps)]
    print(
        "| case | ledger, bytes a step | counted less headers | counted | less headers / ledger |\n" + "|---" * 5 + "|"
    )
    for i in range(0, len(rows), 4):
        *counts, ratio = rows[i : i + 4]
        measured = " | ".join(f"{row.value:,.0f}" for row in counts)
        print(f"| {ratio.case} | {measured} | {ratio.value:.4f} |{'' if true(ratio) else ' WRONG'}")
    if args.json:
        results.write(args.json, results.meta(thinwire.__version__), rows)
    sys.exit(not all(map(true, rows)))


if __name__ == "__main__":
    main()
