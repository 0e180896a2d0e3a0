"""Fine-tune a small GPT without gradients: two forward passes a step, and 4 bytes between the ranks.

    python examples/finetune_zo.py
    torchrun --nproc-per-node 2 examples/finetune_zo.py
    torchrun --nproc-per-node 4 examples/finetune_zo.py --pertp --offload

The base model is trained on help topics first, by AdamW on each rank alike; it is fine-tuned on Python code. On several
machines, start it on each with torchrun's own ``--nnodes``, ``--node-rank`` and ``--rdzv-endpoint``.
The lines that concern thinwire are marked.
"""

import argparse
import copy
import inspect
import os
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

import thinwire  # <- thinwire
from thinwire.cli import text as demo_text
from thinwire.cli.demo_models import Transformer, loss_of, transformer

LENGTH = 64


def base_model(text: demo_text.Text, steps: int) -> Transformer:
    torch.manual_seed(0)
    model = transformer(len(text.vocabulary), width=32, length=LENGTH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(steps):
        optimizer.zero_grad()
        loss_of(model, text.batch(step, 0, 16, LENGTH)).backward()
        optimizer.step()
    return model


def python_code(vocabulary: str) -> demo_text.Text:
    known = {character: i for i, character in enumerate(vocabulary)}
    source = inspect.getsource(argparse) + inspect.getsource(inspect)
    data = torch.tensor([known[character] for character in source if character in known])
    return demo_text.Text(data[:-10_000], data[-10_000:], vocabulary)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--base-steps", type=int, default=500)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--pertp", action="store_true", help="two ranks share a batch, and make one pass each")
    parser.add_argument("--offload", action="store_true", help="keep the blocks in CPU memory")
    parser.add_argument("--replay", type=Path, help="where the replay file goes; a temporary folder by default")
    args = parser.parse_args()

    cuda = torch.cuda.is_available()
    if "RANK" in os.environ:  # started by torchrun
        dist.init_process_group("nccl" if cuda else "gloo")
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    device = torch.device("cuda", rank % torch.cuda.device_count()) if cuda else torch.device("cpu")
    torch.set_num_threads(1)

    text = demo_text.load()
    base = base_model(text, args.base_steps).to(device)
    model, code = copy.deepcopy(base), python_code(text.vocabulary)

    shard, where = rank, {}
    if args.pertp:
        mesh = init_device_mesh(device.type, (2, world // 2), mesh_dim_names=("pert", "data"))
        shard, where = mesh.get_local_rank("data"), {"mesh": mesh}
    elif world > 1:
        where = {"process_group": dist.group.WORLD}
    if args.offload:
        where |= {"blocks": model.blocks, "device": device}
    zo = thinwire.ZerothOrder(model, lr=args.lr, **where)  # <- thinwire

    def held_out() -> float:
        with torch.no_grad():
            return loss_of(model, code.held_out_batch(32, LENGTH).to(device)).item()

    before = held_out()
    for step in range(args.steps):
        windows = code.batch(step, shard, 16, LENGTH).to(device)
        loss = zo.step(lambda windows=windows: loss_of(model, windows))  # <- thinwire: instead of backward and step
        if rank == 0 and step % 200 == 0:
            print(f"step {step:>4}  loss {loss:.3f}", flush=True)
    zo.flush()  # <- thinwire: the last update of offloaded blocks

    if rank == 0:
        print(f"held-out loss {before:.3f} before, {held_out():.3f} after\n\n{zo.report()}")  # <- thinwire
        with tempfile.TemporaryDirectory() as folder:
            path = args.replay or Path(folder) / "tuned.zo"
            zo.save_replay(path)  # <- thinwire
            thinwire.zeroth.replay(base, path)  # <- thinwire: the base model becomes the fine-tuned one
            pairs = zip(base.parameters(), model.parameters(), strict=True)
            same = all(torch.equal(one.cpu(), other.cpu()) for one, other in pairs)
            print(f"the replay file has {path.stat().st_size:,} bytes; the rebuilt model is equal: {same}")
    zo.detach()  # <- thinwire
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
