"""Processes on hosts, which end with the ``with`` block that started them."""

import contextlib
import os
import signal
import socket
import subprocess
from collections.abc import Mapping, Sequence
from typing import Any


class Hosts:
    """``popen`` and ``run`` start programs on a host; here all hosts are this machine, on its loopback."""

    device = "lo"

    def __init__(self, hosts: int) -> None:
        self.hosts = hosts
        self.started: list[subprocess.Popen] = []

    def inside(self, host: int) -> list[str]:
        """Return the words before a command that run it on this host."""
        return []

    def address(self, host: int) -> str:
        return "127.0.0.1"

    def free_port(self) -> int:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            return listener.getsockname()[1]

    def popen(self, host: int, argv: Sequence[str], env: Mapping[str, str] | None = None, **options: Any):
        """``subprocess.Popen`` on a host; ``env`` is added to this process's own."""
        process = subprocess.Popen(
            [*self.inside(host), *argv], env={**os.environ, **(env or {})}, start_new_session=True, **options
        )
        self.started.append(process)
        return process

    def run(self, host: int, argv: Sequence[str], env: Mapping[str, str] | None = None, timeout: float = 60.0) -> str:
        """Run a program and return its output.

        Raises:
            CalledProcessError: it failed; its standard error goes to ours.
            TimeoutExpired: it did not end in ``timeout`` seconds, and has been killed.
        """
        process = self.popen(host, argv, env, text=True, stdout=subprocess.PIPE)
        try:
            out, _ = process.communicate(timeout=timeout)
        finally:
            _end(process)
        if process.returncode:
            raise subprocess.CalledProcessError(process.returncode, argv, out)
        return out

    def rendezvous(self, world: int) -> list[dict[str, str]]:
        """The environment of each rank of a job, one rank a host, for ``init_process_group("gloo")``."""
        shared = {
            "MASTER_ADDR": self.address(0), "MASTER_PORT": str(self.free_port()), "WORLD_SIZE": str(world),
            "GLOO_SOCKET_IFNAME": self.device, "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        return [{**shared, "RANK": str(rank)} for rank in range(world)]

    def __enter__(self):
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End whatever still runs."""
        while self.started:
            _end(self.started.pop())


def _end(process: subprocess.Popen) -> None:
    if process.returncode is None:  # not awaited yet, so that its number can't be another's
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)  # its group: its children go too
        process.wait()
    for pipe in (process.stdin, process.stdout, process.stderr):
        if pipe is not None:
            pipe.close()
