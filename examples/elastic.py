"""Survive a lost worker: torchrun restarts the job, which goes on from the last checkpoint, residuals included.

    export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 TORCH_GLOO_LAZY_INIT=1
    torchrun --nproc-per-node 2 --max-restarts 3 examples/elastic.py --folder run

The variables are for gloo, which otherwise finds the addresses of the workers that are gone in the store of torchrun.
``--die-at 13`` kills the last rank (or ``--die-rank``) at that step, once, to see it happen. The losses are those of an
unbroken run.
"""

import argparse
import os
import signal
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed import checkpoint as dcp
from torch.nn.parallel import DistributedDataParallel

import thinwire
from thinwire.cli import text as demo_text
from thinwire.cli.demo_models import CharLM, loss_of
from thinwire.core import files


def save(folder: Path, step: int, state: dict) -> None:
    dcp.save(state, checkpoint_id=folder / f"step-{step}")
    if dist.get_rank() == 0:  # the name is written last, so it never points at half a checkpoint
        files.write_text(folder / "latest", str(step))
    dist.barrier()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--every", type=int, default=5, help="steps between checkpoints")
    parser.add_argument("--kernels", default="auto", help="as for thinwire.attach")
    parser.add_argument("--die-at", type=int)
    parser.add_argument("--die-rank", type=int, default=-1, help="which rank it is that dies; -1 is the last one")
    args = parser.parse_args()
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    args.folder.mkdir(parents=True, exist_ok=True)

    text = demo_text.load()
    torch.manual_seed(0)
    model = CharLM(len(text.vocabulary), 32, 64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    ddp = DistributedDataParallel(model)
    wire = thinwire.attach(ddp, thinwire.dgc(0.01), optimizer=optimizer, timeout=60.0, kernels=args.kernels)

    # DGC has taken the momentum into its memory, so the optimizer holds no state of its own
    state = {"model": model.state_dict(), "wire": wire}
    first = 0
    if (args.folder / "latest").exists():
        first = int((args.folder / "latest").read_text())
        dcp.load(state, checkpoint_id=args.folder / f"step-{first}")
        model.load_state_dict(state["model"])

    victim = args.die_rank % dist.get_world_size()
    for step in range(first, args.steps):
        if step == args.die_at and rank == victim and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
            os.kill(os.getpid(), signal.SIGKILL)
        loss = loss_of(ddp, text.batch(step, rank, 4, 16))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if rank == 0:
            print(f"step {step} loss {loss.item():.9f}", flush=True)
        if (step + 1) % args.every == 0:
            save(args.folder, step + 1, {"model": model.state_dict(), "wire": wire})
    wire.detach()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
