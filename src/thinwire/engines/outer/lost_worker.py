"""Decisions of the workers that are left about an exchange that broke.

They compare the anchor after an exchange has arrived. So if one of them has gone on to the next exchange, all have what
has arrived at one; and if all of them have it, none needs it again. Else it is repeated without the lost worker.
"""

from collections.abc import Callable, Sequence
from typing import Never, TypeAlias, cast

from thinwire.comm.collectives import Collective
from thinwire.comm.liveness import Lost
from thinwire.core.errors import ThinwireError
from thinwire.session.session import Session

SENDING, ARRIVED, CHECKING = "sending", "arrived", "checking"
"""The phases in which an exchange may break: not arrived everywhere, arrived here, and a comparison of inner steps."""
Regroup: TypeAlias = Callable[[Sequence[int], str, float], tuple[Collective, list[str]]]


def go_on(
    session: Session, regroup: Regroup | None, error: ThinwireError, inner: int, phase: str
) -> tuple[Collective, bool]:
    """Give the session the workers that are left, or raise the error.

    Args:
        regroup: see ``LocalRounds``.
        error: of the exchange that broke.
        inner: the inner steps that this worker has made.
        phase: one of the three above.

    Returns:
        The collective of those that are left, and True if what has arrived here is final.
    """
    lost = cast("Lost | None", error.lost)
    if lost is None or lost.raised:
        raise error
    if regroup is None:
        _raise(session, error, inner, lost.said)
    collective, words = regroup(lost.gone, f"{session.step} {inner} {phase}", session.timeout)
    told = [(int(step), steps, has) for step, steps, has in (word.split() for word in words)]
    if collective.world == session.collective.world:  # nobody is lost: some rank is late, or elsewhere
        _raise(session, error, inner, [(rank, steps) for rank, (_, steps, _) in enumerate(told)])
    final = phase == ARRIVED and all(has == ARRIVED for step, _, has in told if step == session.step)
    if max(step for step, *_ in told) > session.step and not final:
        raise ThinwireError(f"{error}; the other workers have made an outer step that this one can't make") from error
    session.regroup(collective)
    what = "had arrived" if final else "is repeated without it"
    session.ledger.note(
        f"inner step {inner}: a worker is lost ({lost}), {collective.world} are left, and this is rank "
        f"{collective.rank} of them; the exchange {what}"
    )
    return collective, final


def _raise(session: Session, error: ThinwireError, inner: int, said: Sequence[tuple[int, str]]) -> Never:
    """Raise the error of a failed exchange, or its reason, if ranks have made different numbers of inner steps."""
    if any(steps != str(inner) and steps.isdecimal() for _, steps in said):
        own = session.collective.everyone.rank
        raise different_steps(f"step {session.step}", sorted({(own, str(inner)), *said})) from error
    raise error


def different_steps(what: str, said: Sequence[tuple[int, str]]) -> ThinwireError:
    """Make the error for ranks that have made different numbers of inner steps."""
    others = ", ".join(f"rank {rank} {steps}" for rank, steps in said)
    return ThinwireError(
        f"{what}: ranks have made different numbers of inner steps ({others}), so some would wait for rounds that "
        "others have ended; step the inner optimizer equally often on all ranks"
    )
