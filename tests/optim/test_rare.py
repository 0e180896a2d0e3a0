"""Rare features under 1-bit optimizers: embeddings, bags of words, and a model that has both kinds of tensor."""

import copy
import logging

import pytest
import torch
from torch.nn.functional import cross_entropy

import thinwire
from tests.engines.models import flat_parameters
from thinwire.engines.simulator import simulate
from thinwire.optim.rare import LEAST, lifted

STEPS, FREEZE = 90, 30


def zipf(n, power=1.0):
    return torch.arange(1, n + 1, dtype=torch.float32) ** -power


class Factors(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.users, self.items = torch.nn.Embedding(200, 8), torch.nn.Embedding(300, 8)
        for table in (self.users, self.items):
            torch.nn.init.normal_(table.weight, std=0.3)

    def forward(self, ids):
        return (self.users(ids[:, 0]) * self.items(ids[:, 1])).sum(1)


def factors(seed):
    g = torch.Generator().manual_seed(seed)
    ids = torch.stack([torch.multinomial(zipf(n), 6000, True, generator=g) for n in (200, 300)], 1)
    left, right = torch.randn(200, 3, generator=g), torch.randn(300, 3, generator=g)
    ratings = 0.6 * (left[ids[:, 0]] * right[ids[:, 1]]).sum(1) + 0.3 * torch.randn(6000, generator=g)
    return Factors(), (ids, ratings), lambda model, batch: (model(batch[0]) - batch[1]).square().mean()


def words(seed):
    g = torch.Generator().manual_seed(seed)
    topics = torch.stack([zipf(3000, 1.1) + zipf(3000, 1.1)[torch.randperm(3000, generator=g)] for _ in range(6)])
    labels = torch.randint(6, (1500,), generator=g)
    counts = torch.zeros(1500, 3000).scatter_add_(
        1, torch.multinomial(topics[labels], 25, True, generator=g), torch.ones(1500, 25)
    )
    features = counts / counts.norm(dim=1, keepdim=True)
    return torch.nn.Linear(3000, 6), (features, labels), lambda model, batch: cross_entropy(model(batch[0]), batch[1])


class Tower(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.table = torch.nn.Embedding(2000, 16)
        self.body = torch.nn.Sequential(torch.nn.Linear(16, 128), torch.nn.Tanh(), torch.nn.Linear(128, 128))
        self.out = torch.nn.Linear(128, 4)

    def forward(self, ids):
        return self.out(torch.tanh(self.body(self.table(ids).mean(1))))


def tower(seed):
    g = torch.Generator().manual_seed(seed)
    ids = torch.multinomial(zipf(2000), 8 * 2000, True, generator=g).view(2000, 8)
    labels = torch.randint(4, (2000,), generator=g)[ids].float().mean(1).mul(10).long() % 4
    return Tower(), (ids, labels), lambda model, batch: cross_entropy(model(batch[0]), batch[1])


MODELS = {"factors": factors, "words": words, "tower": tower}
ONEBIT = {
    "OneBitAdam": (
        thinwire.optim.OneBitAdam,
        thinwire.onebit_adam,
        {"freeze_step": FREEZE},
        {"freeze_step": None},
        0.01,
    ),
    "ZeroOneAdam": (thinwire.optim.ZeroOneAdam, thinwire.zeroone_adam, {}, None, 0.01),
    "OneBitLamb": (
        thinwire.optim.OneBitLamb,
        thinwire.methods.onebit_lamb,
        {"freeze_step": FREEZE},
        {"freeze_step": None},
        0.01,
    ),
}


def train(kind, seed, name, dense, steps=STEPS, **options):
    torch.manual_seed(seed)
    model, data, loss = MODELS[kind](seed)
    make, recipe, settings, never, lr = ONEBIT[name]
    if dense and never is None:
        optimizer, method = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0), thinwire.dense()
    else:
        optimizer, method = make(model.parameters(), lr=lr, **(never if dense else settings)), recipe(**options)
    generator = torch.Generator().manual_seed(seed)
    picks = torch.randint(len(data[0]), (steps, 2, 32), generator=generator)
    result = simulate(
        model,
        method,
        optimizer=optimizer,
        workers=2,
        steps=steps,
        batches=lambda worker, step: tuple(part[picks[step, worker]] for part in data),
        loss=loss,
    )
    with torch.no_grad():
        return float(loss(model, data)), result.ledger, optimizer


@pytest.mark.parametrize("name", ONEBIT)
@pytest.mark.parametrize("kind", MODELS)
def test_the_loss_is_near_that_of_dense_training(kind, name):
    for seed in (0, 1) if kind == "factors" else (2,):
        dense, _, _ = train(kind, seed, name, True)
        sparse, ledger, _ = train(kind, seed, name, False)
        assert ledger.skipped == 0
        assert sparse < (1.05 if kind != "tower" else 1.3) * dense
        assert any("parameters of rare features, of shapes" in note for note in ledger.notes)
        last = ledger.rows[-1]
        if kind == "tower":  # the layers behind the table are compressed
            assert last.compressed_wire_bytes < 0.5 * last.compressed_dense_bytes or last.wire_bytes < last.dense_bytes


def test_keep_dense_of_each_recipe():
    for name in ONEBIT:
        ways = {}
        for keep in ((), "body.2.*", ["body.*", "table.*"]):
            _, ledger, _ = train("tower", 0, name, False, 33, keep_dense=keep)
            ways[str(keep)] = min(row.wire_bytes for row in ledger.rows)
        none, some, more = ways.values()
        assert none < some < more
    with pytest.raises(thinwire.ThinwireError, match="keep_dense"):
        thinwire.onebit_adam(keep_dense=3)


def test_small_variances_are_lifted_by_block_and_none_else():
    v = torch.rand(3 * 4096 + 100) + 0.5
    v[4096:8192] *= 1e-8  # a block of its own size stays
    v[5], v[9000], v[7] = 1e-12, 1e-9, 0.0
    out, count = lifted(v)
    assert count == 2
    assert out[7] == 0
    changed = (out != v).nonzero().view(-1).tolist()
    assert changed == [5, 9000]
    torch.testing.assert_close(out[5].sqrt(), LEAST * v[:4096].sqrt().sum() / 4095)


def _resumed(rank, name):
    make, recipe, settings, _, lr = ONEBIT[name]

    def start():
        torch.manual_seed(0)
        model, data, loss = tower(0)
        ddp = torch.nn.parallel.DistributedDataParallel(model)
        optimizer = make(model.parameters(), lr=lr, **({"freeze_step": 3} if "freeze_step" in settings else settings))
        return model, data, loss, ddp, optimizer, thinwire.attach(ddp, recipe(), optimizer=optimizer)

    def steps(first, last, data, loss, ddp, optimizer):
        for step in range(first, last):
            g = torch.Generator().manual_seed(2 * step + rank)
            pick = torch.randint(len(data[0]), (16,), generator=g)
            optimizer.zero_grad()
            loss(ddp, tuple(part[pick] for part in data)).backward()
            optimizer.step()

    model, data, loss, ddp, optimizer, wire = start()
    steps(0, 19, data, loss, ddp, optimizer)
    saved = [copy.deepcopy(part.state_dict()) for part in (model, optimizer)] + [wire.state_dict()]
    steps(19, 24, data, loss, ddp, optimizer)
    whole = flat_parameters(model)
    kept = [optimizer.kept(p) for p in model.parameters()]
    wire.detach()
    model, data, loss, ddp, optimizer, wire = start()
    model.load_state_dict(saved[0])
    wire.load_state_dict(saved[2])
    optimizer.load_state_dict(saved[1])  # after the session
    steps(19, 24, data, loss, ddp, optimizer)
    again = flat_parameters(model)
    small = wire.ledger.rows[-1].wire_bytes < wire.ledger.rows[-1].dense_bytes
    wire.detach()
    return whole, again, kept, small


@pytest.mark.parametrize("name", ONEBIT)
def test_a_checkpoint_knows_what_stays_dense(world2, name):
    (one, again, kept, small), (two, _, _, _) = world2.run(_resumed, name)
    assert torch.equal(one, two)
    assert torch.equal(one, again)
    assert kept[0]
    assert not all(kept)
    assert small or name == "ZeroOneAdam"


@pytest.mark.parametrize(("nonfinite", "said"), [(range(5, 20), "11 steps in a row"), (range(0, 140, 2), None)])
def test_a_run_that_skips_says_so_loudly(caplog, nonfinite, said):
    weight = torch.nn.Linear(4, 4)
    steps = 140 if said is None else 30
    nonfinite = {*nonfinite, *range(1, 40, 3)} if said is None else set(nonfinite)
    with caplog.at_level(logging.WARNING, logger="thinwire"):
        result = simulate(
            weight,
            thinwire.topk(0.5),
            optimizer=torch.optim.SGD(weight.parameters(), lr=0.1),
            workers=2,
            steps=steps,
            batches=lambda worker, step: torch.full((2, 4), torch.inf if step in nonfinite else 1.0),
            loss=lambda model, x: model(x).square().mean(),
        )
    heard = [record.getMessage() for record in caplog.records if "have been skipped" in record.getMessage()]
    assert len(heard) == 1
    assert (said or "of the last 100 steps have been skipped") in heard[0]
    assert "is not finite on rank" in heard[0]
    assert "Lower the learning rate" in heard[0]
    assert any("have been skipped" in note for note in result.ledger.notes)
