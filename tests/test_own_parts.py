"""A compressor and a memory of a user's own: every engine, checkpoints, JSON, the laws, and what is refused."""

import json
import pickle
from collections.abc import Mapping
from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.nn.parallel import DistributedDataParallel

import thinwire
from tests.engines import models, sharded
from thinwire import Compressor, Fsdp2Options, Memory, Method, Rule, ThinwireError, register
from thinwire.core import Role, Slot, Sparse, Traits, flat, registry
from thinwire.engines.simulator import SimulatedWorkers
from thinwire.methods.given import method_of
from thinwire.testing import check_compressor, check_memory


@register("every nth of a test")
@dataclass(frozen=True)
class EveryNth(Compressor):
    n: int = 8
    traits = Traits(needs_feedback=True)

    def positions(self, x, ctx):
        return torch.arange(ctx.phase % self.n, x.numel() - x.numel() % self.n, self.n, device=x.device)

    def compress(self, x, state, ctx):
        nonfinite = x.sum() - x.sum() if not x.is_meta else 0.0  # NaN where anything is not finite
        return (flat(x)[self.positions(x, ctx)] + nonfinite,)

    def decompress(self, payload, like, state, ctx):
        return Sparse(self.positions(like, ctx), payload[0], 1 / self.n)


@register("halving")
@dataclass(frozen=True)
class Halving(Memory):
    @property
    def slots(self) -> Mapping[str, Slot]:
        return {"left over": Slot(Role.PENDING)}

    def compensate(self, grad, param, old, new, scale=1.0, ctx=None):
        return torch.add(old["left over"], grad, alpha=scale, out=new["left over"]).clone()

    def sent(self, decoded, new, sign=-1.0):
        decoded.add_to(new["left over"], alpha=sign)


OWN = Method("own", (Rule(EveryNth(4), Halving(), min_ndim=2), Rule(thinwire.compressors.Cast(), Halving())))


def test_the_laws_hold():
    check_compressor(EveryNth(8))
    check_memory(Halving(), EveryNth(3))


def test_they_go_to_json_and_back():
    row = registry.to_json(EveryNth(8))
    assert row == {"kind": "every nth of a test", "class": f"{__name__}.EveryNth", "n": 8}
    assert Method.from_json(json.dumps(json.loads(OWN.to_json()))) == OWN


