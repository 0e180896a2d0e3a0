"""Train a character transformer with local updates: AdamW on each worker, and an exchange every 50 steps.

    torchrun --nproc-per-node 2 examples/train_diloco.py
    torchrun --nproc-per-node 2 examples/train_diloco.py --method sparse_loco --every 30

The loop is that of one worker: nothing in it communicates. The lines that concern thinwire are marked.
"""

import argparse

import torch
import torch.distributed as dist
from torch.nn.utils import clip_grad_norm_

import thinwire  # <- thinwire
from thinwire import methods  # <- thinwire
from thinwire.cli import text as demo_text
from thinwire.cli.demo_models import loss_of, transformer

RECIPES = {
    "diloco": lambda every: methods.diloco(every),
    "streaming": lambda every: methods.streaming_diloco(every, fragments=2, delay=max(1, every // 8)),
    "sparse_loco": lambda every: methods.sparse_loco(every),
    "co2": lambda every: methods.co2(every),
    "updates": lambda every: methods.updates(thinwire.topk(0.01, values="int4")),  # every step
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", choices=RECIPES, default="diloco")
    parser.add_argument("--every", type=int, default=50, help="inner steps in a round")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--width", type=int, default=96)
    args = parser.parse_args()

    cuda = torch.cuda.is_available()
    dist.init_process_group("nccl" if cuda else "gloo")
    rank = dist.get_rank()
    device = torch.device("cuda", rank % torch.cuda.device_count()) if cuda else torch.device("cpu")

    text = demo_text.load()
    torch.manual_seed(0)
    model = transformer(len(text.vocabulary), width=args.width, length=32).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.steps)
    method = RECIPES[args.method](args.every)
    wire = thinwire.attach(model, method, optimizer=optimizer, process_group=dist.group.WORLD)  # <- thinwire

    for step in range(args.steps):
        loss = loss_of(model, text.batch(step, rank, 16, 32).to(device))
        optimizer.zero_grad()
        loss.backward()
        clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()  # ends a round after each ``every`` steps
        schedule.step()
        if rank == 0 and step % 50 == 0:
            print(f"step {step:>4}  loss {loss.item():.3f}", flush=True)

    wire.detach()  # <- thinwire: ends the last round, so that all workers hold the same model
    with torch.no_grad():
        held_out = loss_of(model, text.held_out_batch(64, 32).to(device)).item()
    if rank == 0:
        print(f"held-out loss {held_out:.3f}\n\n{wire.report()}")  # <- thinwire
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
