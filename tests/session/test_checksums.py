"""Any bit that turns in what a checkpoint holds is found, and named."""

import copy
import random

import pytest
import torch
import torch.distributed as dist
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.nn.parallel import DistributedDataParallel

import thinwire
from tests.engines.models import build
from thinwire import ThinwireError
from thinwire.comm.simulated import Local
from thinwire.integrations import per_rank_files
from thinwire.session import checksums
from thinwire.session.checkpoint import restore, save
from thinwire.session.rounds import OptimizerSteps
from thinwire.session.session import Session

METHODS = {
    "dgc": lambda: thinwire.dgc(0.1),
    "topk": lambda: thinwire.topk(0.1),
    "ef21": lambda: thinwire.ef21(0.1),
    "bfloat16": lambda: thinwire.dgc(0.1, state_dtype="bfloat16"),
}


def _saved(name, world=1):
    torch.manual_seed(0)
    named = [("w", torch.nn.Parameter(torch.randn(6, 5))), ("b", torch.nn.Parameter(torch.randn(3)))]
    momentum = {} if name == "ef21" else {"momentum": 0.9}
    optimizer = torch.optim.SGD([param for _, param in named], lr=0.1, **momentum)
    session = Session(named, METHODS[name](), Local.of(1)[0], OptimizerSteps(optimizer))
    for state in (*session.workers[0].local.values(), *(unit.shared for unit in session.units)):
        for tensor in state.now.values():
            tensor.normal_()
    states = []
    for rank in range(world):
        session.workers[0].rank = rank
        for state in session.workers[0].local.values():
            for tensor in state.now.values():
                tensor.add_(1)
        clock = {"world": world, "step": 3, "installed_at": 0}
        text = session.method.to_json()
        states.append(save(session.units, session.workers[0], lambda t, like=None: t.unsqueeze(0), clock, text))
    return session, states


@pytest.mark.parametrize("name", METHODS)
def test_every_bit_of_every_tensor(name):
    session, (state,) = _saved(name)
    assert restore(state, session.units, 0, 1, "error").notes == []
    rng, found = random.Random(0), 0
    for part in ("local", "shared"):
        for unit, tensors in state[part].items():
            for key, tensor in tensors.items():
                flat = tensor.view(-1).view(torch.uint8)
                for at, bit in [(rng.randrange(len(flat)), bit) for bit in range(8)]:
                    flat[at] ^= 1 << bit
                    with pytest.raises(ThinwireError, match=f"{unit}: .*{key}"):
                        restore(state, session.units, 0, 1, "error")
                    flat[at] ^= 1 << bit
                    found += 1
    assert found >= 8
    assert restore(state, session.units, 0, 1, "error").notes == []


def test_all_else_that_it_says():
    session, (state,) = _saved("dgc")
    for path, value in {
        "step": 4, "installed_at": 1, "method": "{}", "plan.w": state["plan"]["w"].replace("0.1", "0.3"), "version": 3,
        "checks.layout": state["checks"]["layout"].replace("w", "v"), "checks.said": "0" * 16, "checks": None,
        "checks.rows": state["checks"]["rows"] + 1, "rank": torch.tensor([1.0]), "shard": torch.tensor([0.0, 1.0]),
        "local.w.residua1": torch.ones(1, 6, 5), "shared.w.more": torch.ones(6, 5),
    }.items():  # fmt: skip
        changed = copy.deepcopy(state)
        *inner, last = path.split(".")
        place = changed
        for part in inner:
            place = place[part]
        assert value != place.get(last) if not isinstance(value, torch.Tensor) else True
        place[last] = value
        with pytest.raises(ThinwireError):
            restore(changed, session.units, 0, 1, "error")


@pytest.mark.parametrize("how", ["fold", "reset"])
def test_each_rank_of_another_world(how):
    session, states = _saved("dgc", world=3)
    restore(states, session.units, 0, 1, how)
    for rank in range(3):
        flat = states[rank]["local"]["w"]["residual"].view(-1).view(torch.uint8)
        flat[7] ^= 1
        with pytest.raises(ThinwireError, match=rf"w: the local residual of rank {rank} is not what was saved"):
            restore(states, session.units, 0, 1, how)
        flat[7] ^= 1


def test_a_checksum_tells_what_a_sum_does_not():
    x = torch.randn(5000)
    swapped = x.clone()
    swapped[0], swapped[4000] = x[4000].clone(), x[0].clone()
    signs = x.clone()
    signs[[1, 4097]] *= -1
    all_of_it = [x, swapped, signs, x.bfloat16(), x.half(), x[:4999], x.double(), torch.zeros(0), torch.zeros(1)]
    assert len({checksums.checksum(each) for each in all_of_it}) == len(all_of_it)
    wide = torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)
    assert checksums.checksum(wide) == checksums.checksum(wide.contiguous())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8, torch.float64])
