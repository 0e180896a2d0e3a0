"""A rank that dies, a rank that is late, and what a session leaves behind."""

import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch.distributed as dist

import thinwire
from tests.engines.models import batch, build, loss_of, train_ddp
from tests.world import free_port
from thinwire import ThinwireError, dgc, topk
from thinwire.comm.collectives import exchange_failed
from thinwire.comm.simulated import Local

ROOT = Path(__file__).parents[2]

STEPS, EVERY = 16, 5
# others test the compiled kernels, which every process would take seconds to make
ELASTIC = [
    str(ROOT / "examples" / "elastic.py"),
    "--kernels",
    "reference",
    "--steps",
    str(STEPS),
    "--every",
    str(EVERY),
]


def start_ranks(world, arguments, **more):
    environment = {
        **os.environ, "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()),
        "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}", **more,
    }  # fmt: skip
    return [
        subprocess.Popen(
            [sys.executable, *map(str, arguments)], env={**environment, "RANK": str(rank)}, text=True, cwd=ROOT,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for rank in range(world)
    ]  # fmt: skip


def finish(processes):
    """What each of them printed, and complained of, at the end; a hang is an error."""
    try:
        return [process.communicate(timeout=100) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()


def losses(output):
    return {int(line.split()[1]): line.split()[3] for line in output.splitlines() if " loss " in line}


def run_elastic(folder, *arguments, restarts=0):
    ranks = start_ranks(4, [*ELASTIC, "--folder", folder, *arguments], TORCHELASTIC_RESTART_COUNT=str(restarts))
    outputs = finish(ranks)
    return [process.returncode for process in ranks], [error for _, error in outputs], losses(outputs[0][0])


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    codes, errors, found = run_elastic(tmp_path_factory.mktemp("unbroken"))
    assert codes == [0] * 4, errors
    assert sorted(found) == list(range(STEPS))
    return found


@pytest.mark.parametrize("repeat", range(int(os.environ.get("THINWIRE_KILLS", "1"))))
def test_a_killed_rank_is_named_nobody_hangs_and_a_restart_goes_on(unbroken, tmp_path, repeat):
    # not in the first two steps nor right after a checkpoint, where others may be in a collective that is not ours
    step = random.Random(repeat).choice([step for step in range(2, STEPS) if step % EVERY])
    victim = 3 * repeat % 4
    codes, errors, before = run_elastic(tmp_path, "--die-at", step, "--die-rank", victim)
    for rank, (code, error) in enumerate(zip(codes, errors, strict=True)):
        if rank == victim:
            assert code == -signal.SIGKILL
            continue
        assert code == 1
        assert f"ThinwireError: step {step}: the exchange of" in error, error[-2000:]
        assert "Restart from the last checkpoint" in error
        if victim:  # rank 0 holds the store in which survivors say that they live
            assert f"failed on rank {rank}; rank {victim} seems to be gone" in error
        else:
            assert re.search(rf"failed on rank {rank}; ranks? 0\b", error)
    codes, errors, after = run_elastic(tmp_path, "--die-at", step, "--die-rank", victim, restarts=1)
    assert codes == [0] * 4, errors
    assert sorted(before) == list(range(step))
    assert sorted(after) == list(range(step // EVERY * EVERY, STEPS)), "not from the last checkpoint"
    assert before | after == after | before == unbroken


def _straggler(rank):
    model, optimizer = build()
    from torch.nn.parallel import DistributedDataParallel

    ddp = DistributedDataParallel(model)
    wire = thinwire.attach(ddp, topk(0.05), optimizer=optimizer, timeout=20.0, kernels="reference")
    for step in range(3):
        if rank == 1 and step == 1:
            time.sleep(1.0)
        optimizer.zero_grad()
        loss_of(ddp, batch(rank, step)).backward()
        optimizer.step()
    steps, saved = wire.step, wire.ledger.ratio
    wire.detach()
    return steps, saved


def test_a_straggler_only_slows(world2):
    for steps, ratio in world2.run(_straggler):
        assert steps == 3
        assert ratio > 1


LATE = """
import sys, time
import torch, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
import thinwire
from tests.engines.models import batch, build, loss_of
dist.init_process_group("gloo")
rank = dist.get_rank()
model, optimizer = build()
ddp = DistributedDataParallel(model)
wire = thinwire.attach(ddp, thinwire.dgc(0.02), optimizer=optimizer, timeout=2.0, kernels="reference")
for step in range(2):  # DDP's own collective, the bucket rebuild, is in the second forward
    optimizer.zero_grad()
    loss_of(ddp, batch(rank, step)).backward()
    optimizer.step()
if rank == 1:
    time.sleep(5)
    sys.exit(0)
optimizer.zero_grad()
loss_of(ddp, batch(rank, 1)).backward()
"""


@pytest.mark.alone
def test_a_rank_that_does_not_come_is_an_error_after_the_timeout():
    first, second = start_ranks(2, ["-c", LATE])
    _, error = first.communicate(timeout=100)  # a hang is an error
    finish([second])
    assert first.returncode == 1
    assert "ThinwireError: step 2: the exchange of" in error
    assert "timed out after 2 s" in error


def _threads(rank):
    def count():
        return threading.active_count(), len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))

    train_ddp(rank, dgc(0.05), 2, emulate_link="1gbit")[1].detach()
    dist.barrier()
    before = count()
    for _ in range(5):
        train_ddp(rank, dgc(0.05), 3, emulate_link="1gbit")[1].detach()
    dist.barrier()
    return before, count()


def test_detach_leaves_no_thread_and_no_file(world2):
    for before, after in world2.run(_threads):
        assert after[0] == before[0]
        assert after[1] <= before[1] + 1
        assert after[2] <= before[2] + 1


def test_a_failed_exchange_names_what_it_knows():
    error = exchange_failed(Local.of(1)[0], 0, ["w"], RuntimeError("connection closed\nmore"))
    assert isinstance(error, ThinwireError)
    assert str(error).startswith("step 0: the exchange of w failed on rank 0: connection closed.")


def _torchrun(*args):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", "5"]
    environment = {
        **os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        "TORCH_GLOO_LAZY_INIT": "1",
        "MASTER_PORT": str(free_port()),
    }  # fmt: skip
    done = subprocess.run(
        [*command, "--master-port", environment["MASTER_PORT"], *ELASTIC[:3], *map(str, args)],
        capture_output=True, text=True, timeout=150, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return [line.split(" loss ") for line in done.stdout.splitlines() if " loss " in line]


def test_a_restarted_job_ends_like_an_unbroken_one(tmp_path):
    unbroken = _torchrun("--folder", tmp_path / "a", "--steps", 16)
    broken = _torchrun("--folder", tmp_path / "b", "--steps", 16, "--die-at", 13)
    assert len(broken) > 16, "nothing was restarted"
    assert dict(broken) == dict(unbroken)
    assert broken[-1] == unbroken[-1]
