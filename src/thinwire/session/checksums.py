"""Checksums of a checkpoint's tensors and of its other entries, which detect any flipped bit.

In a checkpoint::

    checks    layout   JSON: of each tensor [local or shared, unit, key, dtype, the dimension along which it is cut]
              said     the checksum, in hexadecimal, of the layout and of all entries that are equal on all ranks
              rows     int64 [world, shards, 1 + slots]: checksums of the rank's number and of its tensors, in that
                       order; zeros fill unused slots

A dimension of None means that there is one piece, -1 that pieces are stacked. Each checksum covers one piece, so it can
be computed again with any other number of ranks or shards.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias, cast

import numpy as np
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from thinwire.compressors.cast import DTYPES
from thinwire.core.errors import ThinwireError
from thinwire.session.untrusted import read_mapping, read_tensor

Entry: TypeAlias = tuple[str, str, str, str, int | None]
"""Part, unit, key, dtype and the dimension along which the tensor is cut."""
COLUMNS = 1024
AT_ONCE = 256
"""Rows that are summed both ways while they are in the CPU cache."""
SAID = ("version", "world", "step", "installed_at", "method")
"""Keys of a checkpoint whose values are equal on all ranks."""


def checksum(tensor: Tensor) -> int:
    """Return a 64-bit checksum of the elements in row-major order.

    The bytes form a table of 1,024 words a row. The sums of all rows and columns are hashed: a change of up to three
    words can't cancel out in both. This is faster than a CRC, and on CUDA only the sums go to the host.
    """
    data = tensor.detach().contiguous().view(-1).view(torch.uint8)
    if data.storage_offset() % 8:  # a row of a tensor may start off an 8-byte boundary, where no word view can begin
        data = data.clone()
    words = data[: data.numel() // 8 * 8].view(torch.int64)
    table = words[: len(words) // COLUMNS * COLUMNS].view(-1, COLUMNS)
    parts = *_sums(table), words[table.numel() :], data[8 * len(words) :]
    return _hash(*(part.cpu().numpy().tobytes() for part in parts), str(tensor.dtype).encode())


def _sums(table: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sums of columns and of rows, modulo 2^64. On a CPU, NumPy takes a third of the time of torch."""
    if table.device.type != "cpu":
        return table.sum(0), table.sum(1)
    words = table.numpy()
    columns, rows = np.zeros(COLUMNS, np.int64), np.empty(len(words), np.int64)
    for i in range(0, len(words), AT_ONCE):  # the second sum reads them from the cache
        columns += words[i : i + AT_ONCE].sum(0)
        words[i : i + AT_ONCE].sum(1, out=rows[i : i + AT_ONCE])
    return torch.from_numpy(columns), torch.from_numpy(rows)


def of_rank(rank: int, shard: int, tensors: Sequence[Tensor]) -> Tensor:
    """Return this rank's int64 row, padded to a multiple of 8 tensors: a load in place needs equal shapes."""
    each = [_numbers(rank, shard), *map(checksum, tensors)]
    return torch.tensor(each + [0] * (-len(tensors) % 8), dtype=torch.int64, device="cpu")


def said(state: Mapping[str, Any], layout: Sequence[Entry] | str) -> dict[str, str]:
    """Return the layout, and the checksum of all entries that are neither tensors nor specific to one rank."""
    layout = layout if isinstance(layout, str) else json.dumps(layout)
    more = [state["round"]] if "round" in state else []
    whole = [layout, *(state.get(key) for key in SAID), *more, *sorted(cast(Mapping[str, str], state["plan"]).items())]
    return {"layout": layout, "said": f"{_hash(repr(whole).encode()) % 2**64:016x}"}


