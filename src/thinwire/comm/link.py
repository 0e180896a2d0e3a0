"""Cost of an exchange: bytes that one worker sends, and seconds on a link of given bandwidth and latency.

All-reduce is a ring: ``2 (N-1)`` messages of ``size / N``. All-gather passes every payload to each other worker:
``N-1`` messages of ``size``. All-to-all sends each other worker its own part: ``N-1`` messages of ``size / N``. A
broadcast is a chain: each worker but the last passes ``size`` on; every worker is counted the mean of these bytes,
``(N-1)/N`` of ``size``. The alpha-beta model charges ``latency`` per message and ``8 / bandwidth`` per byte. All links
of a chain carry data at once, so a broadcast is charged ``size`` once.
"""

import math
import re
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from thinwire.core.checks import check_fields, of_type, real, shown
from thinwire.core.errors import ThinwireError

Kind: TypeAlias = Literal["all_reduce", "all_gather", "all_to_all", "broadcast"]
UNITS = {"bit": 1.0, "kbit": 1e3, "mbit": 1e6, "gbit": 1e9}
SECONDS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "μs": 1e-6, "ms": 1e-3, "s": 1.0}
NUMBER = r"\d+(?:\.\d+)?(?:[eE][+-]?\d+)?"
WRITTEN = re.compile(
    rf"(?P<number>{NUMBER})\s*(?P<unit>[a-z/]+(?: Ethernet| per second)?)"
    rf"(?:\s*[,;\s]\s*(?P<late>{NUMBER})\s*(?P<time>{'|'.join(SECONDS)}))?",
    re.IGNORECASE | re.ASCII,
)
PREFIXES = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12} | {
    f"{short}i": 2.0 ** (10 * power) for power, short in enumerate("kmgt", 1)
}
LONG = {"kilo": "k", "mega": "m", "giga": "g", "tera": "t", "kibi": "ki", "mebi": "mi", "gibi": "gi", "tebi": "ti"}


def _bits(unit: str) -> float | None:
    """Return the bits per second of a unit, None if it is unknown."""
    rate = re.fullmatch(r"(.+?)(/s|/sec|ps|/second| per second)?", unit, re.IGNORECASE)
    written = rate[1] if rate else ""
    if written.isupper() and written.endswith("B") and rate and rate[2] == "PS":
        return None  # GBPS: all capitals, so bits and bytes can't be told apart
    lower = written.lower()
    if lower.endswith("ethernet"):
        lower = lower.removesuffix("ethernet").strip()
    for long, short in LONG.items():
        lower = short + lower.removeprefix(long) if lower.startswith(long) else lower
    found = re.fullmatch(r"(|[kmgt]|[kmgt]i)(b|be|ige|bits?|bytes?|)", lower)
    if not found or not lower:
        return None
    by_eight = found[2].startswith("byte") or (found[2] == "b" and written.endswith("B"))
    return PREFIXES[found[1]] * (8.0 if by_eight else 1.0)


def wire_bytes(kind: Kind, nbytes: float, world: int) -> float:
    """Return the bytes that one of ``world`` workers sends for a message of ``nbytes``; for a broadcast, the mean."""
    share = (world - 1) / world
    times = {"all_reduce": 2 * share, "all_gather": world - 1, "all_to_all": share, "broadcast": share}
    return times[kind] * nbytes


@dataclass(frozen=True)
class Link:
    """The link from each worker to the switch.

    Args:
        bandwidth: bits per second in each direction.
        latency: seconds per message.
    """

    bandwidth: float
    latency: float = 0.0

    def __post_init__(self) -> None:
        bits = real(0.0, above=True, hint=", in bits per second, e.g. 1e9; Link.parse('1gbit') reads text")
        check_fields(self, bandwidth=bits, latency=real(0.0, hint=", in seconds, e.g. 0.0005"))

    @staticmethod
    def read(name: str, given: Any) -> "Link | None":
        """Read an argument that is a ``Link``, a text for ``parse``, or None; others raise a ``ThinwireError``."""
        if given is None or isinstance(given, Link):
            return given
        if isinstance(given, str):
            return Link.parse(given)
        raise ThinwireError(
            f"{name} is {shown(given)}; write a bandwidth with its unit, and perhaps a latency: '100mbit', "
            "'1gbit,0.5ms', or thinwire.comm.link.Link(bits_per_second, seconds)"
        )

    @staticmethod
    def parse(text: str) -> "Link":
        """Parse a link written as ``100mbit``, ``1 Gb/s``, ``10GbE``, ``25G`` or ``100mbit,0.5ms``.

        A small ``b`` means bits and a capital ``B`` bytes: ``125 MB/s`` is ``1 Gb/s``. ``Mi`` is 2^20.

        Raises:
            ThinwireError: the text is not a link.
        """
        text = of_type(str, "write it as text, e.g. '1gbit'")("link", text)
        found = WRITTEN.fullmatch(text.strip())
        unit = _bits(found["unit"]) if found else None
        if not found or unit is None or not 0.0 < float(found["number"]) * unit < math.inf:
            raise ThinwireError(
                f"link {text!r} is not understood; write a bandwidth, and perhaps a latency: "
                "100mbit, 1gbit, 10GbE or 100mbit,0.5ms"
            )
        latency = float(found["late"] or 0) * SECONDS[(found["time"] or "s").lower()]
        return Link(float(found["number"]) * unit, latency)

    def seconds(self, kind: Kind, nbytes: float, world: int) -> float:
        """Return the seconds that one exchange of a message of ``nbytes`` takes."""
        messages = 2 * (world - 1) if kind == "all_reduce" else world - 1
        through = nbytes * (world > 1) if kind == "broadcast" else wire_bytes(kind, nbytes, world)
        return messages * self.latency + through * 8 / self.bandwidth

    def __str__(self) -> str:
        unit = max((u for u, scale in UNITS.items() if scale <= self.bandwidth), key=UNITS.__getitem__, default="bit")
        latency = f", {self.latency * 1e3:g} ms" if self.latency else ""
        return f"{self.bandwidth / UNITS[unit]:g} {unit[0].upper() if unit != 'kbit' else 'k'}b/s{latency}"
