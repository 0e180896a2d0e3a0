"""Train a small character model with Hugging Face Accelerate and Deep Gradient Compression.

    accelerate launch --num-processes 2 examples/train_accelerate.py --folder run
    accelerate launch --num-processes 2 examples/train_accelerate.py --folder run --resume --steps 400

``torchrun`` starts it as well. The lines that concern thinwire are marked.
"""

import argparse

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed

import thinwire  # <- thinwire
from thinwire.cli import text as demo_text
from thinwire.cli.demo_models import CharLM, loss_of
from thinwire.integrations.accelerate import attach  # <- thinwire


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--folder", help="where to save a checkpoint at the end")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --folder")
    args = parser.parse_args()

    accelerator = Accelerator(cpu=not torch.cuda.is_available())  # without that, it stays alone on CPUs
    text, rank = demo_text.load(), accelerator.process_index
    set_seed(0)
    model = CharLM(len(text.vocabulary), hidden=args.hidden)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    model, optimizer = accelerator.prepare(model, optimizer)
    method = thinwire.dgc(density=0.01, clip=1.0)  # clips on each rank: no accelerator.clip_grad_norm_() below
    wire = attach(accelerator, model, method, optimizer=optimizer)  # <- thinwire: the one line

    if args.resume:
        accelerator.load_state(args.folder)  # with every rank's residuals
        accelerator.print(f"goes on from step {wire.step}")
    for step in range(wire.step, args.steps):
        loss = loss_of(model, text.batch(step, rank, 16, 32).to(accelerator.device))
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 0:
            accelerator.print(f"step {step:>4}  loss {loss.item():.3f}", flush=True)

    if args.folder:
        accelerator.save_state(args.folder)  # writes thinwire-rank<r>-of-<world>.pt too, on every rank
    accelerator.print(f"last loss {loss.item():.3f}\n\n{wire.report()}")  # <- thinwire
    wire.detach()  # <- thinwire


if __name__ == "__main__":
    main()
