"""torchft: the snippet of docs/engines.md, a replica that leaves and comes back, resuming, and what is refused."""

import os
import warnings
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

import thinwire
from tests.integrations.common import MORE, STEPS, batch, flat, needs, small_model, snippet
from tests.world import free_port

pytestmark = needs("torchft")


def _lighthouse(rank):
    """Where replicas find each other: rank 0 keeps it."""
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "RUST_LOG": "error"}
    from torchft.coordination import LighthouseServer

    server = LighthouseServer("[::]:0", 2, join_timeout_ms=200, heartbeat_timeout_ms=1000) if rank == 0 else None
    address = [server.address() if server else None]
    dist.broadcast_object_list(address)
    os.environ["TORCHFT_LIGHTHOUSE"] = address[0]
    return server


def _begin(code, rank, seed):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torchft's imports
        port = free_port()
        os.environ["MASTER_PORT"] = str(port)
        store = dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
        names = {"model": small_model(seed), "torch": torch, "store": store, "number": rank}
        exec(code, names)
    return names


def _step(names, rank, step):
    names["optimizer"].zero_grad()
    names["ddp"](batch(rank, step)).square().mean().backward()
    names["optimizer"].step()


def _average(names, x):
    """What the replicas make of x, and what the manager reports."""
    manager = names["manager"]
    manager.start_quorum()
    manager.allreduce(x).wait()
    return x, manager.errored()


def _run(rank, code, folder):
    server = _lighthouse(rank)
    first = _begin(code, rank, rank)  # the model of rank 1 is replaced by that of rank 0
    manager, group = first["manager"], first["group"]
    while manager.current_step() < STEPS:
        _step(first, rank, manager.current_step())
    state = {"calls": group.calls, "manager": manager.state_dict(), **first["save"]()}
    torch.save(state, folder / f"saved-{rank}.pt")
    for step in range(STEPS, STEPS + MORE):
        _step(first, rank, step)
    sent, unbroken = (group.wire_bytes, group.dense_bytes), flat(first["model"])
    dist.barrier()
    manager.shutdown()

    second = _begin(code, rank, 2)
    saved = torch.load(folder / f"saved-{rank}.pt", weights_only=True)
    second["load"](saved)
    second["manager"].load_state_dict(saved["manager"])
    second["group"].calls = saved["calls"]
    for step in range(STEPS, STEPS + MORE):
        _step(second, rank, step)
    resumed = flat(second["model"])
    dist.barrier()

    if rank == 1:  # it is lost, and begins anew while the other goes on
        second["manager"].shutdown()
        second = _begin(code, rank, 3)
    _step(second, rank, STEPS + MORE)
    joined = flat(second["model"]), second["group"].calls
    dist.barrier()
    averages = _averages(second, rank)
    dist.barrier()
    second["manager"].shutdown()
    del server
    return unbroken, resumed, sent, joined, averages


def _averages(names, rank):
    """Of tensors that differ by rank, and of one of which a replica has lost track."""
    normal = torch.randn(5001, generator=torch.Generator().manual_seed(rank))
    broken = normal.clone()
    broken[7] = float("nan") if rank == 1 else 1.0
    found = {"normal": normal.clone(), "half": normal.bfloat16(), "broken": broken, "small": normal[:100].clone()}
    found = {key: _average(names, x)[0] for key, x in found.items()}
    assert names["manager"].should_commit()
    group = names["group"]
    group._said, group.calls = f"what rank {rank} says", group.calls  # as after a change of replicas
    _, error = _average(names, normal.clone())
    assert not names["manager"].should_commit()
    return found | {"normal_sent": normal, "error": str(error.original_exception)}


def test_snippet_checkpoint_and_replicas_that_change(world, tmp_path):
    one, two = world.run(_run, snippet("torchft"), tmp_path, timeout=120.0)
    for unbroken, resumed, (sent, dense), _, averages in (one, two):
        assert torch.equal(unbroken, one[0])
        assert torch.equal(resumed, one[0])
        assert sent < 0.3 * dense
        assert "this replica has what rank" in averages["error"]
    (there, calls), (here, same) = one[3], two[3]
    assert torch.equal(there, here)
    assert not torch.equal(there, one[1])
    assert calls == same > STEPS
    mean = (one[4]["normal_sent"] + two[4]["normal_sent"]) / 2
    for key in ("normal", "half", "broken", "small"):
        assert torch.equal(one[4][key].nan_to_num(9.0), two[4][key].nan_to_num(9.0))
    assert torch.equal(one[4]["small"], mean[:100])
    for key in ("normal", "half"):
        assert 0 < (one[4][key].float() - mean).norm() < 0.02 * mean.norm()
    assert one[4]["broken"][7].isnan()
    assert one[4]["broken"].isnan().sum() < 1000


class Mine(thinwire.compressors.Quantize):
    """A compressor that nobody could name to the other replicas."""


def test_only_compressors_that_need_no_memory():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from thinwire.integrations.torchft import CompressedProcessGroup

    with pytest.raises(thinwire.ThinwireError, match="TopK is biased"):
        CompressedProcessGroup(None, thinwire.compressors.TopK(0.01))
    with pytest.raises(thinwire.ThinwireError, match="compressor=PowerSGD needs matrices"):
        CompressedProcessGroup(None, thinwire.compressors.PowerSGD(2))
    with pytest.raises(thinwire.ThinwireError, match="Mine is not registered"):
        CompressedProcessGroup(None, Mine(8))


def test_what_the_inner_group_says_and_is_told():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from thinwire.integrations.torchft import CompressedProcessGroup

    calls, error = [], RuntimeError("aborted")
    inner = SimpleNamespace(
        errored=lambda: error, abort=lambda: calls.append("abort"), shutdown=lambda: calls.append("shutdown")
    )
    group = CompressedProcessGroup(inner, thinwire.compressors.Quantize(8))
    assert group.errored() is error
    group.abort()
    group.shutdown()
    assert calls == ["abort", "shutdown"]
    assert group.parent is inner
