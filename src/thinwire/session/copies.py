"""Objects that belong to one run of one process, and so can't be copied or pickled."""

from typing import Any, Never

from thinwire.core.errors import ThinwireError


class OfThisRun:
    """An object that can't be copied or pickled.

    Raises:
        ThinwireError: code tries it; the error names what to save instead.
    """

    def __reduce_ex__(self, protocol: Any) -> Never:
        raise ThinwireError(
            "a session holds the process group and the hooks of this run, so it can be neither pickled nor copied; "
            'save wire.state_dict(): with torch.save({"wire": wire.state_dict()}, path), a file for each rank, or with '
            'torch.distributed.checkpoint.save({"wire": wire}), which asks for it itself'
        )
