"""What is really handed to torch.distributed, counted apart from thinwire's own count."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch.distributed as dist

from thinwire.comm import process_group
from thinwire.comm.link import Kind, wire_bytes


@contextlib.contextmanager
def counted(group: dist.ProcessGroup | None) -> Iterator[list[float]]:
    """The bytes that this rank sends to a group meanwhile, in a list of one."""
    total, kept = [0.0], {name: getattr(dist, name) for name in ("all_reduce", "all_to_all_single", "broadcast")}
    gather, channel, talking = process_group._all_gather, process_group.ProcessGroup.exchange_text, [False]

    def watching(call: Any, kind: Kind, which: int) -> Any:
        def made(*args: Any, **kwargs: Any) -> Any:
            sparse = args[which].is_sparse  # DDP's own way, which the ledger says that it does not count
            if kwargs.get("group") is group and not talking[0] and not sparse:
                total[0] += wire_bytes(kind, args[which].nbytes, dist.get_world_size(group))
            return call(*args, **kwargs)

        return made

    def talked(*args: Any, **kwargs: Any) -> Any:  # control traffic is not counted
        talking[0] = True
        try:
            return channel(*args, **kwargs)
        finally:
            talking[0] = False

    process_group.ProcessGroup.exchange_text = talked
    dist.all_reduce = watching(kept["all_reduce"], "all_reduce", 0)
    dist.all_to_all_single = watching(kept["all_to_all_single"], "all_to_all", 1)
    dist.broadcast = watching(kept["broadcast"], "broadcast", 0)
    process_group._all_gather = watching(gather, "all_gather", 1)
    try:
        yield total
    finally:
        process_group._all_gather, process_group.ProcessGroup.exchange_text = gather, channel
        for name, call in kept.items():
            setattr(dist, name, call)
