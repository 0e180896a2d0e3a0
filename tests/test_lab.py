"""The lab itself: its links have the speed they say, its counters count, and nothing stays behind."""

import contextlib
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from benchmarks.lab import Lab, LabError, features, network, ulink
from benchmarks.lab.__main__ import examine, transfer

pytestmark = pytest.mark.alone

ROOT = Path(__file__).parents[1]
ROUND_TRIP = """
import socket, statistics, sys, time
peer = socket.create_connection((sys.argv[1], 5000))
peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
times = []
for _ in range(40):
    start = time.perf_counter()
    peer.sendall(b"x"), peer.recv(1)
    times.append(time.perf_counter() - start)
print(statistics.median(times))
"""
ECHO = """
import socket
listener = socket.create_server(("", 5000))
print("ready", flush=True)
peer, _ = listener.accept()
peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
while data := peer.recv(1):
    peer.sendall(data)
"""


PYTHON = "/usr/bin/python3" if Path(sys.executable).resolve().is_relative_to("/root") else sys.executable
"""An interpreter that an ordinary user can start too; the lab needs nothing but the standard library."""


@pytest.fixture(autouse=True)
def _possible():
    try:
        features.check()
    except LabError as error:
        pytest.skip(str(error))


def spaces_of(lab):
    return {os.readlink(f"/proc/{space.pid}/ns/net") for space in lab.spaces}


def inhabited(spaces):
    """Those network namespaces that some process is still in; with its last process, the kernel removes one."""
    found = set()
    for process in Path("/proc").glob("[0-9]*/ns/net"):
        with contextlib.suppress(OSError):
            found.add(os.readlink(process))
    return spaces & found


def test_links_have_their_speed_and_counters_count():
    with Lab(hosts=2, link="100mbit") as lab:
        assert lab.congestion == "cubic"
        assert all(found.right for found in examine(lab, "100mbit"))
        lab.rate("400mbit")
        assert all(found.right for found in examine(lab, "400mbit"))


def test_an_ordinary_user_has_the_same_lab():
    nobody = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--bounding-set=-all"]
    if os.geteuid() != 0:
        pytest.skip("the test above has just been run by an ordinary user")
    trial = [*nobody, "unshare", "-rn", PYTHON, "-m", "benchmarks.lab", "--help"]
    if subprocess.run(trial, cwd=ROOT, capture_output=True).returncode:
        pytest.skip(f"uid 65534 may make no namespaces here, or can't start {PYTHON} or read {ROOT}")
    command = [*nobody, PYTHON, "-m", "benchmarks.lab", "--links", "100mbit"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


def test_latency_is_from_host_to_host():
    with Lab(hosts=2, link="1gbit,2ms") as lab:
        server = lab.popen(0, [PYTHON, "-c", ECHO], stdout=subprocess.PIPE, text=True)
        server.stdout.readline()
        seconds = float(lab.run(1, [PYTHON, "-c", ROUND_TRIP, lab.address(0)]))
        queues = [lab.run(host, ["tc", "qdisc", "show", "dev", "eth0"]) for host in range(2)]
        wires = [process.args[-1] for process in lab.started if "ulink" in str(process.args)]
    assert seconds > 0.004
    assert all("delay 1ms" in queue for queue in queues) or wires == ["1000", "1000"], "half on each side"


def test_an_error_leaves_nothing_behind():
    with pytest.raises(subprocess.CalledProcessError), Lab(hosts=2, link="1gbit") as lab:  # noqa: PT012
        spaces = spaces_of(lab)
        lab.popen(1, ["sleep", "100"])
        lab.run(0, ["false"])
    assert not inhabited(spaces)


HOLD = """
import os, time
from benchmarks.lab import Lab
with Lab() as lab:
    lab.popen(0, ["sleep", "100"])
    print(*(os.readlink(f"/proc/{space.pid}/ns/net") for space in lab.spaces), flush=True)
    time.sleep(100)
"""


def test_being_killed_leaves_nothing_behind():
    process = subprocess.Popen([PYTHON, "-c", HOLD], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    spaces = set(process.stdout.readline().split())
    assert len(inhabited(spaces)) == 3
    process.kill()
    process.communicate()
    deadline = time.monotonic() + 5.0
    while inhabited(spaces) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not inhabited(spaces)


def test_two_labs_at_once():
    with Lab(hosts=2, link="100mbit") as one, Lab(hosts=2, link="400mbit") as other:
        assert not spaces_of(one) & spaces_of(other)
        assert transfer(one, [(0, 1)], 2_000_000)[0] < 1.02e8
        assert transfer(other, [(0, 1)], 8_000_000)[0] > 2e8


def test_a_missing_feature_is_named(monkeypatch):
    missing = "fq_none (CONFIG_NET_SCH_FQ_NONE)"
    monkeypatch.setitem(features.NEEDED, missing, ("tc", "qdisc", "add", "dev", "lo", "root", "fq_none"))
    with pytest.raises(LabError, match=r"this kernel has no fq_none \(CONFIG_NET_SCH_FQ_NONE\)"), Lab():
        pass


def test_latency_without_netem_or_compiler_is_refused(monkeypatch):
    monkeypatch.setattr(features, "has_netem", lambda: False)
    monkeypatch.setattr(ulink, "COMPILERS", ())
    ulink.program.cache_clear()
    with pytest.raises(LabError, match=r"CONFIG_NET_SCH_NETEM.*install gcc"), Lab(link="1gbit,1ms"):
        pass


@pytest.mark.parametrize("link", ["fast", "1gbps", "1gbit,2", ""])
def test_links_that_are_not_understood(link):
    with pytest.raises(LabError, match="100mbit"):
        network.parse(link)
