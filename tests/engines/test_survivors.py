"""Local updates that go on without a lost worker, and other ways in which workers part."""

import os
import random
import re
import signal

import pytest
import torch
import torch.distributed as dist

import thinwire
from tests.engines.test_outer import RECIPES, batch, build, job, loss_of
from thinwire import ThinwireError, methods, topk
from thinwire.comm.liveness import Lost
from thinwire.comm.simulated import Local
from thinwire.engines.outer.lost_worker import ARRIVED, SENDING
from thinwire.engines.simulator import SimulatedWorkers

KILLS = int(os.environ.get("THINWIRE_KILLS", "1"))


@pytest.mark.parametrize("repeat", range(KILLS))
@pytest.mark.parametrize(
    ("recipe", "moment"), [("diloco", "step"), ("co2", "arrived"), ("streaming", "step"), ("averaged", "step")]
)
def test_the_other_three_finish_and_agree(tmp_path, recipe, moment, repeat):
    draw = random.Random(repeat)
    rank, at = draw.randrange(1, 4), draw.randrange(2, 11) if moment == "step" else draw.randrange(1, 3)
    codes, said = job(tmp_path, 13, rank, at, recipe, moment)
    assert codes == [-signal.SIGKILL if other == rank else 0 for other in range(4)], said
    ends = [re.search(r"ended (\S+) \((\d)", text).groups() for other, text in enumerate(said) if other != rank]
    assert set(ends) == {(ends[0][0], "3")}
    for other, text in enumerate(said):
        assert other == rank or re.search(rf"a worker is lost \(rank {rank} seems to be gone\), 3 are left", text), text
        if recipe != "streaming":  # its exchange may have left before the kill
            assert other == rank or ("had arrived" in text) == (moment == "arrived"), text


def test_two_workers_lost_one_after_the_other(tmp_path):
    codes, said = job(tmp_path, 16, 2, 3, "diloco", "twice")
    assert codes == [0, 0, -signal.SIGKILL, -signal.SIGKILL], said
    ends = {re.search(r"ended (\S+) \((\d)", text).groups() for text in said[:2]}
    assert {world for _, world in ends} == {"2"}
    assert len(ends) == 1
    assert all("3 are left" in text and "2 are left" in text for text in said[:2])


def test_without_the_store_the_others_say_so(tmp_path):
    codes, said = job(tmp_path, 13, 0, 5, "diloco", "step")  # rank 0 holds the store
    assert codes == [-signal.SIGKILL, 3, 3, 3], said
    assert all("start with torchrun, whose agent holds it" in text for text in said[1:]), said


@pytest.mark.parametrize(
    ("arrived", "words", "final"),
    [
        (False, ["4 8 sending", "4 8 sending"], False),
        (True, ["4 8 arrived", "4 8 sending"], False),  # one of them lacks it
        (True, ["4 8 arrived", "4 8 arrived"], True),
        (True, ["4 8 arrived", "5 10 sending"], True),  # the other one has gone on, so all had it
        (True, ["4 8 arrived", "4 8 checking"], False),  # it has not begun to receive
        (False, ["4 8 sending", "5 10 sending"], "have made an outer step that this one can't make"),
        (False, ["3 6 arrived", "4 8 sending"], False),  # the other one will make its outer step, and come
        (False, ["4 8 sending", "4 8 sending", "4 8 sending"], "step 4 failed"),  # nobody is lost
        (False, ["4 8 sending", "4 7 checking", "4 8 sending"], r"inner steps \(rank 0 8, rank 1 7, rank 2 8\)"),
    ],
)  # fmt: skip
def test_an_exchange_is_final_if_all_that_are_left_have_it(arrived, words, final):
    model, optimizer = build()
    sim = SimulatedWorkers(model, methods.local(topk(0.1), every=2), optimizer, 3)
    rounds, sim.session.step = sim.local.rounds, 4
    rounds.inner, phase = 8, ARRIVED if arrived else SENDING
    rounds.regroup = lambda gone, word, timeout: (Local.of(len(words))[0], words)
    error = ThinwireError("step 4 failed")
    error.lost = Lost(gone=[2])
    if isinstance(final, str):
        with pytest.raises(ThinwireError, match=final):
            rounds._go_on(error, phase)
    else:
        assert rounds._go_on(error, phase) is final
    error.lost = Lost(raised="rank 1 failed: no memory")  # an error of the program is no lost worker
    with pytest.raises(ThinwireError, match="step 4 failed"):
        rounds._go_on(error, phase)


