"""Residuals in checkpoints: resume, another world size, another method, damage."""

import copy

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed import checkpoint as dcp
from torch.nn.parallel import DistributedDataParallel

import thinwire
from tests.engines.models import batch, build, flat_parameters, loss_of
from tests.world import World
from thinwire import ThinwireError, Warmup, dense, dgc, topk
from thinwire.comm.simulated import Local
from thinwire.session.checkpoint import restore, save
from thinwire.session.rounds import OptimizerSteps
from thinwire.session.session import Session

METHODS = {
    "dgc": dgc(0.02, warmup=Warmup(20)),
    "dgc-nesterov-decay": dgc(0.02),
    "dgc-two-phase": dgc(0.02, route="two_phase"),
    "topk": topk(0.05),
    "topk-adamw": topk(0.05),
}


def start(name):
    model, optimizer = build(**({"nesterov": True, "weight_decay": 0.01} if name == "dgc-nesterov-decay" else {}))
    if name == "topk-adamw":
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    ddp = DistributedDataParallel(model)
    return model, optimizer, ddp, thinwire.attach(ddp, METHODS[name], optimizer=optimizer)


def steps(rank, ddp, optimizer, first, last):
    losses = []
    for step in range(first, last):
        optimizer.zero_grad()
        loss = loss_of(ddp, batch(rank, step))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def unbroken(rank, name, total=40):
    model, optimizer, ddp, wire = start(name)
    losses = steps(rank, ddp, optimizer, 0, total)
    ratio = wire.ledger.rows[-1].dense_bytes / wire.ledger.rows[-1].wire_bytes
    wire.detach()
    return losses, flat_parameters(model), ratio


def first_half(rank, name, folder, with_dcp, upto=17):
    model, optimizer, ddp, wire = start(name)
    losses = steps(rank, ddp, optimizer, 0, upto)
    if with_dcp:
        dcp.save(
            {"model": model.state_dict(), "optimizer": _indexed(optimizer), "wire": wire}, checkpoint_id=f"{folder}/dcp"
        )
    else:
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "wire": wire.state_dict()}
        torch.save(state, f"{folder}/{rank}.pt")
    pending = {name: two.now["residual"].clone() for name, two in wire.workers[0].local.items() if two.now}
    wire.detach()
    return losses, pending


