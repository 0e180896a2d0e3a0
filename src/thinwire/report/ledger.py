"""The ledger: the bytes that were sent, their cost, and a note on everything done differently from the request."""

import json
import statistics
import time
from collections import deque
from dataclasses import asdict, dataclass
from pathlib import Path

from thinwire.core import files

KEPT_STEPS = 1_000


@dataclass(slots=True)
class StepRow:
    """One step of one worker; bytes are bytes sent."""

    step: int
    method: str = ""
    wire_bytes: float = 0.0
    dense_bytes: float = 0.0  # what dense fp32 would have sent
    compressed_wire_bytes: float = 0.0  # only of the units that the method compresses
    compressed_dense_bytes: float = 0.0
    within_node_bytes: float = 0.0  # within the node or along the shard axis; not part of wire_bytes
    within_node_dense_bytes: float = 0.0  # what fp32 would have sent along the shard axis
    gather_bytes: float = 0.0  # of compressed all-gathers of parameters since the last step
    gather_dense_bytes: float = 0.0
    send_seconds: float = 0.0
    exchange_seconds: float = 0.0  # from start to end of each exchange; on CPUs without DDP, the wait
    receive_seconds: float = 0.0
    noise_scale: float | None = None  # of the gradient, in batches of one worker, if the optimizer measures it
    error: float | None = None  # ||x - sent||² / ||x||² over the compressed units, if measured


class Ledger:
    """Rows of the last 1,000 steps, totals over all of them, and notes.

    ``ratio`` is the wire bytes of a dense fp32 exchange over the actual wire bytes, for the same number of workers.
    """

    def __init__(self, method: str, world: int, link: str) -> None:
        self.method = method
        self.world = world
        self.link = link
        self.kernels = ""
        self.rows: deque[StepRow] = deque(maxlen=KEPT_STEPS)
        self.notes: list[str] = []
        self.steps = 0
        self.skipped = 0
        """Exchanges without an optimizer step after them: an overflow, or a nonfinite gradient."""
        self.wire_bytes = 0.0
        self.dense_bytes = 0.0

    def note(self, text: str) -> None:
        """Add a note for the user, unless it is there already."""
        if text not in self.notes:
            self.notes.append(text)

    def add(self, row: StepRow) -> None:
        self.rows.append(row)
        self.steps += 1
        self.wire_bytes += row.wire_bytes
        self.dense_bytes += row.dense_bytes

    @property
    def ratio(self) -> float:
        """Dense over wire bytes, over all steps including the warm-up."""
        return self.dense_bytes / self.wire_bytes if self.wire_bytes else 1.0

    def write_jsonl(self, path: str | Path) -> None:
        """Write the kept rows, one JSON object per line."""
        files.write_text(path, "".join(json.dumps(asdict(row)) + "\n" for row in self.rows))

    def markdown(self) -> str:
        """Return a table of medians over those of the last 100 steps with the current method, and the notes."""
        last = [row for row in list(self.rows)[-100:] if row.method == self.rows[-1].method]
        if not last:
            return f"{self.method}, {self.world} workers over {self.link}: no step yet\n" + self._notes()
        lossy = [row for row in last if row.compressed_wire_bytes]

        def median(field: str, scale: float = 1.0) -> float:
            return statistics.median(getattr(row, field) for row in last) * scale

        def ratio(dense: str, sent: str, rows: list[StepRow] = last) -> str:
            if not rows:
                return "-"
            ratios = [getattr(row, dense) / getattr(row, sent) if getattr(row, sent) else 1.0 for row in rows]
            return f"{statistics.median(ratios):,.1f}"

        lines = [
            ("workers", f"{self.world}"),
            ("link", self.link),
            ("kernels", self.kernels or "-"),
            ("exchanges", f"{self.steps}"),
            ("skipped (not finite, or no optimizer step)", f"{self.skipped}"),
            ("wire bytes per step and worker", f"{median('wire_bytes'):,.0f}"),
            ("ratio to dense fp32", ratio("dense_bytes", "wire_bytes")),
            ("ratio of the compressed units", ratio("compressed_dense_bytes", "compressed_wire_bytes", lossy)),
            ("ratio over all steps", f"{self.ratio:,.1f}"),
            ("compress, ms", f"{median('send_seconds', 1e3):.2f}"),
            ("exchange, ms (DDP, CUDA: overlaps)", f"{median('exchange_seconds', 1e3):.2f}"),
            ("decompress, ms", f"{median('receive_seconds', 1e3):.2f}"),
        ]
        sharded = any(row.within_node_dense_bytes for row in last)
        if any(row.within_node_bytes for row in last):
            what = "of the reduce-scatter" if sharded else "inside the node"
            lines.append((f"bytes {what} per step and rank", f"{median('within_node_bytes'):,.0f}"))
            if sharded:
                lines.append(
                    ("ratio of the reduce-scatter to fp32", ratio("within_node_dense_bytes", "within_node_bytes"))
                )
        if any(row.gather_bytes for row in last):
            lines.append(("bytes of the all-gather per step and rank", f"{median('gather_bytes'):,.0f}"))
            lines.append(("ratio of the all-gather to fp32", ratio("gather_dense_bytes", "gather_bytes")))
        if scales := [row.noise_scale for row in self.rows if row.noise_scale is not None]:
            lines.append(("gradient noise scale, batches of one worker", f"{scales[-1]:.3g}"))
        if errors := [row.error for row in self.rows if row.error is not None]:
            lines.append(("relative error of one step (residual energy)", f"{errors[-1]:.4f}"))
        width = max(len(name) for name, _ in lines)
        table = "\n".join(f"| {name:<{width}} | {value} |" for name, value in lines)
        return f"| {'thinwire':<{width}} | {self.method} |\n|{'-' * (width + 2)}|---|\n{table}\n" + self._notes()

    def _notes(self) -> str:
        return "".join(f"- {note}\n" for note in self.notes)


class Stopwatch:
    """A timer: adds the wall-clock seconds of a ``with`` block to a row; on CUDA only the host's time."""

    def __init__(self, row: StepRow, field: str) -> None:
        self.row, self.field = row, field

    def __enter__(self) -> "Stopwatch":
        self.start = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        seconds = time.perf_counter() - self.start
        setattr(self.row, self.field, getattr(self.row, self.field) + seconds)