@pytest.mark.parametrize("recipe", ["diloco", "streaming"])
def test_a_nonfinite_worker_sends_zeros(recipe):
    """The worker begins again from the anchor, and the others' round counts."""
    model, optimizer = build()
    sim = SimulatedWorkers(model, RECIPES[recipe], optimizer, 3, on_nonfinite="zero")
    for step in range(16):
        fault = torch.tensor([1.0, torch.nan if step == 3 else 1.0, 1.0])
        sim.step(lambda worker, step=step, fault=fault: loss_of(model, batch(worker, step)) * fault[worker])
    sim.session.detach()
    assert all(bool(p.isfinite().all()) for p in model.parameters())
    assert sim.session.ledger.skipped == 0
    assert any("the update of rank 1 is not finite; it sends zeros" in note for note in sim.session.ledger.notes)
    assert 0 < sim.session.ledger.wire_bytes < sim.session.ledger.dense_bytes


@pytest.mark.parametrize(("period", "warns"), [(4, True), (1, False), (2, False), (99, False)])
def test_a_scheduler_that_steps_once_a_round_is_said(period, warns):
    model, optimizer = build()
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    result = thinwire.simulate(
        model, RECIPES["diloco"], optimizer=optimizer, workers=2, steps=16, loss=loss_of,
        batches=lambda worker, step: batch(worker, step),
        after_step=lambda step, loss: schedule.step() if step % period == period - 1 else None,
    )  # fmt: skip
    assert any("stepped once a round?" in note for note in result.ledger.notes) == warns


def _parted(rank):
    """One rank steps once more than the other; both are told. Then options that don't fit."""
    found = []
    for call in (lambda wire: wire.state_dict(), lambda wire: wire.detach()):
        model, optimizer = build()
        group = dist.group.WORLD
        wire = thinwire.attach(model, RECIPES["diloco"], optimizer=optimizer, process_group=group)
        for step in range(1 + rank):
            optimizer.zero_grad()
            loss_of(model, batch(rank, step)).backward()
            optimizer.step()
        with pytest.raises(ThinwireError) as caught:
            call(wire)
        found.append(str(caught.value))
        wire.abandon()
    options = {"process_group": group, "on_lost": "continue"}
    for method, more in (
        (topk(0.1), {"on_lost": "continue"}),
        (topk(0.1), {"on_nonfinite": "zero"}),
        (methods.local(thinwire.ef21(thinwire.compressors.TopK(0.1)), every=2), options),
        (RECIPES["diloco"], options | {"policy": thinwire.policies.LGreCo()}),
        (RECIPES["mean_adamw"], options | {"optimizer": build(mean=True)}),
        (RECIPES["diloco"], options | {"on_lost": "continue" if rank else "error"}),
    ):
        model, optimizer = more.pop("optimizer", None) or build()
        with pytest.raises(ThinwireError) as caught:
            thinwire.attach(model, method, **{"optimizer": optimizer, "process_group": group} | more)
        found.append(str(caught.value))
    return found


def test_bad_input(world2):
    expected = [
        "a checkpoint: ranks have made different numbers of inner steps (rank 0 1, rank 1 2)",
        "detach(): ranks have made different numbers of inner steps (rank 0 1, rank 1 2)",
        'on_lost is "continue", which is for local updates',
        'on_nonfinite is "zero", which is for local updates',
        'on_lost="continue" and EF21, whose state is the mean over all workers',
        'on_lost="continue" with a policy',
        'on_lost="continue" with MeanAdamW',
        "ranks differ: rank 0 has on_lost: error",
    ]
    for found in world2.run(_parted):
        for text, says in zip(found, expected, strict=True):
            assert says in text