def second_half(rank, name, folder, with_dcp, upto=40):
    model, optimizer, ddp, wire = start(name)
    if with_dcp:
        for group in optimizer.param_groups:  # DCP loads in place: the state must be there
            for p in group["params"]:
                p.grad = torch.zeros_like(p) if p.requires_grad else None
        if name.startswith("topk"):
            optimizer.step()
        optimizer.zero_grad()
        state = {"model": model.state_dict(), "optimizer": _indexed(optimizer), "wire": wire}
        dcp.load(state, checkpoint_id=f"{folder}/dcp")
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(
            {**optimizer.state_dict(), "state": {int(k): v for k, v in state["optimizer"].items()}}
        )
    else:
        state = torch.load(f"{folder}/{rank}.pt", weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        wire.load_state_dict(state["wire"])
    losses = steps(rank, ddp, optimizer, 17, upto)
    assert wire.step == upto
    wire.detach()
    return losses, flat_parameters(model)


def _indexed(optimizer):
    return {str(k): dict(v) for k, v in optimizer.state_dict()["state"].items()}


@pytest.fixture(scope="module")
def resumed_in_new_processes(world2, tmp_path_factory):
    """Of every method and way of saving: the unbroken run, the first half, and the second in other processes."""
    cases = {(name, way): tmp_path_factory.mktemp(f"{name}-{way}") for name in METHODS for way in (True, False)}
    whole = {name: world2.run(unbroken, name) for name in METHODS}
    before = {case: world2.run(first_half, case[0], folder, case[1]) for case, folder in cases.items()}
    fresh = World(2)
    try:
        after = {case: fresh.run(second_half, case[0], folder, case[1]) for case, folder in cases.items()}
    finally:
        fresh.stop()
    return whole, before, after


@pytest.mark.parametrize("with_dcp", [True, False], ids=["dcp", "torch.save"])
@pytest.mark.parametrize("name", METHODS)
def test_resume_is_bit_exact(resumed_in_new_processes, name, with_dcp):
    whole, before, after = resumed_in_new_processes
    whole, before, after = whole[name], before[name, with_dcp], after[name, with_dcp]
    for (losses, parameters, ratio), (a, pending), (b, resumed) in zip(whole, before, after, strict=True):
        assert a + b == losses
        assert torch.equal(resumed, parameters)
        assert ratio > 3
        assert max(float(p.abs().max()) for p in pending.values()) > 0
    assert not torch.equal(before[0][1]["middle.weight"], before[1][1]["middle.weight"]), (
        "each rank has a residual of its own"
    )


def resized(rank, folder, on_world_change, saved):
    _, _, _, wire = start("dgc")
    try:
        if saved == "files":
            states = [torch.load(f"{folder}/{r}.pt", weights_only=True)["wire"] for r in range(4)]
            wire.load_state_dict(states, on_world_change)
        else:
            wire.load(f"{folder}/dcp", on_world_change=on_world_change)
        pending = {name: two.now["residual"] for name, two in wire.workers[0].local.items() if "residual" in two.now}
        return pending, wire.step, wire.ledger.notes
    except ThinwireError as error:
        return str(error)
    finally:
        wire.detach()


@pytest.mark.parametrize(("old", "new"), [(4, 2), (2, 4), (3, 4)])
def test_another_world_size(world2, world4, tmp_path, old, new):
    started = {size: World(size) for size in {old, new} - {2, 4}}
    worlds = {2: world2, 4: world4, **started}
    try:
        saved = worlds[old].run(first_half, "dgc", tmp_path, True)
        for answer in worlds[new].run(resized, tmp_path, "error", "dcp"):
            assert f"saved by {old} workers, and {new} load it; choose on_world_change='fold'" in answer
        folded = worlds[new].run(resized, tmp_path, "fold", "dcp")
        for name in saved[0][1]:
            expected = torch.stack([pending[name] for _, pending in saved]).double().mean(0)
            got = torch.stack([pending[name] for pending, _, _ in folded]).double().mean(0)
            assert expected.abs().max() > 0
            torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-9)
        pending, step, notes = worlds[new].run(resized, tmp_path, "reset", "dcp")[0]
        assert step == 17
        assert all(float(p.abs().max()) == 0 for p in pending.values())
        assert any("a mean pending update of norm" in note and "was dropped" in note for note in notes)
    finally:
        for world in started.values():
            world.stop()


def test_another_world_size_from_files(world2, world4, tmp_path):
    saved = world4.run(first_half, "dgc", tmp_path, False)
    folded = world2.run(resized, tmp_path, "fold", "files")
    expected = torch.stack([pending["conv.weight"] for _, pending in saved]).mean(0)
    torch.testing.assert_close(folded[0][0]["conv.weight"], expected, rtol=1e-6, atol=1e-9)


def _other_method(rank):
    _, optimizer, ddp, wire = start("topk")
    steps(rank, ddp, optimizer, 0, 5)
    saved, residual = wire.state_dict(), wire.workers[0].local["middle.weight"].now["residual"].clone()
    wire.detach()
    model, optimizer = build()
    wire = thinwire.attach(DistributedDataParallel(model), dgc(0.02), optimizer=optimizer)
    wire.load_state_dict(saved)
    kept = torch.allclose(wire.workers[0].local["middle.weight"].now["residual"], residual * 10)  # 1 / (1 - 0.9)
    notes = [note for note in wire.ledger.notes if "starts from zero" in note]
    wire.set_method(dense())
    wire.load_state_dict(saved)
    pending = torch.equal(wire.workers[0].local["middle.weight"].now["pending_residual"], residual)
    wire.detach()
    return kept, notes, pending


def test_a_changed_method_keeps_the_residual_and_says_what_starts_anew(world2):
    for kept, notes, pending in world2.run(_other_method):
        assert kept
        assert "middle.weight: momentum is not in the checkpoint and starts from zero" in notes
        assert pending


