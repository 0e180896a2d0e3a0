"""Two phases: conservation, an exact second selection, any size of unit, and bytes that do not grow with the world."""

import pytest
import torch

from tests.engines.models import simulated
from thinwire import Method, ThinwireError, Warmup, dgc, topk
from thinwire.comm.link import Link
from thinwire.comm.simulated import Local
from thinwire.compressors.sparse import TopK
from thinwire.core import Context
from thinwire.core.capabilities import compress_sparse
from thinwire.core.memory_capabilities import Absorbed
from thinwire.core.tensors import Sparse
from thinwire.exchange import pipeline
from thinwire.exchange.buckets import Routing, plan_bucket
from thinwire.exchange.receiving import added
from thinwire.exchange.routes.two_phase import cut, without
from thinwire.exchange.units import resolve, set_stage
from thinwire.exchange.workers import Worker

SHAPES = {"w": (30, 7), "empty": (0, 5), "b": (3,), "one": (1, 1), "v": (11, 13), "a": (1,)}

CTX = Context(seed=0, step=0, unit="w", rank=0)


def units_of(method, world, shapes=SHAPES, dtype=torch.float64, device="cpu"):
    named = [(name, torch.zeros(shape, dtype=dtype, device=device)) for name, shape in shapes.items()]
    units = resolve(named, method, dict.fromkeys(shapes, Absorbed(0.9)) if method.absorbs else {})
    set_stage(units, None, world, method.route, method.second_stage_density_ratio)
    return units


def journey(method, world, steps, heads=None):
    """The means of all steps and what the workers hold, for random gradients; ``heads`` is 1 where they are summed."""
    units = units_of(method, world)
    bucket = plan_bucket(units, world, Routing(method.route, method.second_stage_density_ratio))
    assert bucket.relays
    workers = [Worker(rank) for rank in range(world)]
    for worker in workers:
        worker.local = {unit.name: unit.fresh_local() for unit in units}
    compensated, got = {u.name: 0 for u in units}, {u.name: 0 for u in units}
    for step in range(steps):
        peers, inboxes = Local.of(world), []
        for worker, peer in zip(workers, peers, strict=True):
            grads = [torch.randn_like(unit.param) for unit in units]
            for unit, grad in zip(units, grads, strict=True):
                u = worker.local[unit.name].now.get("momentum")
                compensated[unit.name] = compensated[unit.name] + grad + (0 if u is None else unit.memory.momentum * u)
            outbox = pipeline.send(bucket, grads, worker, step, [True] * len(units))
            inboxes += pipeline.route([bucket], [outbox.messages], peer, step)
        inboxes = [pipeline.relay(bucket, i, w, step, p) for i, w, p in zip(inboxes, workers, peers, strict=True)]
        results = []
        for inbox in inboxes:
            outs = [torch.full_like(unit.param, torch.nan) for unit in units]
            status = pipeline.receive(bucket, inbox, outs, 0, step)[0]
            assert status.used.shape == status.nonfinite.shape == (heads or world, len(bucket.routes[0].units))
            assert status.used.all()
            assert not status.nonfinite.any()
            results.append(outs)
        for unit, *means in zip(units, *results, strict=True):
            assert all(torch.equal(mean, means[0]) for mean in means)
            got[unit.name] = got[unit.name] + means[0]
            unit.shared.commit()
            for worker in workers:
                worker.local[unit.name].commit()
    return bucket, workers, compensated, got


@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize(
    "method",
    [
        topk(0.1, route="two_phase"),
        topk(0.1, route="two_phase", values="int4", second_stage_density_ratio=3.0),
        topk(0.05, route="two_phase", values="float16", selection="sampled"),
        dgc(0.1, route="two_phase", masking=False),
        dgc(0.02, route="two_phase", masking=True),
    ],
    ids=["topk", "int4", "float16", "dgc", "dgc-masking"],
)
def test_nothing_is_lost(method, world):
    """The mean of what was applied, times N, and all residuals, are what was compensated: also what the owners kept."""
    bucket, workers, compensated, got = journey(method, world, 12)
    for unit in bucket.units:
        residuals = [w.local[unit.name].now["residual"] for w in workers if "residual" in w.local[unit.name].now]
        if residuals or not unit.shared.now:
            torch.testing.assert_close(
                world * got[unit.name] + sum(residuals), compensated[unit.name], rtol=0, atol=1e-11
            )
        if unit.name in ("w", "v"):
            assert sum(float(r.abs().sum()) for r in residuals) > 0


def test_the_owner_keeps_what_it_could_not_pass_on():
    """Without it the residuals would fall short: so the law above can fail."""
    bucket, workers, compensated, got = journey(topk(0.1, route="two_phase"), 4, 1)
    sent = {
        u.name: (compensated[u.name] - sum(w.local[u.name].now["residual"] for w in workers)) for u in bucket.units[:1]
    }
    supports = [int((workers[r].local["w"].now["residual"] == 0).sum()) for r in range(4)]
    assert (sent["w"] != 0).sum() <= 2 + sum(supports)
    torch.testing.assert_close(sent["w"], 4 * got["w"], rtol=0, atol=1e-12)