def test_a_piece_that_begins_anywhere(dtype):
    whole = torch.arange(4 * 3001).remainder(97).to(dtype).view(4, 3001)
    for view in (*whole, whole[1:], whole[0, 3:], whole[3, 5:6], whole[:, 1], whole[1, 1:1]):
        assert checksums.checksum(view) == checksums.checksum(view.clone())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_odd_numbers_of_elements_in_the_rows_of_a_folder(dtype):
    named = [("w", torch.nn.Parameter(torch.randn(7, 5))), ("v", torch.nn.Parameter(torch.randn(33, 63)))]
    optimizer = torch.optim.SGD([param for _, param in named], lr=0.1, momentum=0.9)
    session = Session(named, thinwire.dgc(0.1, state_dtype=dtype), Local.of(1)[0], OptimizerSteps(optimizer))
    states = []
    for session.workers[0].rank in range(3):
        for state in session.workers[0].local.values():
            for tensor in state.now.values():
                tensor.normal_()
        clock, text = {"world": 3, "step": 3, "installed_at": 0}, session.method.to_json()
        states.append(save(session.units, session.workers[0], lambda t, like=None: t.unsqueeze(0), clock, text))
    whole = copy.deepcopy(states[0])
    for unit, tensors in whole["local"].items():
        for key in tensors:
            tensors[key] = torch.cat([state["local"][unit][key] for state in states])
    whole["rank"] = torch.cat([state["rank"] for state in states])
    whole["checks"]["rows"] = torch.cat([state["checks"]["rows"] for state in states])
    for rank in range(3):
        restored = restore(whole, session.units, rank, 3, "error")
        assert torch.equal(restored.local["w"]["residual"], states[rank]["local"]["w"]["residual"][0])
        assert torch.equal(restored.local["v"]["residual"], states[rank]["local"]["v"]["residual"][0])
    mean = whole["local"]["v"]["residual"].float().mean(0)
    folded = [restore(whole, session.units, rank, 2, "fold").local["v"]["residual"].float() for rank in range(2)]
    torch.testing.assert_close(sum(folded) / 2, mean, rtol=0.02, atol=0.02)
    assert not restore(whole, session.units, 0, 2, "reset").local["v"]["residual"].any()


def _turned(rank, folder):
    model, optimizer = build()
    wire = thinwire.attach(DistributedDataParallel(model), thinwire.dgc(0.05), optimizer=optimizer)
    for key, tensor in wire.workers[0].local["middle.weight"].now.items():
        tensor.copy_(torch.arange(tensor.numel()).view_as(tensor) + rank + 0.01 * (key == "residual"))
    expected = {k: t.clone() for k, t in wire.workers[0].local["middle.weight"].now.items()}
    per_rank_files.save(wire, folder / "beside")
    dcp.save({"wire": wire}, checkpoint_id=f"{folder}/dcp")
    dist.barrier()
    one_row = expected["residual"].numpy().tobytes()
    heard = []
    for place, load in (
        ("beside", lambda: per_rank_files.load(wire, folder / "beside")),
        ("dcp", lambda: wire.load(f"{folder}/dcp")),
        ("dcp", lambda: dcp.load({"wire": wire}, checkpoint_id=f"{folder}/dcp")),
    ):
        load()
        assert all(torch.equal(expected[k], t) for k, t in wire.workers[0].local["middle.weight"].now.items())
        path, good = None, b""
        if rank == 1:  # a bit of rank 1's residual
            path = next(p for p in (folder / place).iterdir() if one_row in p.read_bytes())
            good = path.read_bytes()
            bad = bytearray(good)
            bad[good.index(one_row) + 777] ^= 4
            path.write_bytes(bad)
        dist.barrier()
        try:
            load()
        except (ThinwireError, CheckpointException) as error:
            heard.append(str(error))
        dist.barrier()
        if path is not None:
            path.write_bytes(good)
        dist.barrier()
    wire.detach()
    return heard


def test_files_and_folders_of_two_ranks(world2, tmp_path):
    for heard in world2.run(_turned, tmp_path):
        assert len(heard) == 3
        for text in heard:
            assert "middle.weight: the local residual of rank 1 is not what was saved" in text
        assert "thinwire-rank1-of-2.pt" in heard[0]
        assert f"{tmp_path}/dcp" in heard[1]
