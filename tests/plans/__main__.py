"""``python -m tests.plans --plans 2000 --seed 0``: run random plans, and say which laws were broken."""

import argparse
import collections
import logging
import os
import time
from pathlib import Path

import torch

from tests.plans.fleet import Fleet
from tests.plans.generator import draw
from tests.plans.outcome import Outcome
from tests.plans.plan import Plan


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.plans", description=__doc__)
    parser.add_argument("--plans", type=int, default=200, help="how many")
    parser.add_argument("--seed", type=int, default=0, help="of the first; each plan has the next one")
    parser.add_argument("--only", type=int, nargs="+", help="run the plans of these seeds alone, and print them")
    parser.add_argument("--file", type=Path, help="run a plan that was printed, perhaps by then made smaller")
    given = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("thinwire").setLevel(logging.ERROR)
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # DDP warns where nothing is unused, or a pass is cut short
    if given.file is not None:
        plans = [Plan.from_json(given.file.read_text())]
    else:
        plans = [draw(seed) for seed in given.only or range(given.seed, given.seed + given.plans)]
    if given.only:
        print("\n".join(plan.to_json() for plan in plans))
    fleet, began = Fleet(), time.monotonic()
    try:
        outcomes: list[Outcome] = []
        for plan in plans:
            outcomes.append(_run(fleet, plan))
            if len(outcomes) % 100 == 0:
                print(f"{len(outcomes)} plans, {sum(bool(one.faults) for one in outcomes)} faults", flush=True)
    finally:
        fleet.stop()
    print(summary(outcomes, time.monotonic() - began))
    return any(one.faults for one in outcomes)


def _run(fleet: Fleet, plan: Plan) -> Outcome:
    outcome = fleet.run(plan)
    if outcome.faults:
        print(
            f"\nseed {plan.seed}: {plan.to_json()}\n" + "\n".join(f"  {fault}" for fault in outcome.faults[:5]),
            flush=True,
        )
    return outcome


def summary(outcomes: list[Outcome], seconds: float) -> str:
    refused = collections.Counter(one.refused[:100] for one in outcomes if one.refused)
    held = collections.Counter(law for one in outcomes for law in one.held)
    faults = [one.plan.seed for one in outcomes if one.faults]
    lines = [f"  refused {count:4}: {text}" for text, count in refused.most_common(40)]
    lines.append(f"laws looked at: {', '.join(f'{law} {count}' for law, count in held.items())}")
    lines.append(
        f"{len(outcomes)} plans in {seconds:.0f} s, {sum(refused.values())} refused, {len(faults)} faults: {faults}"
    )
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
