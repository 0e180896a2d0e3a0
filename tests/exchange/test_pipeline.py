"""The journey: every engine, on every route, passes through the same functions."""

from unittest import mock

import pytest
import torch
import torch.distributed as dist

import thinwire
from tests.engines import models, sharded
from thinwire import Fsdp2Options, dgc, powersgd, scalecom, topk
from thinwire.comm.process_group import ProcessGroup
from thinwire.comm.simulated import Local
from thinwire.compressors import Quantize
from thinwire.core.interfaces import local_state
from thinwire.exchange import pipeline
from thinwire.exchange.routes.rows import reduced
from thinwire.exchange.states import TwoCopies
from thinwire.exchange.workers import Worker
from thinwire.memories import ErrorFeedback

SPIED = ("send", "route", "relay", "receive")
ONE_STAGE, TWO_STAGES = {"send", "route", "receive"}, set(SPIED)


class Spies:
    """Counts the calls of the four functions, and what routes they were given."""

    def __init__(self) -> None:
        self.called: set[str] = set()
        self.kinds: set[str] = set()
        self.patches = [mock.patch.object(pipeline, name, self._spy(name, getattr(pipeline, name))) for name in SPIED]

    def _spy(self, name, plain):
        def spy(first, *args, **kwargs):
            self.called.add(name)
            for bucket in first if isinstance(first, list) else [first]:
                self.kinds |= {type(route).__name__ for route in bucket.routes}
            return plain(first, *args, **kwargs)

        return spy

    def __enter__(self):
        for patch in self.patches:
            patch.start()
        return self

    def __exit__(self, *_):
        for patch in self.patches:
            patch.stop()


def _bare(rank, method):
    model, optimizer = models.build()
    wire = thinwire.attach(model, method, optimizer=optimizer, process_group=dist.group.WORLD)
    models.loss_of(model, models.batch(rank, 0)).backward()
    optimizer.step()
    wire.detach()


def _sharded(rank, replicas, shards, **options):
    mesh = sharded.mesh_of(replicas, shards)
    model, optimizer = sharded.build(mesh)
    method = topk(0.05) if replicas > 1 else thinwire.dense()
    options |= {"replicate": mesh["replicate"]} if replicas > 1 else {}
    wire = thinwire.attach(model, method, optimizer=optimizer, fsdp2=Fsdp2Options(**options))
    sharded.loss_of(model, sharded.data(rank, 0)).backward()
    optimizer.step()
    wire.detach()


def _torchft(rank):
    pytest.importorskip("torchft")
    from thinwire.integrations.torchft import CompressedProcessGroup

    class Inner(dist.ProcessGroup):
        pass

    group = CompressedProcessGroup(Inner(rank, 2), Quantize(8, rounding="stochastic"))
    x = torch.randn(5000, generator=torch.Generator().manual_seed(rank))
    before = x.clone()
    group._all_reduce(x, ProcessGroup(dist.group.WORLD))
    assert not torch.equal(x, before)


def _simulated(rank, method):
    model, optimizer = models.build()
    thinwire.simulate(model, method, optimizer=optimizer, batches=models.batch, loss=models.loss_of, workers=2, steps=1)


def _ddp(rank, method):
    models.train_ddp(rank, method, 1)[1].detach()


METHODS = {
    "all_gather": (dgc(0.05), {"Whole"}, ONE_STAGE),
    "all_reduce": (powersgd(1, min_compression_rate=0.0), {"Whole"}, ONE_STAGE),
    "two_phase": (dgc(0.05, route="two_phase"), {"TwoPhase"}, TWO_STAGES),
    "leader": (scalecom(0.05), {"LeaderRoute"}, TWO_STAGES),
}


def _each(rank):
    found = {}
    for route, (method, kinds, called) in METHODS.items():
        for engine, run in (("ddp", _ddp), ("bare", _bare), ("simulator", _simulated)):
            with Spies() as spies:
                run(rank, method)
            found[engine, route] = spies.called >= called and spies.kinds >= kinds
    others = {
        "replicas": (lambda: _sharded(rank, 2, 1), {"Whole"}),
        "reduce_scatter": (lambda: _sharded(rank, 1, 2, reduce_scatter=Quantize(8)), {"ReducedRows"}),
        "all_gather": (lambda: _sharded(rank, 1, 2, all_gather=Quantize(8)), {"GatheredRows"}),
        "torchft": (lambda: _torchft(rank), {"AllReducedRows"}),
    }
    for name, (run, kinds) in others.items():
        with Spies() as spies:
            run()
        found[name] = spies.called >= (TWO_STAGES if name == "torchft" else ONE_STAGE) and spies.kinds >= kinds
    return found


def test_all_engines_pass_through_the_pipeline(world2):
    for found in world2.run(_each, timeout=120.0):
        assert len(found) == 16
        assert all(found.values()), found


@pytest.mark.parametrize("scale", [1.0, 65536.0, 1000.0])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_a_reduced_row_keeps_the_loss_scale_of_its_own(world, scale):
    """In float16 the own row must not be divided by the scale: small gradients would be gone."""
    grads = [(1e-8 * torch.randn(world * 500) * scale).to(torch.float16) for _ in range(world)]
    memory, outs = ErrorFeedback(), []
    buckets, inboxes = [], []
    for rank, peer in enumerate(Local.of(world)):
        states = {"w": TwoCopies.of(local_state(memory, torch.empty((world - 1) * 500)))}
        worker = Worker(rank, local=states)
        rows = grads[rank].clone().view(world, 500)
        buckets.append(reduced("w", Quantize(8), memory, rows, rank, 0, scale))
        outbox = pipeline.send(buckets[-1], [rows.view(-1)], worker, 0, [True], scale, clear=False)
        assert world == 1 or sum(message.nbytes for message in outbox.messages) < rows.nbytes
        inboxes += pipeline.route([buckets[-1]], [outbox.messages], peer, 0)
    for bucket, inbox in zip(buckets, inboxes, strict=True):
        out = torch.full((500,), torch.nan, dtype=torch.float16)
        pipeline.receive(bucket, inbox, [out], 0, 0, scale)
        outs.append(out)
    exact = sum(grad.double() for grad in grads).view(world, 500)
    if scale > 1.0:
        error = (torch.stack(outs).double() - exact).norm() / exact.norm()
        assert (0.0 if world == 1 else 1e-6) <= error < 0.02
    assert torch.stack(outs).isfinite().all()
