"""A real network between two hosts on one machine, in namespaces: a link that is cut and comes back, or does not."""

import os
import shutil
import subprocess
import sys
import time

import pytest

from tests.engines.test_faults import ROOT
from tests.world import free_port

TRAIN = """
import sys, time
import torch, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
import thinwire
from tests.engines.models import batch, build, loss_of
torch.set_num_threads(1)
dist.init_process_group("gloo")
rank = dist.get_rank()
model, optimizer = build()
ddp = DistributedDataParallel(model)
wire = thinwire.attach(ddp, thinwire.dgc(0.02), optimizer=optimizer, timeout=float(sys.argv[1]))
start, longest = time.monotonic(), 0.0
while True:
    before = time.monotonic()
    optimizer.zero_grad()
    loss_of(ddp, batch(rank, wire.step)).backward()
    optimizer.step()
    longest = max(longest, time.monotonic() - before)
    if wire.step == 20:
        print("running", flush=True)
    go_on = torch.tensor([float(time.monotonic() - start < float(sys.argv[2]))])
    dist.broadcast(go_on, 0)
    if not go_on.item():
        break
print(f"steps {wire.step} longest {longest:.2f} sum {sum(p.sum().item() for p in model.parameters()):.9f}", flush=True)
wire.detach()
"""


def ip(*args, check=True):
    return subprocess.run(["ip", *args], check=check, capture_output=True, text=True)


@pytest.fixture
def lab():
    """Two network namespaces, tw0 and tw1, and a link of 100 Mb/s between them."""
    if sys.platform != "linux" or os.geteuid() != 0 or not shutil.which("ip") or not shutil.which("tc"):
        pytest.skip("a lab of network namespaces needs Linux, root and iproute2")
    names = [f"tw{os.getpid()}-{i}" for i in range(2)]
    try:
        for name in names:
            if ip("netns", "add", name, check=False).returncode:
                pytest.skip("this machine allows no network namespaces")
        ip("link", "add", "twa", "netns", names[0], "type", "veth", "peer", "name", "twb", "netns", names[1])
        for i, (name, device) in enumerate(zip(names, ("twa", "twb"), strict=True)):
            ip("-n", name, "link", "set", "lo", "up")
            ip("-n", name, "link", "set", device, "name", "eth0")
            ip("-n", name, "addr", "add", f"10.78.0.{i + 1}/24", "dev", "eth0")
            ip("-n", name, "link", "set", "eth0", "up", "gso_max_size", "8192")
            shape = [
                "tc",
                "qdisc",
                "add",
                "dev",
                "eth0",
                "root",
                "tbf",
                "rate",
                "100mbit",
                "burst",
                "16kb",
                "limit",
                "8mb",
            ]
            subprocess.run(["ip", "netns", "exec", name, *shape], check=True)
        yield names
    finally:
        for name in names:
            ip("netns", "del", name, check=False)


def train(names, timeout, seconds):
    environment = {
        **os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "10.78.0.1", "MASTER_PORT": str(free_port()),
        "GLOO_SOCKET_IFNAME": "eth0", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT),
    }  # fmt: skip
    ranks = [
        subprocess.Popen(
            ["ip", "netns", "exec", name, sys.executable, "-c", TRAIN, str(timeout), str(seconds)], text=True, cwd=ROOT,
            env={**environment, "RANK": str(rank)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for rank, name in enumerate(names)
    ]  # fmt: skip
    assert ranks[0].stdout.readline().strip() == "running"
    return ranks


def test_a_link_cut_for_two_seconds_only_slows(lab):
    ranks = train(lab, timeout=30.0, seconds=6.0)
    ip("-n", lab[1], "link", "set", "eth0", "down")
    time.sleep(2.0)
    ip("-n", lab[1], "link", "set", "eth0", "up")
    outputs = [rank.communicate(timeout=60) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], outputs
    lines = [out.split() for out, _ in outputs]
    assert lines[0][-1] == lines[1][-1], "replicas drifted apart"
    assert float(lines[0][3]) > 1.5, "nothing was cut"


def test_a_link_cut_beyond_the_timeout_is_an_error(lab):
    ranks = train(lab, timeout=3.0, seconds=60.0)
    ip("-n", lab[1], "link", "set", "eth0", "down")
    for rank in ranks:
        try:
            _, error = rank.communicate(timeout=40)
        finally:
            rank.kill()
        assert rank.returncode != 0
        assert "ThinwireError: step" in error, error[-1500:]
