"""After ``detach()``: the ledger and the report stay, a second detach does nothing, and the rest is refused."""

from collections.abc import Callable
from typing import Any, Never

from thinwire.tensors import ThinwireError

NEEDS_A_MODEL = ("set_method", "state_dict", "load_state_dict", "load", "no_sync")


def leave_behind(session: Any) -> None:
    """Make of a session one that is detached."""
    for name in NEEDS_A_MODEL:
        setattr(session, name, _refused(name, session.step))
    session.detach = session.abandon = lambda: None


def _refused(name: str, step: int) -> Callable[..., Never]:
    def refuse(*_: object, **__: object) -> Never:
        raise ThinwireError(
            f"wire.{name}() after wire.detach(), at step {step}: the session is no longer attached to a model, and "
            "only its report() and ledger remain; call thinwire.attach() again and use what that answers"
        )

    return refuse
