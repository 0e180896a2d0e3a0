"""Compensation and compression of each piece; in one pass over memory if a threshold selects the elements."""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from thinwire.core import Context, Decompressed, Payload, ThinwireError, flat
from thinwire.core.capabilities import Thresholded
from thinwire.core.loops import Cut, Found, Kernels, Pass, Selection, smallest
from thinwire.core.memory_capabilities import traits_of
from thinwire.exchange.units import Piece, Unit
from thinwire.exchange.workers import Worker


def select(
    units: Sequence[Unit],
    pieces: Sequence[Piece],
    grads: Sequence[Tensor],
    worker: Worker,
    contexts: Sequence[Context],
    scale: float,
    clear: bool = True,
) -> dict[int, Found]:
    """Compensate all pieces that the fused kernel can handle, and return the elements that each of them sends.

    Their next states are written; the compensated tensor is the new residual. ``clear``: zero the gradients afterwards.
    """
    works: dict[int, Pass] = {}
    selections: dict[int, Selection] = {}
    for j, (piece, ctx) in enumerate(zip(pieces, contexts, strict=True)):
        unit = units[piece.unit]
        selector = unit.compressor
        selection = selector.sampling(piece.of(unit.own).shape, ctx) if isinstance(selector, Thresholded) else None
        work = None if selection is None else _pass(unit, piece, grads[piece.unit], worker, scale, clear)
        if selection is not None and work is not None and worker.kernels.runs(work):
            works[j], selections[j] = work, selection
    kernels = worker.kernels
    cuts = [s.cut(kernels.sample(works[j], s.start, s.stride, s.run), kernels) for j, s in selections.items()]
    for work, cut in zip(works.values(), cuts, strict=True):
        if cut.threshold.dtype != work.new_residual.dtype:  # kernels compare bits
            raise ThinwireError(
                f"a selection's threshold is {cut.threshold.dtype}, and the residual {work.new_residual.dtype}; "
                "give it the dtype of what was sampled"
            )
    return dict(zip(works, kernels.accumulate(list(works.values()), cuts), strict=True))


def warm_up_kernels(units: Sequence[Unit], kernels: Kernels, clear: bool = True) -> None:
    """Compile the kernels that will run, so that no training step waits for it. ``clear``: see ``select``."""
    kinds = {
        (traits_of(unit.memory).accumulation, unit.own.dtype, unit.like.dtype, unit.param.device) for unit in units
    }
    for rule, grad, state, device in kinds:
        if rule is not None:
            v, new_v, u, new_u = (torch.zeros(65, dtype=state, device=device) for _ in range(4))
            momentum = (None, None) if rule.momentum is None else (u, new_u)
            work = Pass(rule, torch.zeros(65, dtype=grad, device=device), v, new_v, *momentum, clear=clear)
            if kernels.runs(work):
                threshold = kernels.kth(kernels.sample(work, 0, 4, 2), 1).clamp_(min=smallest(state))
                kernels.kth(torch.zeros(2**14, dtype=state, device=device), 1)  # long samples use another kernel
                kernels.accumulate([work], [Cut(threshold, 65)])
                found, values = kernels.look(new_v, Cut(threshold, 65))
                coded = kernels.encode_indices(found, 65)
                kernels.decode_indices(coded, 65, 65)
                kernels.gather([coded], [values.float()], 65, 1.0)
                kernels.largest(values, 1)
                kernels.merge([found], [kernels.without_repeats(found, values)], 1.0)
                kernels.coordinates(found, (65,))
                kernels.add(torch.zeros_like(new_v), found, values, 1.0)


def _pass(unit: Unit, piece: Piece, grad: Tensor, worker: Worker, scale: float, clear: bool) -> Pass | None:
    """Return arguments for the fused kernel; None if the memory can't be fused now, or if strides or dtypes differ."""
    traits, local = traits_of(unit.memory), worker.local[unit.name]
    rule = traits.accumulation
    if rule is None or "pending_residual" in local.now:
        return None
    pending, momentum = traits.fused_slots
    like = [(t.stride(), t.dtype) for t in (local.now[pending], local.next[pending])]
    if like[0] != like[1] or grad.stride() != like[0][0]:
        return None
    now, new = piece.of_state(local.now), piece.of_state(local.next)
    u, new_u = (flat(state[momentum]) if rule.momentum is not None else None for state in (now, new))
    return Pass(rule, flat(piece.of(grad)), flat(now[pending]), flat(new[pending]), u, new_u, scale, clear)


def compress(
    unit: Unit, piece: Piece, grad: Tensor, worker: Worker, ctx: Context, chosen: Found | None, loss_scale: float
) -> tuple[Tensor, Payload, Decompressed | None]:
    """Return one piece's compensated tensor, its payload, and what the receivers decode from it.

    The last is None if no memory or measurement needs it, since decoding takes time. ``chosen``: the elements, if
    ``select`` has compensated and selected already.
    """
    local = worker.local[unit.name]
    now, new, known = (piece.of_state(state) for state in (local.now, local.next, unit.shared.now))
    if chosen is not None:
        x = new[traits_of(unit.memory).fused_slots[0]]
        selector = cast(Thresholded, unit.compressor)  # since ``select`` used its sampling
        payload = selector.encode(chosen[0], unit.held(chosen[1], loss_scale), x.numel(), ctx)
        own = selector.own(payload, chosen[0], x, known, ctx)
    else:
        x = unit.memory.compensate(piece.of(grad), piece.of(unit.own), known | now, new, 1.0 / loss_scale, ctx)
        if (pending := now.get("pending_residual")) is not None:  # the residual that an earlier method left
            # not in place: x may be the momentum buffer itself, which must not include the residual
            x = torch.add(x, pending, alpha=1.0 if unit.memory.stateful else loss_scale).to(x.dtype)
        payload = unit.compressor.compress(unit.held(x, loss_scale), known, ctx)
        watched = unit.memory.stateful or worker.looks(unit)
        own = unit.compressor.decompress(payload, x, known, ctx) if watched else None
    return x, payload, own