def _damaged(rank):
    _, optimizer, ddp, wire = start("dgc")
    steps(rank, ddp, optimizer, 0, 3)
    good = wire.state_dict()
    before = {k: t.clone() for k, two in wire.workers[0].local.items() for k, t in two.now.items()}
    messages = {}

    def bad(name, change):
        state = copy.copy(good)
        for part in ("plan", "local", "shared"):
            state[part] = dict(good[part])
        change(state)
        try:
            wire.load_state_dict(state)
        except ThinwireError as error:
            messages[name] = str(error)

    w = "middle.weight"
    row = good["local"][w]["residual"]
    bad("no world", lambda s: s.pop("world"))
    bad("huge step", lambda s: s.update(step=2**63))
    bad("version", lambda s: s.update(version=99))
    bad("no unit", lambda s: s["plan"].pop(w))
    bad("extra unit", lambda s: s["plan"].update(ghost="{}"))
    bad("other shape", lambda s: s["plan"].update({w: s["plan"][w].replace("48, 48", "4, 8")}))
    bad("garbage plan", lambda s: s["plan"].update({w: '{"shape": [48, 48]' + "[" * 9999}))
    bad("no tensor", lambda s: s["local"].update({w: {**good["local"][w], "residual": "text"}}))
    bad(
        "nan",
        lambda s: s["local"].update({w: {**good["local"][w], "residual": torch.full_like(row.to_local(), torch.nan)}}),
    )
    bad("short", lambda s: s["local"].update({w: {**good["local"][w], "residual": row.to_local()[:, :3]}}))
    bad(
        "ints",
        lambda s: s["local"].update({w: {**good["local"][w], "residual": torch.ones(1, 48, 48, dtype=torch.int64)}}),
    )
    bad("not a state", lambda s: s.clear())
    try:
        wire.load("/nowhere")
    except ThinwireError as error:
        messages["folder"] = str(error)
    after = {k: t for k, two in wire.workers[0].local.items() for k, t in two.now.items()}
    untouched = all(torch.equal(before[k], after[k]) for k in before) and wire.step == 3
    wire.detach()
    return messages, untouched


def test_a_damaged_checkpoint_changes_nothing(world2):
    expected = {
        "no world": "world is None",
        "huge step": "step is 9223372036854775808",
        "version": "version 99; this thinwire reads version 1 to 2",
        "no unit": "has no unit 'middle.weight'",
        "extra unit": "a unit 'ghost' that the model has not",
        "other shape": "unit 'middle.weight' has shape [48, 48] here",
        "garbage plan": "plan can't be read",
        "no tensor": "residual in the checkpoint is str, not a tensor",
        "nan": "residual is not finite",
        "short": "of shape (1, 3, 48), not of (2, 48, 48)",
        "ints": "is torch.int64, torch.strided, not a tensor of float64",
        "not a state": "this state is empty, so it is no state of thinwire",
        "folder": "can be read from /nowhere",
    }
    for messages, untouched in world2.run(_damaged):
        assert untouched
        assert messages.keys() == expected.keys()
        for name, part in expected.items():
            assert part in messages[name], messages[name]


def _truncated(rank, folder):
    _, optimizer, ddp, wire = start("dgc")
    steps(rank, ddp, optimizer, 0, 2)
    dcp.save({"wire": wire}, checkpoint_id=f"{folder}/cut")
    dist.barrier()
    if rank == 0:
        for file in folder.glob("cut/*.distcp"):
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    dist.barrier()
    step = wire.step
    with pytest.raises(ThinwireError, match="no checkpoint under 'wire' can be read"):
        wire.load(f"{folder}/cut")
    assert wire.step == step
    wire.detach()


def test_a_truncated_folder(world2, tmp_path):
    world2.run(_truncated, tmp_path)


def _one_rank():
    weight = torch.nn.Parameter(torch.randn(6, 5))
    session = Session(
        [("w", weight)], dgc(0.1), Local.of(1)[0], OptimizerSteps(torch.optim.SGD([weight], lr=0.1, momentum=0.9))
    )
    state = save(
        session.units,
        session.workers[0],
        lambda t, like=None: t.unsqueeze(0),
        {"world": 1, "step": 3, "installed_at": 0},
        "m",
    )
    return session, state


