"""What all ranks do together between steps: attach, a change of method, a load, detach. They end alike, or all say why.

What one rank does by itself is followed by a word to all, so an error there is one of all ranks and the group lives on.
An error in the middle of an exchange can't be told by another one: there the rank leaves, with a word in the store.
"""

import contextlib
from collections.abc import Generator
from types import TracebackType
from typing import Self

from thinwire.comm.process_group import NoAnswer, Talk, failed
from thinwire.comm.texts import is_known, known_to_all
from thinwire.core.errors import ThinwireError

ATTACH = ("attach()", "attach() is called by all ranks of a model, alike")
GRACE = 2.0
"""Seconds for the others to hear of an interrupt, which nobody wants to wait for."""
TOLD = 1000
"""Characters of an error that the others are told."""


class Together:
    """One such call; whatever leaves the ``with`` block is known to all ranks.

    Args:
        talk: the ranks; a collective, where there is one already.
        what: the call, for errors.
        way_out: what to do where a rank did not come, for errors.
    """

    def __init__(self, talk: Talk, what: str, way_out: str = "Restart from the last checkpoint") -> None:
        self.talk, self.what, self.way_out = talk, what, way_out

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None or is_known(error):
            return
        if isinstance(error, NoAnswer):
            raise known_to_all(failed(self.talk, self.what, error, self.way_out)) from error
        self.talk.leave(self._told(error))
        known_to_all(error)

    @contextlib.contextmanager
    def alone(self) -> Generator[None]:
        """Inside it this rank exchanges nothing; at its end all hear whether any of them raised something.

        Raises:
            ThinwireError: another rank did.
        """
        try:
            yield
        except BaseException as error:
            if not is_known(error):
                self._tell(error)
            raise
        for text in self.talk.everyone.exchange_text(""):
            if text:
                raise known_to_all(ThinwireError(text))

    def _tell(self, error: BaseException) -> None:
        patience = None if isinstance(error, Exception) else GRACE
        text = self._told(error)
        try:
            self.talk.everyone.exchange_text(text, patience)
        except (NoAnswer, ThinwireError) as reason:  # whoever ends the call leaves a word
            error.add_note(f"The other ranks could not be told: {reason}")
        else:
            known_to_all(error)

    def _told(self, error: BaseException) -> str:
        said = str(error) if isinstance(error, ThinwireError) else f"{type(error).__name__}: {error}"
        return f"{self.what} failed on rank {self.talk.everyone.rank}: {said[:TOLD]}"
