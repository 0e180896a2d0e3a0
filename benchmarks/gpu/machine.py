"""Description of the machine, and a check of what all else depends on: CUDA, Triton's compiler, NCCL."""

import shutil
import subprocess
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.gpu.found import begin


def compiled() -> str:
    """Triton needs a C compiler and Python's headers for the code that launches its kernels."""
    from thinwire.core.loops import Accumulation, Cut, Pass
    from thinwire.kernels.select import choose

    x = torch.ones(1000, device="cuda")
    kernels, note = choose("cuda", x.device)
    work = Pass(Accumulation(None), x, torch.zeros_like(x), torch.zeros_like(x), None, None)
    kernels.accumulate([work], [Cut(torch.tensor(0.5, device="cuda"), 3)])
    torch.cuda.synchronize()
    return f"kernels: {kernels.name}{note or ''}"


def reduced() -> str:
    dist.init_process_group(
        "nccl", store=dist.HashStore(), rank=0, world_size=1, device_id=torch.device("cuda", 0)
    )  # fmt: skip
    x = torch.ones(3, device="cuda")
    dist.all_reduce(x, async_op=True).get_future().wait()
    torch.cuda.synchronize()
    dist.destroy_process_group()
    return f"NCCL {'.'.join(map(str, torch.cuda.nccl.version()))}"


def described() -> str:
    own: Any = torch.cuda.get_device_properties(0)
    parts = [f"{torch.cuda.device_count()} x {own.name}", f"{own.total_memory / 2**30:.0f} GiB"]
    parts += [f"CUDA {torch.version.cuda}", f"compute capability {own.major}.{own.minor}"]
    if (program := shutil.which("nvidia-smi")) is not None:
        argv = [program, "--query-gpu=driver_version,clocks.max.mem", "--format=csv,noheader"]
        done = subprocess.run(argv, capture_output=True, text=True, timeout=20)
        if done.returncode == 0:
            parts.append(f"driver and memory clock {done.stdout.splitlines()[0]}")
    compilers = [name for name in ("gcc", "clang", "cc") if shutil.which(name)]
    return ", ".join([*parts, f"C compilers: {', '.join(compilers) or 'none'}"])


def main() -> None:
    args, found = begin(__doc__)
    if args.device != "cuda":
        found.note(f"on {args.device}, which shows that the code runs and nothing else")
        return
    for case, work in (("device", described), ("triton", compiled), ("nccl", reduced)):
        if (said := found.attempt(case, work)) is not None:
            found.note(said)


if __name__ == "__main__":
    main()
