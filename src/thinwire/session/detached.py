"""Sessions that can't be used: one after ``detach()``, and one whose change of method was interrupted.

After ``detach()`` only ledger and report work, and a second detach does nothing. If an error interrupts a change of
method, the memory is only partly migrated, and the session takes no more steps.
"""

import contextlib
from collections.abc import Generator
from typing import Any, Never

from thinwire.core.errors import ThinwireError

NEEDS_A_MODEL = ("set_method", "state_dict", "load_state_dict", "load", "no_sync")


@contextlib.contextmanager
def changing(session: Any, what: str) -> Generator[None]:
    """Guard a change of a session: after an error in the body, the session only allows ``detach()``."""
    try:
        yield
    except BaseException as error:
        for name in (*NEEDS_A_MODEL, "check", "begin_step"):
            _refuse(
                session,
                name,
                f"{what} ended in the middle ({type(error).__name__}: {error!s:.300}), so what the session remembers "
                "is partly handed over; restart from the last checkpoint, or call wire.detach() and attach again",
            )
        raise


def leave_behind(session: Any) -> None:
    """Turn a session into a detached one."""
    for name in NEEDS_A_MODEL:
        _refuse(
            session,
            name,
            f"wire.{name}() after wire.detach(), at step {session.step}: the session is no longer attached to a model, "
            "and only its report() and ledger remain; call thinwire.attach() again and use what that answers",
        )
    session.detach = session.abandon = lambda: None


def _refuse(session: Any, name: str, text: str) -> None:
    def refuse(*_: object, **__: object) -> Never:
        raise ThinwireError(text)

    setattr(session, name, refuse)