LEAVES = st.one_of(
    st.none(),
    st.integers(),
    st.floats(),
    st.text(max_size=5),
    st.just(torch.full((1, 6, 5), torch.nan)),
    st.just(torch.empty(0)),
    st.just(torch.tensor(1.0)),
    st.just(torch.ones(0, 6, 5)),
    st.just(torch.ones(2, 6, 5)),
    st.just(torch.ones(1, 6, 5).to_sparse()),
    st.just(torch.ones(1, 6, 5, device="meta")),
    st.just(torch.ones(1, 6, 5).to(torch.float8_e4m3fn)),
    st.just(torch.ones(1, 6, 5, dtype=torch.int64)),
    st.just(torch.nn.Parameter(torch.ones(1, 6, 5))),
    st.lists(st.integers(), max_size=3),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_whatever_stands_in_a_checkpoint_is_read_or_refused(data):
    session, state = _one_rank()
    for _ in range(data.draw(st.integers(1, 3))):
        place = state
        while True:
            key = data.draw(st.sampled_from(sorted(map(str, place)) or ["x"]))
            deeper = isinstance(place.get(key), dict) and data.draw(st.booleans())
            if not deeper:
                break
            place = place[key]
        if data.draw(st.booleans()):
            place[key] = data.draw(LEAVES)
        else:
            place.pop(key, None)
    try:
        restored = restore([state], session.units, 0, 1, data.draw(st.sampled_from(["error", "fold", "reset"])))
    except ThinwireError:
        return
    assert all(t.isfinite().all() and t.shape == (6, 5) and not t.requires_grad for t in restored.local["w"].values())


def _changed(path, value):
    *inner, last = path.split(".")
    session, state = _one_rank()
    place = state
    for part in inner:
        place = place[part]
    place[last] = value
    return session, state


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("step", 10**5000, "step is int, not a number"),
        ("rank", torch.tensor([torch.nan]), "state of rank nan"),
        ("rank", torch.tensor([0.5]), "state of rank 0.5"),
        ("plan.w", 10**5000, "and int in the checkpoint"),
        ("shared.w", {10**5000: torch.ones(6, 5)}, "has int where a name should be"),
        ("local.w.residual", torch.full((1, 6, 5), 1e300, dtype=torch.float64), "w: .* residual is not finite"),
        ("local.w.residual", torch.ones(()).expand(1, 6, 5), "shape .*, with less in it"),
    ],
    ids=["huge step", "no rank", "half a rank", "huge plan", "huge name", "overflow", "expanded"],
)
def test_what_the_fuzzer_found(path, value, message):
    session, state = _changed(path, value)
    with pytest.raises(ThinwireError, match=message):
        restore(state, session.units, 0, 1, "error")


def test_a_residual_that_overflows_in_the_units_of_the_present_memory_is_refused():
    session, state = _changed("local.w.residual", torch.full((1, 6, 5), 1e38))
    state["plan"]["w"] = state["plan"]["w"].replace('"momentum": 0.9', '"momentum": 0.0')
    with pytest.raises(ThinwireError, match="w: the checkpoint's residual is not finite"):
        restore(state, session.units, 0, 1, "error")


def test_only_what_is_carried_is_pending_in_the_shared_state():
    session, state = _changed("shared.w", {"pending_residual": torch.ones(6, 5), "residual": torch.ones(6, 5)})
    state = {**state, "version": 1}  # from before there were checksums
    del state["checks"]
    restored = restore(state, session.units, 0, 1, "error")
    assert any("its bytes were not checked" in note for note in restored.notes)
    assert list(restored.shared["w"]) == ["pending_residual"]
    assert torch.equal(restored.local["w"]["residual"], state["local"]["w"]["residual"][0])
    assert any("residual has no place" in note for note in restored.notes)


@pytest.mark.parametrize("ranks", [(0, 0), (0,), (0, 1, 1)])
def test_another_world_size_needs_each_rank_once(ranks):
    session, state = _one_rank()
    states = [{**state, "world": 2, "rank": torch.tensor([float(rank)])} for rank in ranks]
    with pytest.raises(ThinwireError, match=f"all 2 ranks, each once, are needed .* and {len(ranks)} are here"):
        restore(states, session.units, 0, 1, "fold")
