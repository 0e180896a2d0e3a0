"""A pass over memory in blocks of 64 elements: load, accumulate, compare, store past the cache.

An ordinary store first reads the cache line that it will overwrite. Stores past the cache avoid that read, so two
copies of the state cost no more than an update in place. numba can't emit such stores, so the code is LLVM IR. Vectors
have 16 floats; LLVM splits them to the machine's width.
"""

from functools import cache
from typing import Any, cast

import numpy
from llvmlite import ir
from numba.core import cgutils

from thinwire.kernels.cpu_bits import intrinsic, lowest_bit, njit, types

UNDEFINED: Any = cast(Any, ir).Undefined
BLOCK = 64
LANES = 16
LINE = 64
AHEAD = 16
"""Runs of a sample to prefetch."""
FETCHED = 2048
"""Bytes of the state that a pass prefetches."""
F32, I16, I32, I64 = ir.FloatType(), ir.IntType(16), ir.IntType(32), ir.IntType(64)
VF, VI, VH = ir.VectorType(F32, LANES), ir.VectorType(I32, LANES), ir.VectorType(I16, LANES)
ITEMSIZE = {"float32": 4, "bfloat16": 2, "float16": 2}


def splat(b: Any, scalar: Any, vector: Any) -> Any:
    one = b.insert_element(ir.Constant(vector, UNDEFINED), scalar, ir.Constant(I32, 0))
    return b.shuffle_vector(one, ir.Constant(vector, UNDEFINED), ir.Constant(VI, [0] * LANES))


def _all(value: int, vector: Any = VI) -> Any:
    return ir.Constant(vector, [value] * LANES)


def _load(b: Any, address: Any, j: int, dtype: str) -> Any:
    """Load the ``j``-th 16 elements from ``address``, as float32."""
    size = ITEMSIZE[dtype]
    kind = {"float32": VF, "bfloat16": VH, "float16": ir.VectorType(ir.HalfType(), LANES)}[dtype]
    at = b.inttoptr(b.add(address, ir.Constant(I64, j * LANES * size)), kind.as_pointer())
    x = b.load(at, align=size)
    if dtype == "float16":
        return b.fpext(x, VF)
    return b.bitcast(b.shl(b.zext(x, VI), _all(16)), VF) if dtype == "bfloat16" else x


def _rounded(b: Any, x: Any) -> Any:
    """Round float32 to the nearest bfloat16, ties to even, as 16 bits; NaN stays NaN."""
    bits = b.bitcast(x, VI)
    even = b.and_(b.lshr(bits, _all(16)), _all(1))
    near = b.lshr(b.add(b.add(bits, _all(0x7FFF)), even), _all(16))
    return b.trunc(b.select(b.fcmp_unordered("uno", x, x), _all(0x7FC0), near), VH)


@intrinsic
def as_bfloat16(_: Any, x: Any) -> Any:
    """Round float32 to bfloat16, returned as float32."""

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
        wide = b.bitcast(b.shl(b.zext(_rounded(b, splat(b, args[0], VF)), VI), _all(16)), VF)
        return b.extract_element(wide, ir.Constant(I32, 0))

    return types.float32(types.float32), generate


def _store(b: Any, x: Any, address: Any, j: int, past_cache: bool) -> None:
    size = 2 if x.type == VH else 4
    at = b.inttoptr(b.add(address, ir.Constant(I64, j * LANES * size)), x.type.as_pointer())
    store = b.store(x, at, align=LANES * size if past_cache else size)
    if past_cache:
        store.set_metadata("nontemporal", b.module.add_metadata([ir.Constant(I32, 1)]))


def _fused(b: Any, x: Any, y: Any, z: Any) -> Any:
    """Compute ``x y + z`` of scalars or vectors, rounded once."""
    name = "llvm.fma.v16f32" if x.type == VF else "llvm.fma.f32"
    kind = ir.FunctionType(x.type, [x.type] * 3)
    return b.call(b.module.globals.get(name) or ir.Function(b.module, kind, name), [x, y, z])


def _fetch(b: Any, address: Any) -> None:
    """Prefetch the cache line at ``address``, which need not be valid memory."""
    byte = ir.IntType(8).as_pointer()
    name = "llvm.prefetch.p0"
    kind = ir.FunctionType(ir.VoidType(), [byte, I32, I32, I32])
    prefetch = b.module.globals.get(name) or ir.Function(b.module, kind, name)
    b.call(prefetch, [b.inttoptr(address, byte), ir.Constant(I32, 0), ir.Constant(I32, 2), ir.Constant(I32, 1)])


def _stepped(b: Any, kind: str, g: Any, u: Any, v: Any, m: Any) -> tuple[Any, Any]:
    """Compute ``Accumulation`` of 16 elements; returns the new u (None without momentum) and the new v."""
    if kind == "plain":
        return None, b.fadd(v, g)
    if kind == "nesterov":
        un = b.fmul(b.fadd(u, g), m)
        return un, b.fadd(b.fadd(v, g), un)
    un = _fused(b, u, m, g)
    return un, b.fadd(v, un)


