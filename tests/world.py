"""Worlds of real processes, of gloo by default, that stay alive between tests: to start takes seconds."""

import contextlib
import os
import socket
import traceback
from multiprocessing import get_context
from multiprocessing.connection import Connection

import torch
import torch.distributed as dist

MOST_GROUPS = 12
"""Process groups that tests may leave in a world."""


class World:
    """``run(fn, *args)`` calls ``fn(rank, *args)`` on every rank and answers the results in rank order."""

    def __init__(self, size: int, backend: str = "gloo") -> None:
        self.size, self.backend = size, backend
        self.pipes: list[Connection] = []
        self.processes = []
        self.groups = 0

    def start(self) -> None:
        context = get_context("spawn")
        rendezvous = f"tcp://127.0.0.1:{free_port()}"
        for rank in range(self.size):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve, args=(rank, self.size, rendezvous, theirs, self.backend), daemon=True
            )
            process.start()
            self.pipes.append(ours)
            self.processes.append(process)

    def run(self, fn, *args, timeout: float = 60.0) -> list:
        if not self.processes or not all(process.is_alive() for process in self.processes):
            self.stop()
            self.start()
        for pipe in self.pipes:
            pipe.send((fn, args))
        answers = []
        for rank, pipe in enumerate(self.pipes):
            if not pipe.poll(timeout):
                self.stop()
                raise TimeoutError(f"rank {rank} did not answer within {timeout} s: a hang")
            try:
                answers.append(pipe.recv())
            except EOFError:
                code = self.processes[rank].exitcode
                self.stop()
                raise AssertionError(f"rank {rank} died with exit code {code}") from None
        self.groups = max(groups for *_, groups in answers)
        if failed := [(rank, text) for rank, (ok, text, _) in enumerate(answers) if not ok]:
            self.stop()  # the others may be in the middle of a collective
            raise AssertionError("\n".join(f"rank {rank}:\n{text}" for rank, text in failed))
        return [value for _, value, _ in answers]

    def stop_if_crowded(self) -> None:
        """End the processes where many groups are left in them: each has threads that wake 100 times a second."""
        if self.groups > MOST_GROUPS:
            self.stop()

    def stop(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()
        self.processes, self.pipes, self.groups = [], [], 0


def _serve(rank: int, size: int, rendezvous: str, pipe: Connection, backend: str) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    options = {}
    if backend == "nccl":
        torch.cuda.set_device(rank)
        options["device_id"] = torch.device("cuda", rank)
    dist.init_process_group(backend, init_method=rendezvous, rank=rank, world_size=size, **options)
    with contextlib.suppress(EOFError):
        while True:
            fn, args = pipe.recv()
            try:
                pipe.send((True, fn(rank, *args), _groups()))
            except BaseException:
                pipe.send((False, traceback.format_exc(), _groups()))


def _groups() -> int:
    return len(dist.distributed_c10d._world.pg_map)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
