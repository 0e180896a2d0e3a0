"""Blocks whose parameters lie in CPU memory, and are on the device only while they compute.

Before a block's forward pass its parameters are copied to the device. The updates of the steps since the last time are
applied on the way, the new values are copied back, and the block computes with perturbed copies. On CUDA the next block
is copied meanwhile, on a stream of its own. Where the ranks of a node hold the same parameters, each keeps one slice of
them in CPU memory and copies that alone, and the ranks gather the slices: memory and copies of the host are divided by
the number of ranks.

Source: L. Wang et al., "ZO2: Scalable zeroth-order fine-tuning for extremely large language models with limited GPU
memory", 2025, arXiv 2503.12668, algorithm 2.

Departures: the two passes of a step run one after the other, so a block goes up twice a step and down once; with PertP,
where a rank makes one pass, once each.
"""

import contextlib
from collections.abc import Generator, Sequence
from functools import partial
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from thinwire.comm.process_group import ProcessGroup
from thinwire.core.errors import ThinwireError
from thinwire.core.tensors import flat, is_dense
from thinwire.engines.zeroth.directions import Trained, Update, apply, perturb


class Run:
    """Parameters of a block that have one dtype and are all trained or all frozen, one after the other in memory."""

    def __init__(self, params: Sequence[nn.Parameter], parts: Sequence[Trained | None], node: "Node") -> None:
        self.params, self.parts, self.node = params, parts, node
        self.layouts = [(param.shape, param.stride()) for param in params]
        self.sizes = [param.numel() for param in params]
        self.trained = parts[0] is not None
        whole = torch.cat([flat(param.data).cpu() for param in params])
        self.host = node.slice_of(whole).clone()
        if node.device.type == "cuda":
            self.host = self.host.pin_memory()
        self.release()

    def views(self, buffer: Tensor) -> list[Tensor]:
        """Return the parameters in ``buffer``, as they are shaped."""
        return [part.as_strided(*layout) for part, layout in zip(self._cut(buffer), self.layouts, strict=True)]

    def show(self, buffer: Tensor) -> None:
        """Let the parameters be those in ``buffer``."""
        for param, view in zip(self.params, self.views(buffer), strict=True):
            param.data = view

    def release(self) -> None:
        """Let the parameters be those in CPU memory, or empty where this rank has a slice only."""
        if self.node.world == 1:
            self.show(self.host)
        else:
            for param in self.params:
                param.data = param.data.new_empty(0)

    def each(self, buffer: Tensor) -> list[tuple[Trained, Tensor]]:
        """Return the trained parameters in ``buffer``, 1-D."""
        return [(one, part) for one, part in zip(self.parts, self._cut(buffer), strict=True) if one is not None]

    def _cut(self, buffer: Tensor) -> Sequence[Tensor]:
        return cast(Any, buffer[: sum(self.sizes)]).split(self.sizes)