@cache
def accumulate(kind: str, grad: str, state: str, past_cache: bool, clear: bool, ahead: int = 0) -> Any:
    """Make ``f(g, u, v, new_u, new_v, kept, momentum, scale, threshold) -> mask`` for one block at these addresses.

    ``kind`` is ``"plain"`` (no momentum), ``"momentum"`` or ``"nesterov"``. ``Accumulation`` is in float32; bfloat16
    states are rounded again when stored. ``past_cache`` needs states that are aligned to a vector. ``clear`` sets the
    gradient to zero. ``ahead`` bytes of the state are prefetched, into the L2 cache: the L1 cache has few line-fill
    buffers, and the stores need them.

    Bit ``i`` of the mask is set if ``|v'_i|`` is not below the threshold. ``kept`` gets a second copy of v' in the
    cache.
    """

    @intrinsic
    def block(
        _: Any, g: Any, u: Any, v: Any, new_u: Any, new_v: Any, kept: Any, momentum: Any, scale: Any, threshold: Any
    ) -> Any:
        address = (types.int64,) * 6

        def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
            g, u, v, new_u, new_v, kept, momentum, scale, threshold = args
            m, s = splat(b, momentum, VF), splat(b, scale, VF)
            least = b.bitcast(splat(b, threshold, VF), VI)
            if state == "bfloat16":
                least = b.trunc(b.lshr(least, _all(16)), VH)
            mask = ir.Constant(I64, 0)
            for start, size in ((g, ITEMSIZE[grad]), (u, ITEMSIZE[state]), (v, ITEMSIZE[state])) if ahead else ():
                for line in range(0, BLOCK * size, LINE):
                    _fetch(b, b.add(start, ir.Constant(I64, ahead * size // ITEMSIZE[state] + line)))
            for j in range(BLOCK // LANES):
                ul = None if kind == "plain" else _load(b, u, j, state)
                un, vn = _stepped(b, kind, b.fmul(_load(b, g, j, grad), s), ul, _load(b, v, j, state), m)
                if un is not None:
                    _store(b, _rounded(b, un) if state == "bfloat16" else un, new_u, j, past_cache)
                stored = _rounded(b, vn) if state == "bfloat16" else vn
                _store(b, stored, new_v, j, past_cache)
                _store(b, stored, kept, j, False)
                # magnitudes compare like their bits, with NaN above infinity
                bits = stored if state == "bfloat16" else b.bitcast(vn, VI)
                largest = _all(0x7FFF, VH) if state == "bfloat16" else _all(0x7FFFFFFF)
                high = b.icmp_unsigned(">=", b.and_(bits, largest), least)
                found = b.zext(b.bitcast(high, I16), I64)
                mask = b.or_(mask, b.shl(found, ir.Constant(I64, j * LANES)))
                if clear:
                    _store(b, _all(0) if grad == "float32" else _all(0, VH), g, j, False)
            return mask

        return types.uint64(*address, types.float32, types.float32, types.float32), generate

    return block


@cache
def magnitudes(kind: str, grad: str, state: str) -> Any:
    """Make ``f(g, u, v, out, momentum, scale)``: writes ``|v'|`` of 16 elements at these addresses as float32."""

    @intrinsic
    def run(_: Any, g: Any, u: Any, v: Any, out: Any, momentum: Any, scale: Any) -> Any:
        def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
            g, u, v, out, momentum, scale = args
            gl = b.fmul(_load(b, g, 0, grad), splat(b, scale, VF))
            ul = None if kind == "plain" else _load(b, u, 0, state)
            _, x = _stepped(b, kind, gl, ul, _load(b, v, 0, state), splat(b, momentum, VF))
            bits = b.shl(b.zext(_rounded(b, x), VI), _all(16)) if state == "bfloat16" else b.bitcast(x, VI)
            _store(b, b.bitcast(b.and_(bits, _all(0x7FFFFFFF)), VF), out, 0, False)
            return context.get_dummy_value()

        return types.void(*(types.int64,) * 4, types.float32, types.float32), generate

    return run


@intrinsic
def fused(_: Any, x: Any, y: Any, z: Any) -> Any:
    """Compute ``x y + z``, rounded once."""

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
        return _fused(b, *args)

    return types.float32(types.float32, types.float32, types.float32), generate


@cache
def load(dtype: str) -> Any:
    """Make ``f(address) -> float32``, which loads one element."""

    @intrinsic
    def one(_: Any, address: Any) -> Any:
        def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
            kind = {"float32": F32, "bfloat16": I16, "float16": ir.HalfType()}[dtype]
            x = b.load(b.inttoptr(args[0], kind.as_pointer()), align=ITEMSIZE[dtype])
            if dtype == "float16":
                return b.fpext(x, F32)
            return b.bitcast(b.shl(b.zext(x, I32), ir.Constant(I32, 16)), F32) if dtype == "bfloat16" else x

        return types.float32(types.int64), generate

    return one


@intrinsic
def fetch(_: Any, address: Any) -> Any:
    """Prefetch the cache line at ``address``."""

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
        _fetch(b, args[0])
        return context.get_dummy_value()

    return types.void(types.int64), generate


@intrinsic
def copy(_: Any, to: Any, source: Any, nbytes: Any) -> Any:
    """Run ``memcpy(to, source, nbytes)``."""

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
        byte = ir.IntType(8).as_pointer()
        cgutils.raw_memcpy(b, b.inttoptr(args[0], byte), b.inttoptr(args[1], byte), args[2], 1)  # pyright: ignore[reportUnknownMemberType]
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), generate


@njit(nogil=True)
def _collect(word: Any, first: int, kept: Any, indices: Any, values: Any, count: int) -> int:
    """Append the elements of a block's mask, as far as they fit; returns the count, including those that don't fit."""
    one = numpy.uint64(1)
    while word:
        if count < indices.size:
            j = lowest_bit(word)
            indices[count], values[count] = first + j, kept[j]
        word &= word - one
        count += 1
    return count


@cache
def compiled_pass(kind: str, grad: str, state: str, past_cache: bool, clear: bool) -> Any:
    """Make ``f(g, u, v, new_u, new_v, n, momentum, scale, threshold, offset, indices, values) -> count``.

    The addresses are of ``n`` elements each, the first of which has index ``offset``. ``indices`` and ``values``, as
    bits, get the elements not below the threshold, as far as they fit; the count has all of them.
    """
    block = accumulate(kind, grad, state, past_cache, clear, FETCHED)
    edge = accumulate(kind, grad, state, False, clear)
    wide_g, wide = BLOCK * ITEMSIZE[grad], BLOCK * ITEMSIZE[state]

    @njit(nogil=True)
    def run(
        g: int,
        u: int,
        v: int,
        new_u: int,
        new_v: int,
        n: int,
        momentum: float,
        scale: float,
        threshold: float,
        offset: int,
        indices: Any,
        values: Any,
    ) -> int:
        m, s, t = numpy.float32(momentum), numpy.float32(scale), numpy.float32(threshold)
        kept = numpy.empty(64, values.dtype)
        k, whole, count = kept.ctypes.data, n // 64, 0
        for i in range(whole):
            a, b = i * wide_g, i * wide
            word = block(g + a, u + b, v + b, new_u + b, new_v + b, k, m, s, t)
            if word:
                count = _collect(word, offset + i * 64, kept, indices, values, count)
        rest = n - whole * 64
        if rest:  # copy the last elements to a full block
            room = numpy.zeros((5, 64), numpy.float32)
            r, step = room.ctypes.data, 256
            a, b = whole * wide_g, whole * wide
            rest_g, rest_s = rest * wide_g // 64, rest * wide // 64
            copy(r, g + a, rest_g)
            copy(r + step, u + b, rest_s)
            copy(r + 2 * step, v + b, rest_s)
            word = edge(r, r + step, r + 2 * step, r + 3 * step, r + 4 * step, k, m, s, t)
            copy(g + a, r, rest_g)
            if new_u != new_v:
                copy(new_u + b, r + 3 * step, rest_s)
            copy(new_v + b, r + 4 * step, rest_s)
            word &= (numpy.uint64(1) << numpy.uint64(rest)) - numpy.uint64(1)
            count = _collect(word, offset + whole * 64, kept, indices, values, count)
            room[0, 0] = 0.0  # keeps the array alive until here
        kept[0] = 0  # likewise
        return count

    return run


@cache
def compiled_sample(kind: str, grad: str, state: str) -> Any:
    """Make ``f(g, u, v, start, stride, run, momentum, scale, out)``: writes sampled ``|v'|`` of a pass to ``out``."""
    load_g, load_s, vector = load(grad), load(state), magnitudes(kind, grad, state)
    size_g, size = ITEMSIZE[grad], ITEMSIZE[state]
    plain, nesterov, short = kind == "plain", kind == "nesterov", state == "bfloat16"

    @njit(nogil=True)
    def pick(
        g: int, u: int, v: int, start: int, stride: int, run: int, momentum: float, scale: float, out: Any
    ) -> None:
        m, s = numpy.float32(momentum), numpy.float32(scale)
        to, whole = out.ctypes.data, run // 16 * 16
        for i in range(out.size // run):
            first = start + i * stride
            later = first + AHEAD * stride
            fetch(g + later * size_g)
            fetch(v + later * size)
            if not plain:
                fetch(u + later * size)
            for at in range(0, whole, 16):
                here = first + at
                vector(g + here * size_g, u + here * size, v + here * size, to + (i * run + at) * 4, m, s)
            for here in range(first + whole, first + run):
                x, y = load_g(g + here * size_g) * s, load_s(v + here * size)
                if plain:
                    z = y + x
                elif nesterov:
                    z = (y + x) + (load_s(u + here * size) + x) * m
                else:
                    z = y + fused(load_s(u + here * size), m, x)
                out[i * run + here - first] = abs(as_bfloat16(z)) if short else abs(z)

    return pick
