"""Train a small GPT with FSDP2: sharded inside a node, with Top-k and error feedback between nodes.

    torchrun --nproc-per-node 4 examples/train_fsdp2.py --shards 2

makes a mesh of 2 replicas x 2 shards. On several machines, take ``--shards`` as the GPUs of one. The lines that concern
thinwire are marked.
"""

import argparse

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

import thinwire  # <- thinwire
from thinwire.cli import text as demo_text


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:  # [batch, length, width]
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(self.before(x)).chunk(3, -1))
        attended = scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(-2))
        return x + self.mlp(self.between(x))


class GPT(nn.Module):
    def __init__(self, vocabulary: int, width: int, layers: int, length: int) -> None:
        super().__init__()
        self.characters, self.places = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.blocks = nn.ModuleList(Block(width, 4) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary)

    def forward(self, characters: Tensor) -> Tensor:
        x = self.characters(characters) + self.places(torch.arange(characters.shape[1], device=characters.device))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=2, help="ranks that a parameter is sharded over")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--folder", help="where to save a checkpoint at the end")
    args = parser.parse_args()

    kind = "cuda" if torch.cuda.is_available() else "cpu"
    dist.init_process_group("nccl" if kind == "cuda" else "gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    if kind == "cuda":
        torch.cuda.set_device(rank % torch.cuda.device_count())
    mesh = init_device_mesh(kind, (world // args.shards, args.shards), mesh_dim_names=("replicate", "shard"))

    text, length = demo_text.load(), 32
    torch.manual_seed(0)  # replicas begin with equal weights
    model = GPT(len(text.vocabulary), args.width, args.layers, length).to(kind)
    for block in model.blocks:
        fully_shard(block, mesh=mesh["shard"])  # not mesh=mesh: the replicas are thinwire's
    fully_shard(model, mesh=mesh["shard"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    wire = thinwire.attach(  # <- thinwire
        model, thinwire.topk(0.01), optimizer=optimizer, fsdp2=thinwire.Fsdp2Options(replicate=mesh["replicate"])
    )

    for step in range(args.steps):
        windows = text.batch(step, rank, 8, length).to(kind)
        loss = cross_entropy(model(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if rank == 0 and step % 50 == 0:
            print(f"step {step:>4}  loss {loss.item():.3f}", flush=True)

    if args.folder:
        dcp.save({"model": model.state_dict(), "wire": wire}, checkpoint_id=args.folder)  # <- thinwire
    if rank == 0:
        print(f"last loss {loss.item():.3f}\n\n{wire.report()}")  # <- thinwire
    wire.detach()  # <- thinwire
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