class Node:
    """The device of this rank, and the ranks that share its CPU memory."""

    def __init__(self, device: torch.device, group: dist.ProcessGroup | None, timeout: float) -> None:
        self.device, self.timeout = device, timeout
        self.collective = None if group is None else ProcessGroup(group, timeout)
        self.world = 1 if self.collective is None else self.collective.world
        self.rank = 0 if self.collective is None else self.collective.rank
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    @property
    def sent(self) -> float:
        """Bytes that this rank has sent within the node."""
        return 0.0 if self.collective is None else self.collective.sent

    def slice_of(self, whole: Tensor) -> Tensor:
        """Return this rank's slice; the last one is padded."""
        size = -(-whole.numel() // self.world)
        part = whole[self.rank * size : (self.rank + 1) * size]
        return nn.functional.pad(part, (0, size - part.numel())) if part.numel() < size else part

    def up(self, host: Tensor) -> Tensor:
        """Return the whole of what the node's ranks hold, on the device."""
        mine = torch.empty_like(host, device=self.device).copy_(host, non_blocking=True)
        if self.collective is None:
            return mine
        gathered = self.collective.all_gather(mine.view(torch.uint8)).wait(self.timeout)
        return gathered.view(-1).view(host.dtype)

    def down(self, whole: Tensor, host: Tensor) -> None:
        """Write this rank's slice of ``whole`` to CPU memory."""
        with self.aside(whole):
            host.copy_(self.slice_of(whole), non_blocking=True)

    @contextlib.contextmanager
    def aside(self, *used: Tensor) -> Generator[None]:
        """Run copies on the stream for copies, after what has been queued."""
        if self.stream is None:
            yield
            return
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            yield
        for tensor in used:
            tensor.record_stream(self.stream)

    def join(self, *made: Tensor) -> None:
        """Let what comes next wait for the copies."""
        if self.stream is not None:
            here = torch.cuda.current_stream(self.device)
            here.wait_stream(self.stream)
            for tensor in made:
                tensor.record_stream(here)


class Block:
    """One block: its runs, the updates that it still has to get, and its copy on the device while there is one."""

    def __init__(self, runs: Sequence[Run], node: Node, seed: int) -> None:
        self.runs, self.node, self.seed = runs, node, seed
        self.pending: list[Update] = []
        self._coming: list[Tensor] | None = None

    def fetch(self) -> None:
        """Start to copy the block to the device."""
        if self._coming is None:
            with self.node.aside():
                self._coming = [self.node.up(run.host) for run in self.runs]

    def current(self) -> list[Tensor]:
        """Return each run on the device, with all updates applied, there and in CPU memory."""
        self.fetch()
        buffers, self._coming = self._coming or [], None
        self.node.join(*buffers)
        if self.pending:
            for run, buffer in zip(self.runs, buffers, strict=True):
                if run.trained:
                    for one, theta in run.each(buffer):
                        apply(theta, self.pending, self.seed, one)
                    self.node.down(buffer, run.host)
            self.pending = []
        return buffers

    def enter(self, aim: tuple[float, int] | None) -> None:
        """Let the block compute, with perturbed parameters if ``aim`` gives a scale and a direction."""
        for run, buffer in zip(self.runs, self.current(), strict=True):
            if aim is None or not run.trained:
                run.show(buffer)
                continue
            scratch = torch.empty_like(buffer)
            for (one, theta), (_, out) in zip(run.each(buffer), run.each(scratch), strict=True):
                perturb(theta, aim[0], self.seed, aim[1], one.number, out)
            run.show(scratch)

    def leave(self) -> None:
        """Free the copy on the device."""
        for run in self.runs:
            run.release()


class Offload:
    """The blocks of a model, in the order in which they compute.

    Raises:
        ThinwireError: a parameter belongs to two blocks, or to a block and the rest of the model.
    """

    def __init__(
        self, model: nn.Module, blocks: Sequence[nn.Module], parts: Sequence[Trained], seed: int, node: Node
    ) -> None:
        check_blocks(model, blocks)
        self.node = node
        self.aim: tuple[float, int] | None = None
        """The scale and the direction of the pass that is under way."""
        known = {id(one.param): one for one in parts}
        held: set[int] = set()
        self.blocks: list[Block] = []
        for block in blocks:
            runs: dict[tuple[torch.dtype, bool], list[nn.Parameter]] = {}
            for param in block.parameters():
                runs.setdefault((param.dtype, id(param) in known), []).append(param)
                held.add(id(param))
            made = [Run(params, [known.get(id(param)) for param in params], node) for params in runs.values()]
            self.blocks.append(Block(made, node, seed))
        self.resident = [one for one in parts if id(one.param) not in held]
        for param in model.parameters():
            if id(param) not in held:
                param.data = param.data.to(node.device)
        for module in model.modules():
            for name, buffer in list(module.named_buffers(recurse=False)):
                setattr(module, name, buffer.to(node.device))
        self._hooks: list[Any] = []
        for i, block in enumerate(blocks):
            self._hooks.append(block.register_forward_pre_hook(partial(self._before, i)))
            self._hooks.append(block.register_forward_hook(partial(self._after, i), always_call=True))

    def _before(self, i: int, *_: Any) -> None:
        self.blocks[i].enter(self.aim)
        if self.node.stream is not None and i + 1 < len(self.blocks):
            self.blocks[i + 1].fetch()

    def _after(self, i: int, *_: Any) -> None:
        self.blocks[i].leave()

    def update(self, update: Update) -> None:
        """Let every block get this update the next time that it goes up."""
        for block in self.blocks:
            block.pending.append(update)

    def flush(self) -> None:
        """Apply all updates, and let the model's parameters be those in CPU memory, all of them."""
        for block in self.blocks:
            buffers = block.current()
            if self.node.world > 1:
                for run, buffer in zip(block.runs, buffers, strict=True):
                    run.show(buffer.cpu())
        if self.node.stream is not None:
            self.node.stream.synchronize()

    def close(self) -> None:
        """Let go of the model. Its parameters stay in CPU memory, those of blocks, and on the device, the others."""
        self.flush()
        for hook in self._hooks:
            hook.remove()


def check_blocks(model: nn.Module, blocks: Sequence[nn.Module]) -> None:
    """Check that each block is a part of the model, and has its parameters for itself.

    Raises:
        ThinwireError: one is not, or has not.
    """
    modules: list[tuple[str, nn.Module]] = [*model.named_modules()]  # pyright: ignore[reportUnknownArgumentType]
    names = {id(module): name for name, module in modules}
    owner: dict[int, int] = {}
    inside: set[int] = set()
    for i, block in enumerate(blocks):
        if id(block) not in names:
            raise ThinwireError(
                f"blocks[{i}] is {type(block).__name__}, and no module of the model; pass modules of it that run one "
                "after the other, e.g. blocks=model.transformer.h"
            )
        inside |= {id(module) for module in block.modules()}
        for name, param in block.named_parameters():
            if owner.setdefault(id(param), i) != i:
                raise ThinwireError(
                    f"parameter {names[id(block)]}.{name} is in blocks {owner[id(param)]} and {i}; leave one of them "
                    "out of blocks, so that the parameter stays on the device"
                )
            if not is_dense(param):
                raise ThinwireError(
                    f"parameter {names[id(block)]}.{name} has strides {tuple(param.stride())}, which leave gaps; use "
                    "contiguous()"
                )
    for name, module in modules:
        own: list[tuple[str, nn.Parameter]] = [*module.named_parameters(recurse=False)]
        for key, param in own:
            if id(module) not in inside and id(param) in owner:
                raise ThinwireError(
                    f"parameter {name}.{key} is also in blocks[{owner[id(param)]}], whose parameters leave the device; "
                    "leave that block out, or untie the two"
                )
