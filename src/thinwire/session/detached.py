"""A session that can't be used: after ``detach()`` only ledger and report stay, and a second detach does nothing.

One whose change of method ended in the middle has its memory partly handed over, and takes no step.
"""

import contextlib
from collections.abc import Callable, Generator
from typing import Any, Never

from thinwire.core.errors import ThinwireError

NEEDS_A_MODEL = ("set_method", "state_dict", "load_state_dict", "load", "no_sync")


@contextlib.contextmanager
def changing(session: Any, what: str) -> Generator[None]:
    """Inside it a session is changed; where an error ends that, the session refuses all but to be detached."""
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
    """Make of a session one that is detached."""
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