@pytest.mark.parametrize("world", [2, 3])
def test_the_second_selection_is_exact(world):
    """Of each piece, the k largest of the mean of what was sent, lower index first."""
    torch.manual_seed(3)
    x = [torch.randint(-4, 5, (1, 40)).double() for _ in range(world)]
    one = TopK(0.2, selection="exact")
    parts = [one.decompress(one.compress(t, {}, CTX), t, {}, CTX) for t in x]
    total = torch.zeros(1, 40, dtype=torch.float64)
    for part in parts:
        part.add_to(total)
    payloads = [(rank, one.compress(t, {}, CTX)) for rank, t in enumerate(x)]
    there, values = added(one, payloads, x[0], {}, CTX)
    mean = Sparse(there, values, 1.0)
    dense = torch.full_like(total, torch.nan)
    mean.write_to(dense)
    assert torch.equal(dense, total)
    again = one.scaled_density(0.5)
    sent = again.decompress(compress_sparse(again, mean, x[0], {}, CTX), x[0], {}, CTX)
    direct = again.decompress(again.compress(total, {}, CTX), total, {}, CTX)
    assert torch.equal(sent.entries()[0], direct.entries()[0])
    rest = torch.full_like(total, torch.nan)
    without(mean, sent).write_to(rest)
    sent.add_to(rest)
    assert torch.equal(rest, total)


@pytest.mark.parametrize("world", [1, 2, 3, 7, 64, 500])
def test_pieces_cover_every_element_once(world):
    units = units_of(topk(0.1, route="two_phase"), world)
    chosen = list(range(len(units)))
    owned = cut(units, chosen, world)
    assert sum(map(len, owned)) <= len(units) + world - 1
    seen = {i: torch.zeros(units[i].param.numel()) for i in chosen}
    for pieces in owned:
        for piece in pieces:
            part = piece.of(seen[piece.unit])
            assert part.numel() > 0
            part.add_(1)
    assert all((count == 1).all() for count in seen.values())
    other = cut(units[::-1], chosen, world)
    named = [[piece.key(units[piece.unit].name) for piece in pieces] for pieces in owned]
    assert [[piece.key(units[::-1][piece.unit].name) for piece in pieces] for pieces in other] == named


def test_bytes_do_not_grow_with_the_world():
    """A transformer of 85 million parameters in one bucket; computed on meta tensors."""
    block = {"qkv": (2304, 768), "out": (768, 768), "up": (3072, 768), "down": (768, 3072), "norm": (768,)}
    shapes = {f"{i}.{name}": shape for i in range(12) for name, shape in block.items()}

    def sent(world, method):
        units = units_of(method, world, shapes, torch.float32, "meta")
        return plan_bucket(units, world, Routing(method.route, method.second_stage_density_ratio)).wire_bytes(world)[0]

    for density in (0.01, 0.001):
        two = {world: sent(world, dgc(density, route="two_phase")) for world in (2, 16, 128, 1024)}
        assert two[1024] <= 1.2 * two[16]
        assert two[16] < sent(16, dgc(density)) / 6
        assert two[2] <= 1.01 * sent(2, dgc(density))


@pytest.mark.parametrize("workers", [1, 2, 3, 4])
def test_it_learns(workers):
    expected = simulated(topk(0.05), workers, 25)[1]
    result = simulated(topk(0.05, route="two_phase"), workers, 25)[1]
    assert abs(result.losses[-1] - expected.losses[-1]) < 0.05 * expected.losses[0]
    assert result.ledger.rows[0].error > 0
    if workers > 2:
        assert result.ledger.wire_bytes < expected.ledger.wire_bytes < result.ledger.dense_bytes


def test_a_warmup_stage_that_two_phases_carry():
    """Where an all-gather would send more than dense, half the density and both phases still send less."""
    method = topk(0.01, warmup=Warmup(4, (0.25,)), route="two_phase")
    assert not any("sent dense" in note for note in simulated(method, 16, 2)[1].ledger.notes)
    gathered = simulated(topk(0.01, warmup=Warmup(4, (0.25,))), 16, 2)[1]
    assert any("sent dense at warm-up density 0.25" in note for note in gathered.ledger.notes)


def test_auto_takes_the_faster_route():
    def relays(world, link, shape=(400, 400)):
        units = units_of(topk(0.01, route="auto"), world, {"w": shape})
        return plan_bucket(units, world, Routing("auto", link=link)).relays

    assert relays(16, Link(1e8))
    assert not relays(2, Link(1e8, 1e-3)), "the same bytes, and twice the messages"
    assert not relays(16, Link(1e10, 1e-2)), "latency counts"
    result = simulated(topk(0.05, route="auto"), 8, 3)[1]
    assert any("routes are chosen for a link of 1 Gb/s, 0.1 ms" in note for note in result.ledger.notes)
    assert "two_phase" in str(result.ledger.notes) or "all_gather" in str(result.ledger.notes)


def test_route_in_json():
    method = dgc(0.01, route="two_phase", second_stage_density_ratio=2.0)
    assert Method.from_json(method.to_json()) == method
    with pytest.raises(ThinwireError, match="route is 'ring'; choose one of all_gather, two_phase, auto"):
        topk(0.1, route="ring")
    with pytest.raises(ThinwireError, match="second_stage_density_ratio is 0"):
        topk(0.1, second_stage_density_ratio=0.0)
