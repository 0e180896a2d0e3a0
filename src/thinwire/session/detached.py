"""Sessions that can no longer be used: after ``detach()`` only ledger and report work; a second detach does nothing.

If an error interrupts a change of method, the memory is only partly migrated, and the session takes no more steps.
"""

import contextlib
from collections.abc import Callable, Generator
from typing import Any, Never

from thinwire.core.errors import ThinwireError

NEEDS_A_MODEL = ("set_method", "state_dict", "load_state_dict", "load", "no_sync")


@contextlib.contextmanager
def changing(session: Any, what: str) -> Generator[None]:
    """Guard a change of a session: after an error in the body, the session only allows ``detach()``."""
    try:
        yield
    except BaseException as error:
        said = (
            f"{what} ended in the middle ({type(error).__name__}: {error!s:.300}), so what the session remembers is "
            "partly handed over; restart from the last checkpoint, or call wire.detach() and attach again"
        )
        for name in (*NEEDS_A_MODEL, "check", "begin_step"):
            setattr(session, name, _raises(said))
        raise


def leave_behind(session: Any) -> None:
    """Turn a session into a detached one."""
    for name in NEEDS_A_MODEL:
        setattr(session, name, _refused(name, session.step))
    session.detach = session.abandon = lambda: None


def _refused(name: str, step: int) -> Callable[..., Never]:
    return _raises(
        f"wire.{name}() after wire.detach(), at step {step}: the session is no longer attached to a model, and "
        "only its report() and ledger remain; call thinwire.attach() again and use what that answers"
    )


def _raises(said: str) -> Callable[..., Never]:
    def refuse(*_: object, **__: object) -> Never:
        raise ThinwireError(said)

    return refuse
