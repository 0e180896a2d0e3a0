"""What an exchange costs: bytes that one worker sends, and seconds on a link of given bandwidth and latency.

All-reduce is a ring: ``2 (N-1)`` messages of ``size / N``. All-gather passes every payload to each other worker:
``N-1`` messages of ``size``. All-to-all sends each other worker its own part: ``N-1`` messages of ``size / N``. A
broadcast is a chain: each worker but the last passes ``size`` on, and every worker, the source like the others, is
counted the mean, ``(N-1)/N`` of it. The alpha-beta model charges ``latency`` for every message and ``1 / bandwidth``
for every byte; what is passed along a chain is under way on all its links at once.
"""

import re
from dataclasses import dataclass
from typing import Literal, TypeAlias

from thinwire.tensors import ThinwireError

Kind: TypeAlias = Literal["all_reduce", "all_gather", "all_to_all", "broadcast"]
UNITS = {"bit": 1.0, "kbit": 1e3, "mbit": 1e6, "gbit": 1e9}


def wire_bytes(kind: Kind, nbytes: float, world: int) -> float:
    """Bytes that one of ``world`` workers sends to exchange a message of ``nbytes``; of a broadcast, the mean."""
    share = (world - 1) / world
    times = {"all_reduce": 2 * share, "all_gather": world - 1, "all_to_all": share, "broadcast": share}
    return times[kind] * nbytes


@dataclass(frozen=True)
class Link:
    """A link of every worker to the switch.

    Args:
        bandwidth: bits per second, each way.
        latency: seconds for one message.
    """

    bandwidth: float
    latency: float = 0.0

    def __post_init__(self) -> None:
        if not self.bandwidth > 0 or self.latency < 0:
            raise ThinwireError(f"a link needs bandwidth above 0 and latency of at least 0; got {self}")

    @staticmethod
    def parse(text: str) -> "Link":
        """A link written as ``100mbit``, ``1gbit`` or ``100mbit,0.5ms``.

        Raises:
            ThinwireError: anything else.
        """
        found = re.fullmatch(
            r"(\d+(?:\.\d+)?)\s*(kbit|mbit|gbit|bit)(?:\s*,\s*(\d+(?:\.\d+)?)\s*(us|ms|s))?",
            text.strip().lower(),
        )
        if not found or not float(found[1]):
            raise ThinwireError(
                f"link {text!r} is not understood; write a bandwidth, and perhaps a latency: "
                "100mbit, 1gbit or 100mbit,0.5ms"
            )
        latency = float(found[3] or 0) * {"us": 1e-6, "ms": 1e-3, "s": 1.0}[found[4] or "s"]
        return Link(float(found[1]) * UNITS[found[2]], latency)

    def seconds(self, kind: Kind, nbytes: float, world: int) -> float:
        """How long one exchange of a message of ``nbytes`` takes."""
        messages = 2 * (world - 1) if kind == "all_reduce" else world - 1
        through = nbytes * (world > 1) if kind == "broadcast" else wire_bytes(kind, nbytes, world)
        return messages * self.latency + through * 8 / self.bandwidth

    def __str__(self) -> str:
        unit = max((u for u, scale in UNITS.items() if scale <= self.bandwidth), key=UNITS.__getitem__, default="bit")
        latency = f", {self.latency * 1e3:g} ms" if self.latency else ""
        return f"{self.bandwidth / UNITS[unit]:g} {unit[0].upper() if unit != 'kbit' else 'k'}b/s{latency}"
