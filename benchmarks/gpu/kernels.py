"""DGC's kernels on the device, relative to the time that moving the touched state would take at the speed of a copy.

The floor of the pass is 20 bytes an element (g, u, v are read, u', v' written), 12 with bfloat16 states, and 4 more
where the gradient is cleared, all at the speed of a copy of (g, u, v) measured in the same rounds.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.found import Found, begin, milliseconds
from benchmarks.kernels import Case, Copy, Direct
from thinwire.core.loops import Accumulation, Cut, Kernels, Pass
from thinwire.kernels.reference import BLOCK, REFERENCE
from thinwire.kernels.select import choose

DENSITY = 0.001
SIZES = {"25.6M": 25_600_000, "200M": 200_000_000}
TINY = {"0.3M": 300_000}
Timed = tuple[Callable[[], object], Callable[[], object], float]
"""The preparation, the timed function, and the bytes an element that it must move."""


def passed(n: int, state: torch.dtype, clear: bool) -> Pass:
    g = torch.randn(n)
    v, new_v, u, new_u = (torch.randn(n).to(state) for _ in range(4))
    return Pass(Accumulation(0.9), g, v, new_v, u, new_u, 1.0, clear)


def launch(work: Pass) -> Callable[[], object]:
    """The Triton kernel alone, without what is selected afterwards."""
    from thinwire.kernels import cuda

    n = work.grad.numel()
    blocks = -(-n // BLOCK)
    tensors: tuple[Tensor | None, ...] = (
        work.grad, work.old_momentum, work.old_residual, work.new_momentum, work.new_residual
    )  # fmt: skip
    maxima = torch.empty(blocks, dtype=torch.int32)
    grid = (-(-blocks // cuda.ROWS),)
    kernel: Any = cuda._accumulate
    return lambda: kernel[grid](
        *tensors, maxima, n, 0.9, 1.0, 1, work.clear, cuda.ROWS, BLOCK, enable_fp_fusion=False
    )  # fmt: skip


def nothing() -> None:
    pass


def cases(n: int, kernels: Kernels) -> dict[str, Callable[[], Timed]]:
    """Functions that build each, on the default device."""
    found: dict[str, Callable[[], Timed]] = {}

    def copy() -> Timed:
        case = Copy(n)
        return case.prepare, case.run, 24.0

    def kernel(state: torch.dtype) -> Timed:
        return nothing, launch(passed(n, state, clear=False)), 4.0 + 4 * state.itemsize

    def selected(state: torch.dtype) -> Timed:
        work = passed(n, state, clear=True)
        fresh, k = work.grad.clone(), int(n * DENSITY)
        sampled = kernels.sample(replace(work, clear=False), 0, 1024, 32)
        cut = Cut(kernels.kth(sampled, max(1, int(sampled.numel() * DENSITY * 4 / 3))), k, 0.8, 10)
        return (lambda: work.grad.copy_(fresh)), (lambda: kernels.accumulate([work], [cut])), 8.0 + 4 * state.itemsize

    def whole(own: Kernels, state: torch.dtype) -> Timed:
        case = Case(n, DENSITY, own, None if state == torch.float32 else "bfloat16", torch.float32)
        return case.prepare, case.run, 8.0 + 4 * state.itemsize

    def direct() -> Timed:
        case = Direct(n, DENSITY)
        return case.prepare, case.run, 24.0

    found["copy"] = copy
    for state, name in ((torch.float32, "fp32"), (torch.bfloat16, "bf16")):
        found[f"kernel/{name}"] = lambda state=state: kernel(state)
        found[f"kernel_and_selection/{name}"] = lambda state=state: selected(state)
        found[f"dgc/{name}"] = lambda state=state: whole(kernels, state)
    found["dgc_reference/fp32"] = lambda: whole(REFERENCE, torch.float32)
    found["abs_topk/fp32"] = direct
    return found


def measure(found: Found, size: str, n: int, kernels: Kernels, rounds: int, end: float) -> None:
    """All cases of a size in turn; ``end``: seconds that must be left."""
    built: dict[str, Timed] = {}
    taken: dict[str, list[float]] = {}

    def ready(build: Callable[[], Timed]) -> Timed:
        with torch.device(found.device):
            timed = build()
        for _ in range(2):  # compile, and touch the memory
            timed[0]()
            timed[1]()
        return timed

    for name, build in cases(n, kernels).items():
        timed = found.attempt(f"{size}/{name}", lambda build=build: ready(build))
        if timed is not None:
            built[name], taken[name] = timed, []
    for done in range(rounds):
        if done and found.left < end:
            found.note(f"{size}: {done} of {rounds} rounds, for want of time")
            break
        for name, (prepare, run, _) in built.items():
            prepare()
            taken[name].append(milliseconds(found.device, run))
    if "copy" not in taken:
        return
    for name, times in taken.items():
        nbytes = built[name][2] * n
        floors = [nbytes / (24.0 * n / ref) for ref in taken["copy"]]
        found.put(f"{size}/{name}", "ms", times)
        found.put(f"{size}/{name}", "gb_per_s", [nbytes / ms / 1e6 for ms in times])
        found.put(f"{size}/{name}", "ratio_to_floor", [ms / floor for ms, floor in zip(times, floors, strict=True)])
    found.write()


def main() -> None:
    args, found = begin(__doc__)
    torch.manual_seed(0)
    kernels, note = choose("cuda", torch.device(args.device))
    if note:
        found.note(note)
    sizes, whole = (TINY if args.tiny else SIZES), found.left
    for i, (size, n) in enumerate(sizes.items()):
        left_at_the_end = whole * (1 - (i + 1) / len(sizes)) + 3.0 * (not args.tiny)
        found.attempt(
            size,
            lambda size=size, n=n, left=left_at_the_end: measure(found, size, n, kernels, 2 if args.tiny else 15, left),
        )
        if args.device == "cuda":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
