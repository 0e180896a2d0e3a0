"""Survivors: the ranks of a process group that go on without those that are lost.

Each rank whose exchange has failed writes to the group's store what it has of the exchange. It waits for the others,
except for those whose connection is closed. The first to see all words decides who the survivors are; all read that.
"""

import contextlib
import json
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Any, cast

import torch.distributed as dist

from thinwire.core.errors import ThinwireError

SURVIVORS = "thinwire/survivors"
PAUSE = 0.05
"""Seconds between two looks into the store."""


def survivors(
    group: dist.ProcessGroup, gone: Sequence[int], word: str, timeout: float
) -> tuple[dist.ProcessGroup, list[str]]:
    """Make a process group of the ranks that are left, in their old order; returns it, and the words of all of them.

    Args:
        gone: ranks that have closed their connection.
        word: a text for the other survivors.
        timeout: seconds to wait for ranks that are neither gone nor have failed yet.

    Raises:
        ThinwireError: the store is gone, or the others have decided to go on without this rank.
    """
    rank, ranks = dist.get_rank(group), dist.get_process_group_ranks(group)
    store = cast(Any, group).get_group_store()
    for attempt in range(len(ranks)):  # another rank may be lost meanwhile
        try:
            left = _decided(store, rank, len(ranks), gone, word, attempt, timeout)
            words = [store.get(_key(attempt, r)).decode() for r in left]
        except RuntimeError as error:
            raise ThinwireError(
                "the store of the process group does not answer, so the workers that are left can't find each other; "
                f"let it outlive them: start with torchrun, whose agent holds it ({error!s:.100})"
            ) from error
        if rank not in left:
            raise ThinwireError(
                f"the other workers did not hear from rank {rank} in time, and have gone on without it; end this "
                "process, and let it join when they attach again"
            )
        patience, chosen = timedelta(seconds=timeout), [ranks[r] for r in left]
        with contextlib.suppress(RuntimeError):
            made = dist.new_group(chosen, patience, backend="gloo", use_local_synchronization=True)
            return cast(dist.ProcessGroup, made), words
    raise ThinwireError("the workers that are left can't connect to each other; restart from the last checkpoint")


def _decided(
    store: Any, rank: int, world: int, gone: Sequence[int], word: str, attempt: int, timeout: float
) -> list[int]:
    """Return the ranks that are left, as the first of them has decided."""
    store.set(_key(attempt, rank), word)
    deadline, decision = time.monotonic() + timeout, f"{SURVIVORS}/{attempt}"
    while True:
        heard = [r for r in range(world) if store.check([_key(attempt, r)])]
        if set(heard) | set(gone) >= set(range(world)) or store.check([decision]) or time.monotonic() > deadline:
            return json.loads(store.compare_set(decision, "", json.dumps(heard)))
        time.sleep(PAUSE)


def _key(attempt: int, rank: int) -> str:
    return f"thinwire/left/{attempt}/{rank}"
