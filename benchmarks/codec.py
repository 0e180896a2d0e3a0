"""Bits for each element sent: indices in several codes, whole messages with values of several precisions.

    python -m benchmarks.codec --json codec.json --plot codec.png

Random index sets and normal values, from a seed. Every code is read back: indices to the bit, values to the bit of what
the sender believes was received. Codes take turns in every round; times are medians over the rounds, with quartiles.
"""

import argparse
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zstandard
from tests.test_sizes import resnet50
from torch import Tensor

import thinwire
from thinwire.coding import bitpack, elias_fano, frame, header, rice
from thinwire.coding import values as wire_values
from thinwire.coding.values import CODES
from thinwire.core import Context, Payload
from thinwire.exchange.buckets import Bucket, plan_bucket
from thinwire.exchange.units import resolve, set_stage
from thinwire.kernels.reference import REFERENCE
from thinwire.report import results
from thinwire.report.results import Row

DENSITIES = (0.25, 0.125, 0.1, 0.0625, 0.05, 0.03125, 0.015625, 0.01, 0.0078125, 0.004, 0.001, 0.0005, 0.0001)
MESSAGE_DENSITIES = (0.1, 0.01, 0.001, 0.0001)
VALUES = ("float32", "float16", *reversed(CODES))
CTX = Context(seed=0, step=0, unit="w", rank=0)


@dataclass(frozen=True)
class Code:
    """One way to write indices, int64 ``[k]``, below n: to an object that has ``len`` bytes, and back."""

    name: str
    encode: Callable[[Tensor, int], Any]
    decode: Callable[[Any, int, int], Tensor]


def to_bitmap(indices: Tensor, n: int) -> Tensor:
    return bitpack.pack_bits(torch.zeros(n, dtype=torch.uint8).index_fill_(0, indices, 1))


def to_varints(indices: Tensor, n: int) -> bytes:
    """Seven bits of a gap in a byte, the lowest first; the highest bit says that more follow. Then zstd."""
    gaps = np.diff(indices.numpy(), prepend=-1) - 1
    lengths = 1 + sum((gaps >> 7 * j > 0).astype(np.int64) for j in range(1, 5))
    starts = np.cumsum(lengths) - lengths
    out = np.empty(int(lengths.sum()), np.uint8)
    for j in range(5):
        there = lengths > j
        out[starts[there] + j] = (gaps[there] >> 7 * j & 127) | ((lengths[there] > j + 1) << 7)
    return zstandard.ZstdCompressor().compress(out.tobytes())


def from_varints(data: bytes, k: int, n: int) -> Tensor:
    read = np.frombuffer(zstandard.ZstdDecompressor().decompress(data), np.uint8)
    ends = np.flatnonzero(read < 128)
    starts = np.concatenate([[0], ends[:-1] + 1])
    shifts = 7 * (np.arange(len(read)) - np.repeat(starts, ends - starts + 1))
    return torch.from_numpy(np.cumsum(np.add.reduceat((read & 127).astype(np.int64) << shifts, starts) + 1) - 1)


CODES_OF_INDICES = (
    Code("elias_fano", elias_fano.encode, elias_fano.decode),
    Code(
        "rice",
        lambda indices, n: rice.encode(indices, rice.parameter(len(indices), n)),
        lambda data, k, n: rice.decode_checked(data, k, n, rice.parameter(k, n)),
    ),
    Code(
        "int32",
        lambda indices, n: indices.to(torch.int32).view(torch.uint8),
        lambda data, k, n: data.view(torch.int32).long(),
    ),
    Code("bitmap", to_bitmap, lambda data, k, n: bitpack.unpack_bits(data)[:n].nonzero().view(-1)),
    Code("varint_zstd", to_varints, from_varints),
)


def entropy(p: float) -> float:
    """Bits for each of the chosen, at independent positions."""
    return (-p * math.log2(p) - (1 - p) * math.log2(1 - p)) / p


def timed(call: Callable[..., Any], *args: Any) -> tuple[Any, float]:
    start = time.perf_counter()
    result = call(*args)
    return result, time.perf_counter() - start


def time_rows(case: str, encode: list[float], decode: list[float]) -> list[Row]:
    rows: list[Row] = []
    for metric, seconds in (("encode_seconds", encode), ("decode_seconds", decode)):
        low, median, high = np.percentile(seconds, [25, 50, 75])
        rows.append(Row(case, metric, float(median), float(low), float(high)))
    return rows


def random_indices(k: int, n: int) -> Tensor:
    mask = torch.zeros(n, dtype=torch.bool)
    while missing := k - int(mask.count_nonzero()):
        free = (~mask).nonzero().view(-1) if missing < k else None
        draw = torch.randint(n if free is None else len(free), (missing,))
        mask[draw if free is None else free[draw]] = True
    return mask.nonzero().view(-1)


