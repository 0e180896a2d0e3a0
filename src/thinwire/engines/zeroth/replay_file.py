"""A fine-tuned model as a file of kilobytes: the directions and scalars of its steps, in the manner of FedKSeed.

Format: ``THWZ``, the length of the header (uint32), the header in JSON, then 12 bytes for each direction of each update
(its number, uint32, and its scalar, float64), then the CRC-32 of all that (uint32). Little-endian.

Source: Z. Qin et al., "Federated full-parameter tuning of billion-sized language models with communication cost under
18 kilobytes", 2024, arXiv 2312.06353.

Departures: no fixed set of seeds; a direction is a number, and one seed of the run is in the header.
"""

import json
import math
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from thinwire.core import files
from thinwire.core.errors import ThinwireError
from thinwire.core.tensors import flat
from thinwire.engines.zeroth.directions import Trained, Update, apply, trained
from thinwire.engines.zeroth.scalars import PAIR
from thinwire.session.fingerprint import chained, fingerprint

MAGIC = b"THWZ"
LENGTH = struct.Struct("<I")
BASE = "load the weights that the training began with"


@dataclass
class History:
    """All updates of a run."""

    seed: int
    base: int
    """The hash of the parameters before the first step."""
    tensors: list[list[Any]]
    """Name, dtype and shape of each trained parameter."""
    updates: list[Update] = field(default_factory=list[Update])

    @staticmethod
    def of(parts: Sequence[Trained], seed: int) -> "History":
        """Begin a history at the present values."""
        return History(seed, hash_of(parts), [_kind(one) for one in parts])

    def encode(self) -> bytes:
        settings: list[list[float]] = []
        for i, update in enumerate(self.updates):
            now = [update.lr, update.weight_decay, len(update.pairs)]
            if not settings or settings[-1][1:] != now:
                settings.append([i, *now])
        head = {
            "format": 1, "seed": self.seed, "base": self.base, "tensors": self.tensors, "settings": settings,
            "updates": len(self.updates),
        }  # fmt: skip
        text = json.dumps(head, separators=(",", ":")).encode()
        pairs = b"".join(PAIR.pack(*pair) for update in self.updates for pair in update.pairs)
        data = MAGIC + LENGTH.pack(len(text)) + text + pairs
        return data + LENGTH.pack(zlib.crc32(data))

    @staticmethod
    def decode(data: bytes) -> "History":
        """Parse a file.

        Raises:
            ThinwireError: it is damaged, or something else.
        """
        if data[:4] != MAGIC or len(data) < 12 or LENGTH.unpack(data[-4:])[0] != zlib.crc32(data[:-4]):
            raise ThinwireError(
                f"these {len(data):,} bytes are no replay file, or a damaged one; take what save_replay() has written"
            )
        try:
            (length,) = LENGTH.unpack(data[4:8])
            head = json.loads(data[8 : 8 + length])
            if head["format"] != 1:
                raise ThinwireError(
                    f"the replay file has format {head['format']}, and 1 is known; use a later version of thinwire"
                )
            pairs = iter(PAIR.iter_unpack(data[8 + length : -4]))
            starts = [*(start for start, *_ in head["settings"][1:]), head["updates"]]
            updates: list[Update] = []
            for (_, lr, decay, each), end in zip(head["settings"], starts, strict=True):
                if each < 1:
                    raise ValueError(f"an update of {each} directions")
                while len(updates) < end:
                    updates.append(Update(lr, decay, tuple(next(pairs) for _ in range(each))))
            if next(pairs, None) is not None or not all(_is_finite(update) for update in updates):
                raise ValueError("a count or a number in it is wrong")
            return History(head["seed"], head["base"], head["tensors"], updates)
        except (ValueError, LookupError, TypeError, struct.error, RuntimeError) as error:
            raise ThinwireError(
                f"the replay file can't be read ({error}); take what save_replay() has written"
            ) from error

    def check(self, parts: Sequence[Trained]) -> None:
        """Check that the updates belong to these parameters, at their present values.

        Raises:
            ThinwireError: they belong to others.
        """
        here = [_kind(one) for one in parts]
        if here != self.tensors:
            both = zip([*here, *[None] * len(self.tensors)], self.tensors, strict=False)
            other = next(((mine, its) for mine, its in both if mine != its), (here[-1], None))
            raise ThinwireError(
                f"the replay file is for another model: it has {other[1]} where this one has {other[0]}; build the "
                "model that was trained, with the same parameters frozen"
            )
        if (found := hash_of(parts)) != self.base:
            raise ThinwireError(
                f"the replay file begins at parameters of hash {self.base:016x}, and these have {found:016x}; {BASE}"
            )


def hash_of(parts: Sequence[Trained]) -> int:
    """Return the hash of the parameters' bits."""
    return chained(fingerprint(one.param.data.cpu()) for one in parts)  # CUDA has another hash of the same bits


def replay(model: nn.Module, path: str | Path) -> None:
    """Rebuild a fine-tuned model, bit for bit, from its base and the file of ``ZerothOrder.save_replay``.

    Args:
        model: the model with the parameters that the training began with; the same are frozen.
        path: the file.

    Raises:
        ThinwireError: the file can't be read, or belongs to another model or other weights. Nothing has been changed.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise ThinwireError(f"no replay file can be read from {path}: {error.strerror or error}") from error
    history, parts = History.decode(data), trained(model)
    history.check(parts)
    for one in parts:
        apply(flat(one.param.data), history.updates, history.seed, one)


def save(path: str | Path, history: History) -> None:
    """Write the file, atomically."""
    files.write(path, lambda file: file.write(history.encode()))


def _kind(one: Trained) -> list[Any]:
    return [one.name, str(one.param.dtype).removeprefix("torch."), list(one.param.shape)]


def _is_finite(update: Update) -> bool:
    return all(map(math.isfinite, (update.lr, update.weight_decay, *(scalar for _, scalar in update.pairs))))
