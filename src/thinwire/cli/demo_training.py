"""One worker of the demo: ordinary DDP training for a number of seconds."""

import logging
import os
import statistics
import time
from dataclasses import dataclass, field
from multiprocessing.queues import Queue
from typing import TypeAlias

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_

import thinwire
from thinwire.cli import text as demo_text
from thinwire.cli.demo_models import CharLM, loss_of
from thinwire.comm.link import Link

CLIP = 1.0
WARMUP_STEPS = 40


@dataclass(frozen=True)
class Settings:
    """Settings of one run of the demo; the cases differ in the method only."""

    seconds: float = 80.0
    link: str = "100mbit"
    workers: int = 2
    density: float = 0.001
    seed: int = 0
    batch: int = 8
    length: int = 32
    hidden: int = 512
    lr: float = 0.5
    evaluations: int = 10

    @property
    def wire(self) -> str:
        """The conditions of the figures, as shown in tables and plots."""
        return f"N = {self.workers} workers, emulated {Link.parse(self.link)}"

    def method(self, case: str) -> thinwire.Method:
        if case == "dense":
            return thinwire.dense()
        if case == "fp16":
            return thinwire.cast("float16")
        return thinwire.dgc(self.density, clip=CLIP, warmup=thinwire.Warmup(WARMUP_STEPS))

    def warmup(self, case: str) -> int:
        """Return the steps of the case's warm-up; 0 if it has none."""
        return warmup.steps if (warmup := self.method(case).warmup) else 0


@dataclass
class Point:
    """One evaluation of a case."""

    seconds: float
    step: int
    held_out_loss: float


@dataclass
class CaseResult:
    """The result of a case, as its first worker saw it."""

    case: str
    steps: int = 0
    points: list[Point] = field(default_factory=list[Point])
    step_seconds: list[float] = field(default_factory=list[float])
    warmup: int = 0  # steps until the method reaches its final density
    wire_bytes: float = 0.0  # of the last step
    wire_bytes_total: float = 0.0
    ratio: float = 1.0  # after warm-up, over all parameters
    ratio_compressed: float = 1.0
    split_ms: dict[str, float] = field(default_factory=dict[str, float])  # medians of the parts of a step
    report: str = ""

    @property
    def in_warmup(self) -> bool:
        """True if the run ended in the warm-up, so that bytes and ratio are those of the warm-up."""
        return self.steps <= self.warmup


Messages: TypeAlias = "Queue[tuple[float, int, float] | CaseResult]"
"""The first worker's seconds, step and loss after every step; its result at the end."""


def train(rank: int, case: str, settings: Settings, rendezvous: str, messages: Messages) -> None:
    """Train as ``rank``."""
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    logging.getLogger("thinwire").setLevel(logging.ERROR)  # the page has the ledger's notes, and bars fill the console
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=settings.workers)
    try:
        result = _train(rank, case, settings, messages)
    finally:
        dist.destroy_process_group()
    if rank == 0:
        messages.put(result)


def _train(rank: int, case: str, settings: Settings, messages: Messages) -> CaseResult:
    text = demo_text.load()
    torch.manual_seed(settings.seed)
    model = CharLM(len(text.vocabulary), hidden=settings.hidden)
    optimizer = torch.optim.SGD(model.parameters(), lr=settings.lr, momentum=0.9)
    ddp = DistributedDataParallel(model)
    method = settings.method(case)
    wire = thinwire.attach(ddp, method, optimizer=optimizer, emulate_link=settings.link)
    result = CaseResult(case, warmup=settings.warmup(case))
    held_out = text.held_out_batch(64, 128)
    alone = _seconds_alone(ddp, text.batch(0, rank, settings.batch, settings.length, settings.seed))
    optimizer.zero_grad()

    def evaluate(seconds: float) -> None:
        if rank == 0:
            torch.set_num_threads(os.cpu_count() or 1)
            with torch.no_grad():
                result.points.append(Point(seconds, result.steps, loss_of(model, held_out).item()))
            torch.set_num_threads(1)

    trained = 0.0
    evaluate(trained)
    go_on = torch.ones(1)
    while go_on.item():
        dist.barrier()  # the first worker's evaluation must not count as the others' training time
        started = time.perf_counter()
        loss = loss_of(ddp, text.batch(result.steps, rank, settings.batch, settings.length, settings.seed))
        optimizer.zero_grad()
        loss.backward()  # pyright: ignore[reportUnknownMemberType]
        if method.clip is None:
            clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        result.step_seconds.append(time.perf_counter() - started)
        trained += result.step_seconds[-1]
        result.steps += 1
        if rank == 0:
            messages.put((min(trained, settings.seconds), result.steps, loss.item()))
        if trained < settings.seconds and trained >= len(result.points) * settings.seconds / settings.evaluations:
            evaluate(trained)
        go_on.fill_(trained < settings.seconds)
        dist.broadcast(go_on, 0)
    evaluate(trained)
    rows = list(wire.ledger.rows)
    result.wire_bytes = rows[-1].wire_bytes
    result.wire_bytes_total = wire.ledger.wire_bytes
    after = rows[result.warmup :] or rows[-1:]
    result.ratio = statistics.median(row.dense_bytes / row.wire_bytes for row in after)
    if any(row.compressed_wire_bytes for row in after):
        result.ratio_compressed = statistics.median(
            row.compressed_dense_bytes / row.compressed_wire_bytes for row in after
        )
    result.split_ms = {
        "compute": alone * 1e3,
        "compress": statistics.median(row.send_seconds for row in after) * 1e3,
        "decompress": statistics.median(row.receive_seconds for row in after) * 1e3,
    }
    result.report = wire.report()
    wire.detach()
    return result


def _seconds_alone(ddp: DistributedDataParallel, batch: torch.Tensor) -> float:
    """Time a forward and a backward pass without an exchange: the median of three, after one warm-up pass."""
    seconds: list[float] = []
    for _ in range(4):
        started = time.perf_counter()
        with ddp.no_sync():
            loss_of(ddp, batch).backward()  # pyright: ignore[reportUnknownMemberType]
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[1:])
