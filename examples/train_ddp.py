"""Train a small character model with DDP and Deep Gradient Compression.

    torchrun --nproc-per-node 2 examples/train_ddp.py
    torchrun --nproc-per-node 2 examples/train_ddp.py --method dense

On several machines, start it on each with torchrun's own ``--nnodes``, ``--node-rank`` and ``--rdzv-endpoint``.
The lines that concern thinwire are marked.
"""

import argparse

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_

import thinwire  # <- thinwire
from thinwire.cli import text as demo_text
from thinwire.cli.demo_models import CharLM, loss_of

CLIP = 1.0


def method_named(name: str, steps: int) -> thinwire.Method:
    if name == "dgc":  # clips on each rank, before its momentum: see docs/architecture.md
        return thinwire.dgc(density=0.001, warmup=thinwire.Warmup(max(4, steps // 20)), clip=CLIP)
    return {"topk": thinwire.topk(0.01), "fp16": thinwire.cast("float16"), "dense": thinwire.dense()}[name]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", choices=("dgc", "topk", "fp16", "dense"), default="dgc")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--hidden", type=int, default=256)
    args = parser.parse_args()

    cuda = torch.cuda.is_available()
    dist.init_process_group("nccl" if cuda else "gloo")
    rank = dist.get_rank()
    device = torch.device("cuda", rank % torch.cuda.device_count()) if cuda else torch.device("cpu")

    text = demo_text.load()
    torch.manual_seed(0)
    model = CharLM(len(text.vocabulary), hidden=args.hidden).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    ddp = DistributedDataParallel(model)
    method = method_named(args.method, args.steps)
    wire = thinwire.attach(ddp, method, optimizer=optimizer)  # <- thinwire: the one line

    for step in range(args.steps):
        loss = loss_of(ddp, text.batch(step, rank, 16, 32).to(device))
        optimizer.zero_grad()
        loss.backward()
        if method.clip is None:  # dgc has clipped already
            clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        if rank == 0 and step % 50 == 0:
            print(f"step {step:>4}  loss {loss.item():.3f}", flush=True)

    with torch.no_grad():
        held_out = loss_of(model, text.held_out_batch(64, 128).to(device)).item()
    if rank == 0:
        print(f"held-out loss {held_out:.3f}\n\n{wire.report()}")  # <- thinwire
    wire.detach()  # <- thinwire
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
