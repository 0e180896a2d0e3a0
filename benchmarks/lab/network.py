"""The lab: network namespaces joined by a bridge, every link shaped in both directions.

    host 0: eth0 ==== p0 \\
    host 1: eth0 ==== p1 -- br0      (the bridge in a namespace of its own: the switch)

The namespaces have no names: each is held by a ``cat`` that ends when this process ends, however it ends, and the
kernel removes a namespace with its last process. So labs can't collide, and nothing can stay behind.

What was measured and shaped it:

* tbf must be at both ends. A burst below the largest packet makes the kernel cut packets in software, which
  costs a third of 1 Gb/s; a larger burst is free credit for just those small messages that compression sends.
* BBR under tbf both ways shares a link 953 : 656; cubic is fair. It can be pinned on a route, also by a user.
* A packet may be up to ``gso_max_size`` long and counts as one in the counters, with one header.
"""

import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.lab import features, ulink
from benchmarks.lab.features import LabError, program
from benchmarks.lab.processes import Hosts

HEADERS = 14 + 20 + 32
"""Bytes of Ethernet, IP and TCP (with time stamps) in front of every packet that an interface counts."""
QUEUE = "8mb"
SIZES = ((200e6, 8192, "16kb"), (2e9, 16384, "32kb"), (float("inf"), 65536, "256kb"))
"""(up to this bandwidth, gso_max_size, burst of tbf)"""


@dataclass(frozen=True)
class Counters:
    """Counters of an interface; a packet above the MTU counts once, with one header."""

    tx_bytes: int
    tx_packets: int
    rx_bytes: int
    rx_packets: int

    def __sub__(self, earlier: "Counters") -> "Counters":
        pairs = zip(vars(self).values(), vars(earlier).values(), strict=True)
        return Counters(*(now - before for now, before in pairs))

    @staticmethod
    def read(process: int | str, device: str) -> "Counters":
        """The counters of ``device`` in the network namespace of a process, or of ``"self"``."""
        for line in Path(f"/proc/{process}/net/dev").read_text().splitlines():
            name, _, numbers = line.partition(":")
            if name.strip() == device:
                n = [int(number) for number in numbers.split()]
                return Counters(n[8], n[9], n[0], n[1])
        raise LabError(f"no interface {device!r} in the network namespace of process {process}")


def parse(link: str) -> tuple[float, float]:
    """Bits per second and seconds, as ``thinwire.comm.link`` reads them; a lab starts without waiting for torch."""
    found = re.fullmatch(r"([\d.]+)(kbit|mbit|gbit)(?:, *([\d.]+)(us|ms|s))?", link)
    if not found:
        raise LabError(f"link {link!r} is not understood; write 100mbit, 1gbit or 100mbit,0.5ms")
    latency = float(found[3] or 0) * {"us": 1e-6, "ms": 1e-3, "s": 1.0}[found[4] or "s"]
    return float(found[1]) * {"kbit": 1e3, "mbit": 1e6, "gbit": 1e9}[found[2]], latency


