"""Ray Train: the snippet of docs/engines.md, with workers that fail and are started anew from Ray's own checkpoint."""

import os
import sys
from functools import partial

import torch

from tests.integrations.common import batch, flat, needs, small_model, snippet, written
from tests.world import World

pytestmark = needs("ray", "pyarrow")


def _train(folder, ddp, optimizer, step):
    """The first workers are lost after the last step, and so train the last five again."""
    import ray.train

    rank = ray.train.get_context().get_world_rank()
    ddp(batch(rank, step)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    if step == 24:
        before = folder / f"unbroken-{rank}.pt"
        torch.save(flat(ddp), folder / f"resumed-{rank}.pt" if before.exists() else before)
        torch.distributed.barrier()  # both have written
        if not (folder / f"resumed-{rank}.pt").exists():
            raise RuntimeError("this worker is lost")


def _build():
    sys.modules.setdefault("numba", None)  # as in ``common.environment``
    return small_model(0)


def _run(rank, code, folder):
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0", "OMP_NUM_THREADS": "1"}
    os.environ["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] = "0.2"
    import ray

    ray.init(num_cpus=2, include_dashboard=False, object_store_memory=100 * 2**20, log_to_driver=False)
    names = {"torch": torch, "build": _build, "train": partial(_train, folder), "storage": str(folder)}
    exec(code, names)
    result = names["result"]
    ray.shutdown()
    return result.metrics["wire_bytes"], result.checkpoint.path


def test_snippet_checkpoint_and_workers_started_anew(tmp_path):
    world = World(1)
    try:
        ((sent, saved),) = world.run(_run, snippet("Ray Train"), tmp_path, timeout=240.0)
    finally:
        world.stop()
    unbroken = torch.load(tmp_path / "unbroken-0.pt")
    for rank in range(2):
        assert torch.equal(torch.load(tmp_path / f"unbroken-{rank}.pt"), unbroken)
        assert torch.equal(torch.load(tmp_path / f"resumed-{rank}.pt"), unbroken)
    one, two = (written(f"{saved}/thinwire-rank{rank}-of-2.pt") for rank in range(2))
    assert one.norm() > 0
    assert not torch.equal(one, two)
    assert 0 < sent < 20 * 4 * unbroken.numel() / 3