def check(state: Mapping[str, Any], rank: int | None) -> list[str]:
    """Compare a checkpoint, whose entries have the right types, with its checksums; a difference is an error.

    Only the row of ``rank`` is compared, or all rows if it is None. Returns notes on tensors that were rounded.
    """
    checks, notes = read_mapping(state, "checks"), list[str]()
    rows = read_tensor(checks.get("rows"), "the checksum table", {"int64": torch.int64})
    entries = _entries(state, checks)
    ranks = _list(read_tensor(state.get("rank"), "rank"))
    shards = _list(read_tensor(state["shard"], "shard")) if "shard" in state else [0.0]
    shape = (len(ranks), len(shards), 1 + len(entries) + -len(entries) % 8)
    if tuple(rows.shape) != shape:
        raise ThinwireError(f"checksums are of shape {tuple(rows.shape)}, not of {shape}; {_damaged(state)}")
    for row in range(len(ranks)) if rank is None or len(ranks) == 1 else [rank]:
        for shard, own in enumerate(shards):
            number, *right = _list(rows[row, shard])
            where = f"rank {ranks[row]:g}" + (f", shard {own:g}" if "shard" in state else "")
            if number != _numbers(ranks[row], own):
                raise ThinwireError(f"{where} is not the number that was saved; {_damaged(state)}")
            for entry, expected in zip(entries, right, strict=False):
                part, unit, key, dtype, _ = entry
                piece = _piece(state, entry, row, shard, len(shards))
                if str(piece.dtype) != dtype and isinstance(state[part][unit][key], DTensor):  # loaded in place
                    saved = DTYPES[dtype.removeprefix("torch.")]
                    if torch.promote_types(saved, piece.dtype) != piece.dtype:
                        notes.append(f"{unit}: {key} was rounded as it was read; wire.load(folder) checks it first")
                        continue
                    piece = piece.to(saved)
                if checksum(piece) != expected:
                    raise ThinwireError(
                        f"{unit}: the {part} {key} of {where} is not what was saved, its checksum differs; "
                        + _damaged(state)
                    )
    return notes


def _piece(state: Mapping[str, Any], entry: Entry, row: int, shard: int, shards: int) -> Tensor:
    part, unit, key, _, dim = entry
    whole = read_tensor(state[part][unit][key], f"{unit}: {key}")
    if dim == -1:
        return whole[shard] if shard < len(whole) else whole[:0]
    if part == "local":
        whole = whole[row] if row < len(whole) else whole[:0]
    if dim is None or shards == 1 or dim >= whole.ndim:  # one piece, or only this rank's
        return whole
    pieces: Sequence[Tensor] = whole.chunk(shards, dim)
    return pieces[shard] if shard < len(pieces) else whole.narrow(dim, 0, 0)


def _entries(state: Mapping[str, Any], checks: Mapping[str, Any]) -> list[Entry]:
    """Return the layout's entries, after checking that they are exactly the tensors of the checkpoint."""
    layout = checks.get("layout")
    layout = layout if isinstance(layout, str) and isinstance(state.get("method"), str) else ""
    if not layout or checks.get("said") != said(state, layout)["said"]:
        raise ThinwireError(
            "what the checkpoint says of its step, method and units is not what was saved, its checksum differs; "
            + _damaged(state)
        )
    try:
        entries = [_entry(*entry) for entry in json.loads(layout)]
    except (ValueError, TypeError, RecursionError) as error:
        raise ThinwireError(f"the layout of its checksums can't be read: {error!r:.100}; {_damaged(state)}") from error
    there = [
        (part, unit, key)
        for part in ("local", "shared")
        for unit in read_mapping(state, part)
        for key in read_mapping(state[part], unit)
    ]
    if sorted(there) != sorted(entry[:3] for entry in entries):
        odd = min(set(there) ^ {entry[:3] for entry in entries}, default=("", "", ""))
        what = f"{odd[1]}: the {odd[0]} {odd[2]}"
        raise ThinwireError(f"{what} and its checksum did not come together; {_damaged(state)}")
    return entries


def _entry(part: Any, unit: Any, key: Any, dtype: Any, dim: Any) -> Entry:
    texts = all(isinstance(text, str) for text in (part, unit, key, dtype))
    if not texts or dtype.removeprefix("torch.") not in DTYPES or not (dim is None or (type(dim) is int and dim >= -1)):
        raise ValueError(f"{part}, {unit}, {key}, {dtype}, {dim}")
    return part, unit, key, dtype, dim


def _numbers(rank: float, shard: float) -> int:
    return _hash(f"{float(rank)}/{float(shard)}".encode())


def _list(tensor: Tensor) -> list[Any]:
    return cast(Any, tensor).flatten().tolist()


def _damaged(state: Mapping[str, Any]) -> str:
    where = f"in {state['file']} " if "file" in state else ""
    return f"the checkpoint {where}is damaged, load another one"


def _hash(*parts: bytes) -> int:
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        digest.update(part)
    return int.from_bytes(digest.digest(), "little", signed=True)
