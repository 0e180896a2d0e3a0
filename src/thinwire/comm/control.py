"""Collective calls between steps: attach, a change of method, a load, detach. All ranks succeed or all raise.

After a part that each rank does alone, the ranks exchange a text, so an error on one rank is raised on all and the
group stays usable. After an error in the middle of an exchange the rank leaves, with a message in the store.
"""

import contextlib
from collections.abc import Generator
from typing import Self

from thinwire.comm.collectives import ControlChannel, NoAnswer, failed
from thinwire.comm.texts import is_known, known_to_all
from thinwire.core.errors import ThinwireError

ATTACH = ("attach()", "attach() is called by all ranks of a model, alike")
GRACE = 2.0
"""Seconds to wait for the other ranks when this one was interrupted (Ctrl-C)."""
TOLD = 1000
"""Characters of an error that are sent to the other ranks."""


class Together:
    """One such call, named ``what`` in errors: every rank learns of an error that leaves the ``with`` block."""

    def __init__(self, channel: ControlChannel, what: str, way_out: str = "Restart from the last checkpoint") -> None:
        self.channel, self.what, self.way_out = channel, what, way_out

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _: object, error: BaseException | None, trace: object) -> None:
        if error is None or is_known(error):
            return
        if isinstance(error, NoAnswer):
            raise known_to_all(failed(self.channel, self.what, error, self.way_out)) from error
        self.channel.leave(self._text(error))
        known_to_all(error)

    @contextlib.contextmanager
    def alone(self) -> Generator[None]:
        """Run a part in which this rank exchanges nothing; afterwards an error on any rank is raised on all."""
        try:
            yield
        except BaseException as error:
            if not is_known(error):
                self._send(error)
            raise
        for text in self.channel.everyone.exchange_text(""):
            if text:
                raise known_to_all(ThinwireError(text))

    def _send(self, error: BaseException) -> None:
        patience = None if isinstance(error, Exception) else GRACE
        text = self._text(error)
        try:
            self.channel.everyone.exchange_text(text, patience)
        except (NoAnswer, ThinwireError) as reason:  # ``__exit__`` leaves the message in the store
            error.add_note(f"The other ranks could not be told: {reason}")
        else:
            known_to_all(error)

    def _text(self, error: BaseException) -> str:
        said = str(error) if isinstance(error, ThinwireError) else f"{type(error).__name__}: {error}"
        return f"{self.what} failed on rank {self.channel.everyone.rank}: {said[:TOLD]}"
