"""Measured link speed: latency and bandwidth, fitted to a few timed all-gathers.

The model is that of ``Link``: ``seconds = (N-1) (latency + nbytes * 8 / bandwidth)`` for an all-gather of ``nbytes``.
The fit minimises squared relative errors, so that small messages count as much as large ones.
"""

import json
import math
import statistics
import time

import numpy as np
import torch

from thinwire.comm.collectives import Collective
from thinwire.comm.link import Link
from thinwire.comm.texts import heard

SIZES = (2**10, 2**15, 2**18, 2**20)
REPEATS = 5
FASTEST = 1e13
"""Bits per second, assumed if there is only one rank."""


def measure(collective: Collective, timeout: float, device: torch.device | None = None) -> Link:
    """Time a few all-gathers and fit a link to the mean over ranks of their medians. A collective call: all agree."""
    if collective.world == 1:
        return Link(FASTEST)
    medians: list[float] = []
    for nbytes in SIZES:
        message = torch.zeros(nbytes, dtype=torch.uint8, device=device)
        _seconds(collective, message, timeout)  # the first use opens the connections
        medians.append(statistics.median(_seconds(collective, message, timeout) for _ in range(REPEATS)))
    said = heard(collective.exchange_text(json.dumps(medians)), _read_times, "list of times")
    means = [statistics.fmean(times) for times in zip(*said, strict=True)]
    found = fit(list(zip(SIZES, means, strict=True)), collective.world)
    # the last bits of a fit may differ between machines; ranks that then choose different routes would hang
    return heard(collective.exchange_text(json.dumps((found.bandwidth, found.latency)))[:1], _read_link, "link")[0]


def fit(timed: list[tuple[int, float]], world: int) -> Link:
    """Fit a link to (bytes, seconds) of timed all-gathers."""
    messages = world - 1
    rows = np.array([[messages / seconds, messages * nbytes * 8 / seconds] for nbytes, seconds in timed])
    latency, per_bit = np.linalg.lstsq(rows, np.ones(len(timed)), rcond=None)[0]
    if per_bit <= 0 or latency < 0:  # noise: set the negative one aside and fit the other to one end
        nbytes, seconds = timed[-1]
        return Link(messages * nbytes * 8 / seconds, 0.0 if latency < 0 else timed[0][1] / messages)
    return Link(1 / float(per_bit), float(latency))


def _read_times(text: str) -> list[float]:
    times = [float(seconds) for seconds in json.loads(text)]
    if len(times) != len(SIZES) or not all(0 < seconds < math.inf for seconds in times):
        raise ValueError(f"{text:.40}")
    return times


def _read_link(text: str) -> Link:
    bandwidth, latency = map(float, json.loads(text))
    if not (0 < bandwidth < math.inf and 0 <= latency < math.inf):
        raise ValueError(f"{text:.40}")
    return Link(bandwidth, latency)


def _seconds(collective: Collective, message: torch.Tensor, timeout: float) -> float:
    started = time.perf_counter()
    collective.all_gather(message).wait(timeout, on_host=True)
    if message.is_cuda:
        torch.cuda.synchronize(message.device)
    return time.perf_counter() - started
