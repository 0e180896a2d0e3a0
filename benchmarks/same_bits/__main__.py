"""Two revisions on a grid of cells: which leave other parameters, states or bytes.

    python -m benchmarks.same_bits 931ece6 --cells "dgc*/*/cpu" --json same_bits.json

The revision is checked out in a folder of its own. Each side has four processes on the loopback, one thread each,
which are started once and run every cell with the same seeds. A cell that neither side can do, for the same kind of
error, is "refused on both". The exit status is 1 where a cell differs.
"""

import argparse
import fnmatch
import json
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

from benchmarks.lab.ranks import ROOT
from benchmarks.revisions import checked_out
from benchmarks.same_bits.comparing import difference, refused
from benchmarks.same_bits.grid import Cell, cells
from benchmarks.same_bits.sides import Side

Results = dict[str, dict[str, Any]]


def turns(chosen: Sequence[Cell]) -> Iterator[dict[int, Cell]]:
    """Which rank runs which cell at once; those of one process go to the first two, which have compiled kernels."""
    for cell in chosen:
        if cell.ranks > 1:
            yield dict.fromkeys(range(cell.ranks), cell)
    alone = iter([cell for cell in chosen if cell.ranks == 1])
    places = 2 if any(cell.ranks > 1 for cell in chosen) else 1
    for group in zip_longest(*[alone] * places):
        yield {rank: cell for rank, cell in enumerate(group) if cell is not None}


def run(before: Path, chosen: Sequence[Cell]) -> tuple[Results, Results]:
    """Run the cells on both sides; returns the results by cell. They take the same turns at the same time."""
    found: tuple[Results, Results] = {}, {}
    world = max(cell.ranks for cell in chosen)
    with Side(before / "src", world) as old, Side(ROOT / "src", world) as new:
        for turn in turns(chosen):
            before_it = len(found[0])
            for side in (old, new):
                side.start(turn)
            for side, its in zip((old, new), found, strict=True):
                its |= side.answers()
            if (done := len(found[0])) // 50 > before_it // 50:
                print(f"{done} of {len(chosen)} cells", file=sys.stderr, flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.same_bits", description=__doc__.partition("\n")[0])
    parser.add_argument("revision")
    parser.add_argument("--cells", default="*", help="a glob of names")
    parser.add_argument("--list", action="store_true", help="the names, and no more")
    parser.add_argument("--json", type=Path, help="write what both sides found to this file")
    given = parser.parse_args()
    chosen = [cell for name, cell in cells().items() if fnmatch.fnmatchcase(name, given.cells)]
    if not chosen:
        parser.error(f"no cell is called {given.cells}; --list has the names")
    if given.list:
        print(*(cell.name for cell in chosen), sep="\n")
        return
    start = time.monotonic()
    with checked_out(given.revision) as before:
        old, new = run(before, chosen)
    seconds = time.monotonic() - start
    differ = {name: text for name in old if (text := difference(old[name], new[name]))}
    both = {name: old[name]["error"] for name in old if refused(old[name], new[name])}
    for name, error in both.items():
        print(f"refused on both: {name} ({error})")
    for name, text in differ.items():
        print(f"differs: {name}: {text}")
    equal = len(old) - len(differ) - len(both)
    print(f"{equal} cells equal, {len(differ)} differ; {len(both)} refused on both; {seconds:.0f} s")
    if differ:
        families = Counter(name.partition("/")[0] for name in differ)
        print("where: " + ", ".join(f"{name} ({count})" for name, count in families.items()))
    if given.json is not None:
        report = {"revision": given.revision, "seconds": seconds, "differ": differ, "refused": both}
        given.json.write_text(json.dumps(report | {"before": old, "after": new}, indent=1) + "\n")
    sys.exit(1 if differ else 0)


if __name__ == "__main__":
    main()