def _start(rank, engine, seed=0):
    options = {}
    if engine == "fsdp2":
        mesh = sharded.mesh_of(2, 1)
        model, _ = sharded.build(mesh, seed=seed)
        options = {"fsdp2": Fsdp2Options(replicate=mesh["replicate"])}
    else:
        model, _ = models.build(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    run = DistributedDataParallel(model) if engine == "ddp" else model
    if engine == "bare":
        options = {"process_group": dist.group.WORLD}
    return model, run, optimizer, thinwire.attach(run, OWN, optimizer=optimizer, **options)


def _loss(rank, engine, run, step):
    if engine == "fsdp2":
        return sharded.loss_of(run, sharded.data(rank, step))
    return models.loss_of(run, models.batch(rank, step))


def _steps(rank, engine, run, optimizer, steps):
    for step in steps:
        optimizer.zero_grad()
        _loss(rank, engine, run, step).backward()
        optimizer.step()


def _whole(model):
    return torch.cat(
        [(p.full_tensor() if hasattr(p, "full_tensor") else p).detach().flatten() for p in model.parameters()]
    )


def _resumed(rank, engine, folder):
    """Parameters of an unbroken run, and of one that went on from a checkpoint; its ratio, and what was pending."""
    model, run, optimizer, wire = _start(rank, engine)
    _steps(rank, engine, run, optimizer, range(3))
    dcp.save({"model": model.state_dict(), "wire": wire}, checkpoint_id=f"{folder}/{engine}")
    pending = sum(float(s.now["left over"].norm()) for s in wire.workers[0].local.values())
    _steps(rank, engine, run, optimizer, range(3, 6))
    unbroken, ratio = _whole(model), wire.ledger.ratio
    wire.detach()
    model, run, optimizer, wire = _start(rank, engine, seed=1)
    state = {"model": model.state_dict()}
    dcp.load(state | {"wire": wire}, checkpoint_id=f"{folder}/{engine}")
    model.load_state_dict(state["model"])
    _steps(rank, engine, run, optimizer, range(3, 6))
    wire.detach()
    return unbroken, _whole(model), ratio, pending


@pytest.mark.parametrize("engine", ["ddp", "bare", "fsdp2"])
def test_they_train_and_resume_bit_for_bit(world2, engine, tmp_path):
    found = world2.run(_resumed, engine, str(tmp_path), timeout=120.0)
    for unbroken, resumed, ratio, pending in found:
        assert torch.equal(unbroken, resumed)
        assert torch.equal(unbroken, found[0][0])
        assert ratio > 1.5
        assert pending > 0.0


def test_the_simulator_trains_them():
    torch.manual_seed(0)
    model = torch.nn.Linear(32, 24)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    target = torch.randn(32, 24)

    def batches(worker, step):
        return torch.randn(16, 32, generator=torch.Generator().manual_seed(100 * step + worker))

    def loss(model, x):
        return (model(x) - x @ target).square().mean()

    result = thinwire.simulate(model, OWN, optimizer=optimizer, batches=batches, loss=loss, workers=2, steps=80)
    assert result.losses[-1] < result.losses[0] / 2
    assert result.ledger.ratio > 1.5
    assert "discarded" in str(result.ledger.notes).lower() or "dropped" in str(result.ledger.notes)


def test_what_is_refused(monkeypatch):
    monkeypatch.setattr(registry, "COMPRESSORS", dict(registry.COMPRESSORS))
    with pytest.raises(ThinwireError, match="the name 'topk' is that of thinwire"):
        register("topk")(EveryNth)
    register("every nth of a test")(EveryNth)  # the same class once more
    with pytest.raises(ThinwireError, match="is neither a Compressor nor a Memory"):
        register("text")(str)

    class Bare(Compressor):
        def compress(self, x, state, ctx):
            return (x,)

        def decompress(self, payload, like, state, ctx):
            raise NotImplementedError

    with pytest.raises(ThinwireError, match="Bare is no dataclass"):
        register("bare")(Bare)
    with pytest.raises(ThinwireError, match="Bare is not registered"):
        registry.to_json(Bare())
    text = OWN.to_json()
    del registry.COMPRESSORS["every nth of a test"]
    with pytest.raises(ThinwireError, match=r"is the class .*EveryNth, which this process has not registered; import"):
        Method.from_json(text)


def test_broken_laws_are_named(monkeypatch):
    monkeypatch.setattr(registry, "COMPRESSORS", dict(registry.COMPRESSORS))
    monkeypatch.setattr(registry, "MEMORIES", dict(registry.MEMORIES))

    @register("blind")
    @dataclass(frozen=True)
    class Blind(EveryNth):
        def compress(self, x, state, ctx):
            return (flat(x)[self.positions(x, ctx)],)

    with pytest.raises(AssertionError, match="is not seen in the first tensor"):
        check_compressor(Blind(8))

    @register("boastful")
    @dataclass(frozen=True)
    class Boastful(EveryNth):
        traits = Traits(contraction=lambda n: 0.9)

    with pytest.raises(AssertionError, match=r"it loses .* more than 1 - 0.9"):
        check_compressor(Boastful(8))

    @register("forgetful")
    @dataclass(frozen=True)
    class Forgetful(Halving):
        def sent(self, decoded, new, sign=-1.0):
            new["left over"].zero_()

    with pytest.raises(AssertionError, match="does not give back slot 'left over'"):
        check_memory(Forgetful())

    @register("lossy")
    @dataclass(frozen=True)
    class Lossy(Halving):
        def compensate(self, grad, param, old, new, scale=1.0, ctx=None):
            return torch.add(0.5 * old["left over"], grad, alpha=scale, out=new["left over"]).clone()

    with pytest.raises(AssertionError, match="is not the sum of the gradients"):
        check_memory(Lossy())

    @register("unscaled")
    @dataclass(frozen=True)
    class Unscaled(Halving):
        def compensate(self, grad, param, old, new, scale=1.0, ctx=None):
            return torch.add(old["left over"], grad, out=new["left over"]).clone()

    with pytest.raises(AssertionError, match="does not multiply the gradient by scale"):
        check_memory(Unscaled())


def test_what_is_pending_follows_the_role_and_not_the_name():
    """A method without such a slot sends it with the next step; another world drops it with a note, or averages it."""
    torch.manual_seed(0)
    model = torch.nn.Linear(32, 24)
    sim = SimulatedWorkers(model, OWN, torch.optim.SGD(model.parameters(), lr=1.0), 2)
    grads = [torch.randn(24, 32) for _ in range(2)]
    before = model.weight.detach().clone()
    sim.step(lambda worker: (model.weight * grads[worker]).sum() + 0.0 * model.bias.sum())
    pending = sum(w.local["weight"].now["left over"] for w in sim.session.workers) / 2
    assert float(pending.norm()) > 0.0
    sim.session.set_method(thinwire.dense())
    sim.step(lambda worker: 0.0 * (model.weight.sum() + model.bias.sum()))
    torch.testing.assert_close(before - model.weight.detach(), sum(grads) / 2, rtol=1e-5, atol=1e-5)
    sim.session.set_method(OWN)
    sim.step(lambda worker: (model.weight * grads[worker]).sum() + 0.0 * model.bias.sum())
    sim.session.detach()
    assert any("discarded the gradient that was not sent yet" in note for note in sim.session.ledger.notes)


def test_a_compressor_that_says_nothing_gets_error_feedback():
    assert method_of(EveryNth(8)).rules[0].memory == thinwire.memories.ErrorFeedback()

    @dataclass(frozen=True)
    class Silent(EveryNth):
        traits = Traits()

    register("silent")(Silent)
    assert method_of(Silent(8)).rules[0].memory == thinwire.memories.ErrorFeedback()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: register(EveryNth), "register needs a name"),
        (
            lambda: register("a")(dataclass(type("A", (Compressor,), {"compress": None, "decompress": None}))),
            "A is not frozen",
        ),
        (lambda: register("b")(type("B", (EveryNth,), {})), "B is no dataclass"),
        (lambda: register("c")(_made("C", summable=True)), "C.summable has no effect"),
        (lambda: register("d")(_made("D", __annotations__={"kind": int}, kind=1)), "D has a setting 'kind'"),
        (lambda: registry.to_json(EveryNth(torch.float32)), r"EveryNth.n is torch.float32, which JSON can't hold"),
        (lambda: Rule(_made("W", traits=Traits(warm_started=True))(), Halving()), "need the capability WarmStarted"),
        (lambda: Rule(_made("L", traits=Traits(leader_selected=True))(), Halving()), "need the capability LeaderS"),
        (lambda: Rule(_made("S", traits=Traits(selects=True))(), Halving()), "need the capability LeaderSelected"),
        (lambda: Rule(EveryNth(8), _Reserved()), "a reserved name"),
        (lambda: thinwire.TopK, r"thinwire has no TopK; it is thinwire.compressors.TopK"),
    ],
)
def test_what_would_have_no_effect_is_refused(make, message):
    with pytest.raises((ThinwireError, AttributeError), match=message):
        make()


def _made(name, **members):
    return dataclass(frozen=True)(type(name, (EveryNth,), members))


@dataclass(frozen=True)
class _Reserved(Halving):
    @property
    def slots(self):
        return {"pending_residual": Slot(Role.PENDING)}


def test_a_method_can_be_pickled_when_its_traits_can_not():
    method = Method("own", (Rule(EveryNth(8), Halving()),))
    assert method.rules[0].compressor.traits.needs_feedback
    assert pickle.loads(pickle.dumps(thinwire.topk(0.1))) == thinwire.topk(0.1)
    assert "traits" not in thinwire.compressors.TopK(0.1).__getstate__()
    assert pickle.loads(pickle.dumps(method)) == method
    memory = thinwire.memories.ErrorFeedback()
    assert memory.traits.passes_on
    assert vars(pickle.loads(pickle.dumps(memory))).keys() == {"state_dtype", "decay", "beta"}
