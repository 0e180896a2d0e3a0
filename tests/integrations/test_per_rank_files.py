"""The files of each rank in the folder of a checkpoint, and what a framework must be."""

import resource

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import thinwire
from tests.integrations.common import batch, memory, small_model
from thinwire.integrations import frameworks, per_rank_files


def _trained(rank, steps, group=None):
    model = small_model(0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    ddp = DistributedDataParallel(model, process_group=group)
    wire = thinwire.attach(ddp, thinwire.topk(0.02), optimizer=optimizer, kernels="reference")
    for step in range(steps):
        ddp(batch(rank, step)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return wire


def _saved_and_loaded(rank, folder):
    wire = _trained(rank, 3)
    per_rank_files.load(wire, folder / "nothing", strict=False)
    with pytest.raises(thinwire.ThinwireError, match="saved without an attached session"):
        per_rank_files.load(wire, folder / "nothing")
    folder.mkdir(exist_ok=True)
    (folder / f"thinwire-rank{rank}-of-5.pt").write_bytes(b"of an earlier run")
    target = folder / f"thinwire-rank{rank}-of-2.pt"
    (folder.parent / f"victim{rank}").write_text("precious")
    target.symlink_to(folder.parent / f"victim{rank}")  # planted
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))  # a full disk
    try:
        with pytest.raises(thinwire.ThinwireError, match=rf"can't write {target}: File too large"):
            per_rank_files.save(wire, folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert target.is_symlink()
    per_rank_files.save(wire, folder)
    assert not target.is_symlink()
    assert (folder.parent / f"victim{rank}").read_text() == "precious"
    dist.barrier()
    saved = memory(wire)
    wire.detach()
    fresh = _trained(rank, 1)
    per_rank_files.load(fresh, folder)
    assert torch.equal(memory(fresh), saved)
    fresh.detach()
    own = [dist.new_group([other]) for other in range(2)][rank]
    alone = _trained(rank, 1, own)
    with pytest.raises(thinwire.ThinwireError, match="choose on_world_change='fold'"):
        per_rank_files.load(alone, folder)
    per_rank_files.load(alone, folder, "fold")
    folded = memory(alone)
    alone.detach()
    return saved, folded


def _damaged(rank, folder):
    wire = _trained(rank, 1)
    before = memory(wire)
    with pytest.raises(
        thinwire.ThinwireError,
        match=r"rank1-of-2.pt (can't be read|is missing)" if rank else r"on rank 1: .*rank1-of-2.pt",
    ):
        per_rank_files.load(wire, folder)
    assert torch.equal(memory(wire), before)
    wire.detach()


def test_every_rank_has_its_file(world2, tmp_path):
    folder = tmp_path / "saved"
    (one, folded), (two, other) = world2.run(_saved_and_loaded, folder)
    assert sorted(path.name for path in folder.iterdir()) == ["thinwire-rank0-of-2.pt", "thinwire-rank1-of-2.pt"]
    assert not torch.equal(one, two)
    torch.testing.assert_close(folded, (one + two) / 2)
    assert torch.equal(folded, other)
    path = folder / "thinwire-rank1-of-2.pt"
    path.write_bytes(path.read_bytes()[:100])
    world2.run(_damaged, folder)
    path.unlink()
    world2.run(_damaged, folder)


def test_only_folders_of_this_machine():
    with pytest.raises(thinwire.ThinwireError, match="s3://bucket/run is not on a filesystem of this machine"):
        per_rank_files._local("s3://bucket/run")


def test_a_framework_that_is_missing_or_too_old():
    with pytest.raises(ImportError, match=r"pip install 'thinwire\[lightning\]'"):
        frameworks.framework("no_such_module", "lightning", "2.2")
    with pytest.raises(thinwire.ThinwireError, match=r"lightning 1\.9\.5 is installed, .* needs 2\.2 or later"):
        frameworks.check_version("lightning", "1.9.5", "2.2")
    frameworks.check_version("lightning", "2.10.0.post1", "2.2")
