"""A real network between two hosts on one machine, in namespaces: a link that is cut and comes back, or does not."""

import contextlib
import subprocess
import sys
import time

import pytest
from benchmarks import truth
from benchmarks.lab import Lab, LabError

from tests.engines.test_faults import ROOT

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
longest = 0.0
for step in range(int(sys.argv[2])):  # no collective but the exchange: what it does not do can't hang in another
    before = time.monotonic()
    optimizer.zero_grad()
    loss_of(ddp, batch(rank, wire.step)).backward()
    optimizer.step()
    longest = max(longest, time.monotonic() - before)
    if wire.step == 20:
        print("running", flush=True)
    time.sleep(0.01)
print(f"steps {wire.step} longest {longest:.2f} sum {sum(p.sum().item() for p in model.parameters()):.9f}", flush=True)
wire.detach()
"""


@pytest.fixture
def lab():
    """Two hosts on links of 100 Mb/s."""
    with contextlib.ExitStack() as stack:
        try:
            lab = stack.enter_context(Lab(hosts=2, link="100mbit"))
        except LabError as error:
            pytest.skip(str(error))
        yield lab


def train(lab, timeout, steps):
    pipes = {"text": True, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    argv = [sys.executable, "-c", TRAIN, str(timeout), str(steps)]
    ranks = [lab.popen(rank, argv, env, cwd=ROOT, **pipes) for rank, env in enumerate(lab.rendezvous(2))]
    assert ranks[0].stdout.readline().strip() == "running"
    return ranks


@pytest.mark.alone
def test_a_link_cut_for_two_seconds_only_slows(lab):
    ranks = train(lab, timeout=30.0, steps=150)
    lab.cut(1)
    time.sleep(2.0)
    lab.restore(1)
    outputs = [rank.communicate(timeout=60) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], outputs
    lines = [out.split() for out, _ in outputs]
    assert lines[0][-1] == lines[1][-1], "replicas drifted apart"
    assert float(lines[0][3]) > 1.5, "nothing was cut"


@pytest.mark.alone
def test_a_link_cut_beyond_the_timeout_is_an_error(lab):
    ranks = train(lab, timeout=3.0, steps=1_000_000)
    lab.cut(1)
    for rank in ranks:
        _, error = rank.communicate(timeout=40)
        assert rank.returncode != 0
        assert "ThinwireError: step" in error, error[-1500:]


@pytest.mark.usefixtures("lab")
@pytest.mark.parametrize(("workers", "steps"), [(2, 30), (4, 3)])
def test_the_ledger_books_what_the_interfaces_count(workers, steps):
    rows = truth.measure(workers, "10gbit", steps)  # bytes, not time
    assert all(map(truth.true, rows)), rows
    figures = {(row.case.rpartition("/")[2], row.metric): row.value for row in rows}
    for name in ("cast", "topk", "dgc"):
        assert figures[name, "tcp_bytes"] < 0.55 * figures["dense", "tcp_bytes"]
