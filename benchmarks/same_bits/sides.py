"""The processes of one revision, and what they answer of each cell."""

import contextlib
import json
import select
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

from benchmarks.lab.processes import Hosts
from benchmarks.lab.ranks import KEEP, ROOT
from benchmarks.same_bits.grid import Cell

PATIENCE = 120.0
"""Seconds for a turn; the kernels of a CPU are compiled in the first."""
Answers = dict[int, dict[str, Any]]


class Side:
    """``world`` processes with the package in ``source``; started again where one is lost, or alone in an error."""

    def __init__(self, source: Path, world: int) -> None:
        self.source, self.world = source, world
        self.hosts = Hosts(world)
        self.ranks: list[Any] = []
        self.files = contextlib.ExitStack()

    def __enter__(self) -> "Side":
        self._start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def _end(self) -> None:
        self.hosts.close()
        self.files.close()

    def _start(self) -> None:
        self._end()
        argv = [sys.executable, "-m", "benchmarks.same_bits.serving", str(self.source)]
        here = KEEP | {"PYTHONPATH": f"{self.source}:{ROOT}"}
        self.said = [self.files.enter_context(tempfile.TemporaryFile()) for _ in range(self.world)]  # noqa: SIM115
        self.ranks = [
            self.hosts.popen(
                rank, argv, env | here, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=said, cwd=ROOT
            )
            for rank, (env, said) in enumerate(zip(self.hosts.rendezvous(self.world), self.said, strict=True))
        ]
        self.fresh = True

    def _lines(self, ranks: Sequence[int]) -> dict[int, Any]:
        """Return the answer of each; None of one that has ended or takes too long."""
        found: dict[int, Any] = {}
        for rank in ranks:
            pipe = self.ranks[rank].stdout
            ready, _, _ = select.select([pipe], [], [], PATIENCE)
            line = pipe.readline() if ready else b""
            found[rank] = json.loads(line) if line else None
        return found

    def start(self, turn: Mapping[int, Cell]) -> None:
        """Give each rank its cell; ``answers`` has what comes of it."""
        if self.fresh and not all(self._lines(range(self.world)).values()):
            raise SystemExit(f"the package in {self.source} can't be started:\n{self._last_words()}")
        self.fresh = False
        self.turn = turn
        for rank, cell in turn.items():
            with contextlib.suppress(BrokenPipeError):
                self.ranks[rank].stdin.write(f"{cell.name}\n".encode())
                self.ranks[rank].stdin.flush()

    def answers(self) -> dict[str, dict[str, Any]]:
        """By cell: what its ranks found, under one name each; or ``error``, of the first that has one."""
        lines = self._lines(list(self.turn))
        lost = any(answer is None for answer in lines.values())
        found: dict[str, dict[str, Any]] = {}
        for cell in {cell.name: cell for cell in self.turn.values()}.values():
            mine = {rank: lines[rank] for rank, given in self.turn.items() if given is cell}
            errors = [answer or {"error": "lost", "said": self._last_words()} for answer in mine.values()]
            errors = [answer for answer in errors if "error" in answer]
            lost |= len({error["error"] for error in errors}) > 1 or 0 < len(errors) < len(mine)
            found[cell.name] = errors[0] if errors else _joined(mine)
        if lost:  # the others may be in the middle of an exchange
            self._start()
        return found

    def _last_words(self) -> str:
        texts: list[str] = []
        for rank, said in enumerate(self.said):
            said.seek(0)
            texts.append(f"rank {rank}: {said.read().decode(errors='replace')[-1000:]}")
        return "\n".join(texts)


def _joined(answers: Answers) -> dict[str, Any]:
    """Merge the results of the ranks of a cell."""
    if len(answers) == 1:
        return next(iter(answers.values()))
    return {
        "params": [list(each) for each in zip_longest(*(one["params"] for one in answers.values()))],
        "states": {f"rank {rank}/{name}": h for rank, one in answers.items() for name, h in one["states"].items()},
        "bytes": [one["bytes"] for one in answers.values()],
    }
