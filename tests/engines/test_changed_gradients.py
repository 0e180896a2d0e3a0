"""Gradients that are changed between the exchange and the step."""

import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_, clip_grad_value_

import thinwire
from tests.engines import sharded
from tests.engines.models import Net, batch, loss_of
from thinwire import dense, dgc, lean, onebit_adam, topk
from thinwire.session import changed_gradients


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]


def clip_norm(model, optimizer):
    clip_grad_norm_(trained(model), 0.01)


def clip_value(model, optimizer):
    clip_grad_value_(trained(model), 1e-4)


def by_hand(model, optimizer):
    for param in trained(model):
        param.grad.mul_(0.5)


def through_data(model, optimizer):
    for param in trained(model):
        param.grad.data.mul_(0.5)


def another(model, optimizer):
    for param in trained(model):
        param.grad = param.grad.clone() * 2


def decay(model, optimizer):
    with torch.no_grad():
        for param in trained(model):
            param.grad.add_(param, alpha=0.1)


def noise(model, optimizer):
    for param in trained(model):
        param.grad.add_(torch.randn_like(param.grad), alpha=0.1)


def drop(model, optimizer):
    trained(model)[0].grad = None


def look(model, optimizer):
    """What changes nothing."""
    clip_grad_norm_(trained(model), 1e9)
    for param in trained(model):
        param.grad.add_(0.0)


CHANGES = [clip_norm, clip_value, by_hand, through_data, another, decay, noise, drop]


def _texts(rank, engine, changes, methods):
    """The warnings of three steps, for each change and method."""
    found = {}
    mesh = sharded.mesh_of(2, 1) if engine == "fsdp2" else None
    for method, kind in methods:
        for change in changes:
            torch.manual_seed(0)
            if mesh is not None:
                model, _ = sharded.build(mesh)
                run, loss = model, lambda m, step: sharded.loss_of(m, sharded.data(rank, step))
                options = {"fsdp2": thinwire.Fsdp2Options(mesh["replicate"])}
            else:
                model = Net()
                run = DistributedDataParallel(model) if engine == "ddp" else model
                options = {} if engine == "ddp" else {"process_group": dist.group.WORLD}
                loss = lambda m, step: loss_of(m, batch(rank, step))  # noqa: E731
            optimizer = kind(trained(model), lr=0.01, **({"momentum": 0.9} if kind is torch.optim.SGD else {}))
            wire = thinwire.attach(run, method, optimizer=optimizer, **options)
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                for step in range(3):
                    optimizer.zero_grad()
                    loss(run, step).backward()
                    change(model, optimizer)
                    optimizer.step()
            texts = [str(one.message) for one in caught]
            found[method.name, change.__name__] = [text for text in texts if "between the exchange" in text]
            wire.detach()
    return found


OWN = [(dgc(0.05), torch.optim.SGD), (lean(0.5), torch.optim.SGD), (onebit_adam(), thinwire.optim.OneBitAdam)]
BEAR = [(dense(), torch.optim.SGD), (topk(0.05), torch.optim.AdamW), (lean(0.5, momentum=False), torch.optim.AdamW)]


@pytest.mark.parametrize("engine", ["ddp", "bare", "fsdp2"])
def test_a_method_that_owns_the_momentum_says_that_it_was_changed(world2, engine):
    changes = CHANGES if engine == "ddp" else [clip_norm, by_hand, another]
    for found in world2.run(_texts, engine, changes, OWN[:1], timeout=180):
        for (name, change), texts in found.items():
            assert len(texts) == 1, (name, change)
            assert "give the method clip=, as in thinwire.dgc(clip=1.0)" in texts[0]


def test_others_that_own_it_name_themselves(world2):
    for found in world2.run(_texts, "ddp", [clip_norm, look], OWN[1:], timeout=180):
        for name in ("lean", "onebit_adam"):
            assert f"thinwire.{name}(clip=1.0)" in found[name, "clip_norm"][0]
            assert not found[name, "look"]


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_what_is_right_is_not_said(world2, engine):
    for found in world2.run(_texts, engine, [clip_norm, by_hand], BEAR, timeout=180):
        assert not any(found.values())
    for found in world2.run(_texts, engine, [look], OWN[:1], timeout=180):
        assert not any(found.values())


def _scaled(rank, given, clipped, fused):
    model = Net()
    optimizer = torch.optim.SGD(trained(model), lr=0.01, momentum=0.9, fused=fused)
    ddp = DistributedDataParallel(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=1000.0, growth_interval=2)
    wire = thinwire.attach(ddp, dgc(0.05), optimizer=optimizer, scaler=scaler if given else None)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(5):
            optimizer.zero_grad()
            scaler.scale(loss_of(ddp, batch(rank, step))).backward()
            if clipped:
                scaler.unscale_(optimizer)
                clip_grad_norm_(trained(model), 0.01)
            scaler.step(optimizer)
            scaler.update()
    wire.detach()
    return [str(one.message) for one in caught]


@pytest.mark.parametrize("fused", [False, True])
def test_a_forgotten_scaler_is_said_and_a_given_one_is_not(world2, fused):
    for texts in world2.run(_scaled, False, False, fused):
        assert len(texts) == 1
        assert "pass attach(..., scaler=scaler)" in texts[0]
    assert world2.run(_scaled, True, False, fused) == [[], []]
    for texts in world2.run(_scaled, True, True, fused):
        assert len(texts) == 1
        assert "thinwire.dgc(clip=1.0)" in texts[0]


class Wide(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(300, 300)

    def forward(self, x):
        return self.inner(x)


def _sparse(rank):
    model = Wide()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    wire = thinwire.attach(
        model, dgc(0.005), optimizer=optimizer, process_group=dist.group.WORLD, sparse_gradients=True
    )
    kinds = set()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.randn(4, 300)).square().sum().backward()
            kinds |= {model.inner.weight.grad.is_sparse}
            model.inner.weight.grad.mul_(0.25)
            optimizer.step()
    wire.detach()
    return kinds, [str(one.message) for one in caught]


def test_sparse_gradients_too(world2):
    for kinds, texts in world2.run(_sparse):
        assert True in kinds
        assert len(texts) == 1
        assert "inner.weight was changed" in texts[0]


def test_it_looks_rarely_and_no_more_when_it_has_warned(monkeypatch):
    looked = []
    monkeypatch.setattr(changed_gradients.Touched, "_record", lambda self, units: looked.append(self.exchanges))
    watch = changed_gradients.Touched(False)
    for _ in range(1000):
        watch.exchanged((), dgc(0.1))
    assert looked[:12] == [*range(1, 11), 16, 32]
    assert len(looked) < 30
    watch.warned = True
    watch.exchanged((), dgc(0.1))
    assert len(looked) < 30
    for method in (dense(), topk(0.1)):
        other = changed_gradients.Touched(False)
        other.exchanged((), method)
        assert other.exchanges == 0