def of_indices(n: int, rounds: int) -> list[Row]:
    rows: list[Row] = []
    for p in DENSITIES:
        k = math.ceil(p * n)
        indices = random_indices(k, n)
        seconds: dict[str, tuple[list[float], list[float]]] = {code.name: ([], []) for code in CODES_OF_INDICES}
        sizes: dict[str, int] = {}
        for _ in range(rounds):
            for code in CODES_OF_INDICES:
                data, encoding = timed(code.encode, indices, n)
                back, decoding = timed(code.decode, data, k, n)
                assert torch.equal(back, indices), f"{code.name} at {p} is not read as it was written"
                sizes[code.name] = len(data)
                seconds[code.name][0].append(encoding)
                seconds[code.name][1].append(decoding)
        for name, nbytes in sizes.items():
            case = f"indices/{name}/{p:g}"
            rows += [Row(case, "bits_per_element", 8 * nbytes / k), *time_rows(case, *seconds[name])]
        rows.append(Row(f"indices/entropy/{p:g}", "bits_per_element", entropy(p)))
    return rows


def plan(shapes: list[tuple[int, ...]], p: float, values: str) -> Bucket:
    """The bucket that two workers would exchange."""
    named = [(f"p{i}", torch.empty(shape, device="meta")) for i, shape in enumerate(shapes)]
    units = resolve(named, thinwire.topk(p, values=values), {})
    set_stage(units, None, 2)
    return plan_bucket(units, 2)


def to_message(bucket: Bucket, payloads: list[Payload]) -> Tensor:
    """The message as ``pipeline.send`` packs it: payloads, head, padding."""
    (group,) = bucket.routes
    flags = header.encode([True] * len(group.units), torch.zeros(len(group.units), dtype=torch.bool), group.dtype, 0)
    return group.layout.pack([*(payloads[i] for i in group.units), (flags,)])


def encode(bucket: Bucket, chosen: Tensor, selected: Tensor, n: int) -> Tensor:
    return to_message(bucket, [bucket.units[0].compressor.encode(chosen, selected, n, CTX)])


def decode(bucket: Bucket, message: Tensor, like: Tensor) -> Any:
    return bucket.units[0].compressor.decompress(bucket.routes[0].layout.unpack(message)[0], like, {}, CTX)


def of_messages(n: int, rounds: int) -> list[Row]:
    """One tensor of n elements, and what its selected values lose in each precision."""
    rows: list[Row] = []
    x = torch.randn(n)
    for p in MESSAGE_DENSITIES:
        chosen = REFERENCE.largest(x, math.ceil(p * n))
        selected, k = x[chosen], len(chosen)
        buckets = {values: plan([(n, 1)], p, values) for values in VALUES}
        seconds: dict[str, tuple[list[float], list[float]]] = {values: ([], []) for values in VALUES}
        for last in reversed(range(rounds)):
            for values, bucket in buckets.items():
                compressor = bucket.units[0].compressor

                message, encoding = timed(encode, bucket, chosen, selected, n)
                got, decoding = timed(decode, bucket, message, x)
                own = compressor.decompress(compressor.encode(chosen, selected, n, CTX), x, {}, CTX)
                assert torch.equal(got.indices, chosen), "indices are not read as they were written"
                assert torch.equal(got.values, own.values), "the receiver has other values than the sender believes"
                assert values != "float32" or torch.equal(got.values, selected)
                seconds[values][0].append(encoding)
                seconds[values][1].append(decoding)
                if last == 0:
                    case = f"message/{values}/{p:g}"
                    lost = (got.values.double() - selected.double()).square().sum() / selected.double().square().sum()
                    rows += [Row(case, "bits_per_element", 8 * len(message) / k), Row(case, "error", float(lost))]
                    rows += time_rows(case, *seconds[values])
        rows += of_frames(chosen, selected, n, p)
    return rows


def of_frames(chosen: Tensor, selected: Tensor, n: int, p: float) -> list[Row]:
    """The same as a frame: Golomb-Rice indices, a name, and the head; and once more through zstd."""
    rows: list[Row] = []
    for values in ("float32", *reversed(CODES)):
        plain = frame.Entry((n,), selected, chosen)
        entry = plain if values == "float32" else frame.Entry.quantised((n,), selected, chosen, values)
        for name, compress in (("frame", None), ("frame_zstd", "zstd")):
            data = frame.encode(frame.Frame({"w": entry}), indices="rice", compress=compress)
            got = frame.decode(data).entries["w"]
            assert torch.equal(got.indices, chosen)
            assert torch.equal(got.values, entry.values)
            rows.append(Row(f"{name}/{values}/{p:g}", "bits_per_element", 8 * len(data) / len(chosen)))
    return rows