class Lab(Hosts):
    """Hosts on a switch.

    Args:
        hosts: how many, at least 1.
        link: bandwidth of every host's link each way, and perhaps the latency from host to host, one way:
            ``"1gbit"``, ``"100mbit,0.5ms"``; None leaves the links unshaped.

    Raises:
        LabError: on entering: the machine lacks something; the message names it.

    Example::

        with Lab(hosts=2, link="1gbit") as lab:
            server = lab.popen(0, ["iperf3", "-s", "-1"])
            print(lab.run(1, ["iperf3", "-c", lab.address(0)]))
            lab.rate("100mbit")
            lab.cut(1), lab.restore(1)
            print(lab.counters(1).tx_bytes)
    """

    device = "eth0"

    def __init__(self, hosts: int = 2, link: str | None = "1gbit") -> None:
        if not 1 <= hosts <= 250:
            raise LabError(f"a lab has 1 to 250 hosts, not {hosts}")
        super().__init__(hosts)
        self.bandwidth, self.latency = parse(link) if link else (None, 0.0)
        self.congestion = "cubic"
        """The congestion control of the hosts: cubic, or the kernel's own where a route can't say which."""
        self.spaces: list[subprocess.Popen] = []  # of the hosts; the switch is the last
        self.last_port = 29400

    def __enter__(self) -> "Lab":
        features.check()
        try:
            for _ in range(self.hosts + 1):
                self.spaces.append(self._space())
            self._switch("ip", "link", "add", "br0", "type", "bridge")
            self._up(self.spaces[-1], "br0")
            for host in range(self.hosts):
                self._connect(host)
            if self.bandwidth:
                self._shape(self.bandwidth)
        except BaseException:
            self.close()
            raise
        return self

    def close(self) -> None:
        super().close()
        while self.spaces:
            space = self.spaces.pop()
            space.kill()
            space.communicate()

    # -- in mid-run ------------------------------------------------------------------------------------------------

    def rate(self, bandwidth: str, host: int | None = None) -> None:
        """Change the bandwidth of one host's link, or of all; connections stand."""
        rate, latency = parse(bandwidth)
        if latency:
            raise LabError(f"rate({bandwidth!r}): a lab keeps the latency that it began with; give a bandwidth alone")
        self._shape(rate, host)

    def cut(self, host: int) -> None:
        """Pull the host's cable out of the switch; connections stand until they time out."""
        self._switch("ip", "link", "set", f"p{host}", "down")

    def restore(self, host: int) -> None:
        """Put the cable back."""
        self._switch("ip", "link", "set", f"p{host}", "up")

    def counters(self, host: int) -> Counters:
        """Return the counters of the host's interface."""
        return Counters.read(self.spaces[host].pid, self.device)

    # -- hosts -----------------------------------------------------------------------------------------------------

    def address(self, host: int) -> str:
        return f"10.77.0.{host + 1}"

    def free_port(self) -> int:
        self.last_port += 1  # nobody else lives here
        return self.last_port

    def inside(self, host: int) -> list[str]:
        return self._dying_with_us(self.spaces[host])

    def _dying_with_us(self, space: subprocess.Popen) -> list[str]:
        """To the kernel, "us" is the thread that starts the process: let it be one that stays."""
        return [*self._enter(space), program("setpriv"), "--pdeathsig", "KILL", "--"]

    def _enter(self, space: subprocess.Popen) -> list[str]:
        user = ["-U", "--preserve-credentials"] if "-rn" in features.unshare() else []
        return [program("nsenter"), "-t", str(space.pid), *user, "-n"]

    def _space(self) -> subprocess.Popen:
        """A new namespace; an ordinary user's are all in the user namespace of the first."""
        command = list(features.unshare())
        if self.spaces and "-rn" in command:
            command = [*self._enter(self.spaces[0]), program("unshare"), "-n"]
        space = subprocess.Popen([*command, "cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        space.stdin.write(b"ready\n")
        space.stdin.flush()
        if not space.stdout.readline():
            space.communicate()
            raise LabError("a network namespace could not be made; is user.max_net_namespaces reached?")
        return space

    def _tool(self, space: subprocess.Popen, *command: str, must: bool = True) -> bool:
        argv = [*self._enter(space), program(command[0]), *command[1:]]
        done = subprocess.run(argv, capture_output=True, text=True)
        if done.returncode and must:
            raise LabError(f"{' '.join(command)}: {done.stderr.strip()}")
        return done.returncode == 0

    def _switch(self, *command: str) -> None:
        self._tool(self.spaces[-1], *command)

    def _host(self, host: int, *command: str, must: bool = True) -> bool:
        return self._tool(self.spaces[host], *command, must=must)

    def _up(self, space: subprocess.Popen, device: str) -> None:
        self._tool(space, "ip", "link", "set", device, "addrgenmode", "none", must=False)  # IPv6 would chat on its own
        self._tool(space, "ip", "link", "set", device, "up")

    # -- links -----------------------------------------------------------------------------------------------------

    @property
    def _by_ulink(self) -> bool:
        return self.latency > 0 and not features.has_netem()

    def _connect(self, host: int) -> None:
        inner, outer = str(self.spaces[host].pid), str(self.spaces[-1].pid)
        port = f"w{host}" if self._by_ulink else f"p{host}"
        self._switch("ip", "link", "add", "eth0", "netns", inner, "type", "veth", "peer", "name", port, "netns", outer)
        if self._by_ulink:  # eth0 = w | ulink | q = p: ulink carries packets between two interfaces
            self._switch("ip", "link", "add", f"q{host}", "type", "veth", "peer", "name", f"p{host}")
            for device in (f"w{host}", f"q{host}"):
                self._up(self.spaces[-1], device)
        self._switch("ip", "link", "set", f"p{host}", "master", "br0")
        self._up(self.spaces[-1], f"p{host}")
        for device in ("lo", "eth0"):
            self._up(self.spaces[host], device)
        self._host(host, "ip", "addr", "add", f"{self.address(host)}/24", "dev", "eth0")
        route = ("ip", "route", "change", "10.77.0.0/24", "dev", "eth0", "src", self.address(host))
        if not self._host(host, *route, "congctl", "lock", "cubic", must=False):
            self.congestion = Path("/proc/sys/net/ipv4/tcp_congestion_control").read_text().strip()
        if self._by_ulink:
            argv = [str(ulink.program()), f"w{host}", f"q{host}", f"{self.latency / 2 * 1e6:.0f}"]
            self.started.append(
                subprocess.Popen([*self._dying_with_us(self.spaces[-1]), *argv], start_new_session=True)
            )

    def _shape(self, bandwidth: float, host: int | None = None) -> None:
        gso, burst = next((gso, burst) for limit, gso, burst in SIZES if bandwidth <= limit)
        shape = ["tbf", "rate", f"{bandwidth:.0f}bit", "burst", burst, "limit", QUEUE]
        for i in range(self.hosts) if host is None else [host]:
            for space, device in ((self.spaces[i], "eth0"), (self.spaces[-1], f"p{i}")):
                self._tool(space, "ip", "link", "set", device, "gso_max_size", str(gso))
                for qdisc in self._qdiscs(shape):
                    self._tool(space, "tc", "qdisc", "replace", "dev", device, *qdisc)

    def _qdiscs(self, shape: Sequence[str]) -> list[list[str]]:
        if not self.latency or self._by_ulink:
            return [["root", *shape]]
        delay = f"{self.latency / 2 * 1e6:.0f}us"
        return [
            ["root", "handle", "1:", "netem", "delay", delay, "limit", "100000"],
            ["parent", "1:1", "handle", "10:", *shape],
        ]
