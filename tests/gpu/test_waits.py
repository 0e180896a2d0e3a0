"""On CUDA the host does not wait from gradient to gradient, and once at the end of a step."""

import contextlib
import traceback
import warnings

import pytest
import torch

from tests.gpu.training import CUDA, DEVICE, attached, data, loss_of
from tests.kernels.test_waits import METHODS, journey, planned

WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "Memcpy DtoH", "Memcpy HtoD")


@contextlib.contextmanager
def refused(on: bool):
    """Inside it, whatever makes the host wait for CUDA raises."""
    if not on:
        yield
        return
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def gradients(units, workers):
    grads = [[torch.randn(unit.own.shape, device=DEVICE) for unit in units] for _ in workers]
    return grads, [[torch.full_like(grad, torch.nan) for grad in each] for each in grads]


@pytest.mark.parametrize(("values", "state"), METHODS)
def test_the_journey_waits_for_nothing(kernels, values, state):
    units, bucket, workers = planned(kernels, values, state, DEVICE)
    for step in range(4):
        grads, outs = gradients(units, workers)
        dense = sum(grad.nbytes for grad in grads[0])
        with refused(CUDA and step > 1):  # compiled, and all memory at hand
            sent = journey(bucket, workers, grads, outs, step, kernels)
        assert sent < 0.1 * dense
        for unit, mine, theirs in zip(units, *outs, strict=True):
            assert torch.equal(mine, theirs)
            assert mine.isfinite().all()
            assert mine.any()
            unit.shared.commit()
            for worker in workers:
                worker.local[unit.name].commit()


@pytest.mark.cuda
def test_the_debug_mode_sees_a_wait():
    with refused(True), pytest.raises(RuntimeError, match="synchroniz"):
        torch.ones(3, device=DEVICE).sum().item()


@pytest.mark.cuda
def test_the_profiler_sees_no_wait_either(kernels):
    units, bucket, workers = planned(kernels, "float16", "float32", DEVICE)
    for step in range(3):
        grads, outs = gradients(units, workers)
        torch.cuda.synchronize()
        activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities) as profile:
            with torch.profiler.record_function("journey"):
                journey(bucket, workers, grads, outs, step, kernels)
            with torch.profiler.record_function("a wait"):
                outs[0][0].sum().item()
        for unit in units:
            unit.shared.commit()
            for worker in workers:
                worker.local[unit.name].commit()
    found = {}
    for name in ("journey", "a wait"):
        on_host = (e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CPU)
        ranges = [e.time_range for e in on_host if e.name == name]
        inside = [e.name for r in ranges for e in profile.events() if r.start <= e.time_range.start <= r.end]
        found[name] = [one for one in inside if one.startswith(WAITS)]
    if not found["a wait"]:
        pytest.skip("the profiler does not show calls of the CUDA runtime here")
    assert not found["journey"]


@pytest.mark.cuda
@pytest.mark.parametrize("where", ["bare", "ddp"])
def test_a_step_waits_once(group, where):
    """To learn whether a gradient was not finite, before the optimizer steps."""
    model, optimizer, wire = attached(where, "dgc")
    places = []

    def note(message, *_, **__):
        if "synchroniz" in str(message):
            places.append("".join(traceback.format_stack(limit=14)[:-1]))

    for step in range(14):
        x = data(0, step)
        last = step == 13  # nothing is looked at twice there
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.showwarning = note
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("warn" if last else "default")
            optimizer.zero_grad()
            loss_of(model, x).backward()
            optimizer.step()
            torch.cuda.set_sync_debug_mode("default")
    wire.detach()
    assert len(places) == 1, f"{len(places)} waits in a step:\n" + "\n-- and --\n".join(places)