def of_tails(n: int) -> list[Row]:
    """Measure the loss of the codes on the 1 % of largest magnitude, and of evenly spaced levels; by the tail."""
    rows: list[Row] = []
    for name, x in (("normal", torch.randn(n)), ("student3", torch.distributions.StudentT(3.0).sample((n,)))):
        sent = x[REFERENCE.largest(x, n // 100)]
        lo, hi = sent.abs().aminmax()
        for code, bits in CODES.items():
            step = (hi - lo) / max(1, 2 ** (bits - 1) - 1)
            even = sent.sign() * (lo + step * ((sent.abs() - lo) / step).round())
            for case, got in ((code, wire_values.decode(*wire_values.encode(sent, code), code, len(sent))),
                              (f"even_{code}", even)):  # fmt: skip
                if case != "even_sign":
                    lost = (got.double() - sent).square().sum() / sent.double().square().sum()
                    rows.append(Row(f"tail/{case}/{name}", "error", float(lost)))
    return rows


def of_model(shapes: list[tuple[int, ...]]) -> list[Row]:
    """All tensors of a model in one message, the uncompressed ones among them."""
    rows: list[Row] = []
    tensors = [torch.randn(shape) for shape in shapes]
    for p in MESSAGE_DENSITIES:
        for values in VALUES:
            bucket = plan(shapes, p, values)
            payloads = [u.compressor.compress(x, {}, CTX) for u, x in zip(bucket.units, tensors, strict=True)]
            message = to_message(bucket, payloads)
            for unit, x, sent, got in zip(
                bucket.units, tensors, payloads, bucket.routes[0].layout.unpack(message), strict=False
            ):
                a, b = torch.empty_like(x), torch.empty_like(x)
                unit.compressor.decompress(sent, x, {}, CTX).write_to(a)
                unit.compressor.decompress(got, x, {}, CTX).write_to(b)
                assert torch.equal(a, b), "the receiver has other values than the sender believes"
            plain = sum(u.param.nbytes for u in bucket.units if not u.compressed)
            k = sum(u.compressor.k(u.param.numel()) for u in bucket.units if u.compressed)
            case, total = f"model/{values}/{p:g}", sum(x.nbytes for x in tensors)
            rows.append(Row(case, "bits_per_element", 8 * (len(message) - plain) / k))
            rows.append(Row(case, "message_bytes", len(message)))
            rows.append(Row(case, "uncompressed_bytes", plain))
            rows.append(Row(case, "ratio", total / len(message)))
    return rows


def table(rows: list[Row], group: str, metric: str, digits: int = 3) -> str:
    """One row a density, one column a code."""
    cells = {tuple(row.case.split("/")[1:]): row.value for row in rows if row.case.startswith(group + "/")
             and row.metric == metric}  # fmt: skip
    names = list(dict.fromkeys(name for name, _ in cells))
    lines = [f"| {group}, {metric} | {' | '.join(names)} |", "|---:" * (len(names) + 1) + "|"]
    for p in dict.fromkeys(p for _, p in cells):
        lines.append(f"| {float(p):.4%} | {' | '.join(f'{cells[name, p]:.{digits}f}' for name in names)} |")
    return "\n".join(lines)


def plot(rows: list[Row], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    for name in [code.name for code in CODES_OF_INDICES] + ["entropy"]:
        points = [
            row.value for row in rows if row.case.startswith(f"indices/{name}/") and row.metric.startswith("bits")
        ]
        style = {"color": "black", "linestyle": "--"} if name == "entropy" else {"marker": "."}
        axes.plot(DENSITIES, points, label=name.replace("_", " + " if "zstd" in name else "-"), **style)
    axes.set(
        xscale="log", xlabel="density", ylabel="bits for each index", ylim=(0, 34), title="Indices of a random set"
    )
    axes.legend()
    figure.savefig(path, dpi=120, bbox_inches="tight")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--numel", type=int, default=25_600_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    torch.set_num_threads(1)
    small = args.numel <= 1_000_000
    model = resnet50()[:30] if small else resnet50()
    rows = of_indices(args.numel, args.rounds) + of_messages(args.numel, args.rounds) + of_model(model)
    torch.manual_seed(args.seed)
    tails = of_tails(min(args.numel, 4_000_000))
    for group in ("indices", "message", "frame", "frame_zstd", "model"):
        print(table(rows, group, "bits_per_element"), "\n")
    for group, metric, digits in (
        ("message", "error", 4), ("model", "message_bytes", 0), ("model", "ratio", 1),
        ("indices", "encode_seconds", 4), ("indices", "decode_seconds", 4),
        ("message", "encode_seconds", 4), ("message", "decode_seconds", 4),
    ):  # fmt: skip
        print(table(rows, group, metric, digits), "\n")
    for row in tails:
        print(f"{row.case:>24}: {row.value:.6f} of the energy sent is lost")
    if args.json:
        meta = results.meta(thinwire.__version__, numel=args.numel, rounds=args.rounds, seed=args.seed, threads=1)
        meta["versions"]["zstandard"] = zstandard.__version__
        results.write(args.json, meta, rows + tails)
    if args.plot:
        plot(rows, args.plot)


if __name__ == "__main__":
    main()
