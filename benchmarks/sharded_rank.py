"""One rank of ``benchmarks.sharded``: trains a sharded transformer by every case in turn."""

import json
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import thinwire
from benchmarks.lab import report
from thinwire import dense
from thinwire.cli import text as demo_text
from thinwire.cli.demo_models import loss_of, transformer
from thinwire.compressors import QSGD, Quantize

LENGTH, BATCH = 32, 8
CASES: dict[str, Callable[[], dict[str, Any]] | None] = {
    "plain": None,
    "scatter_8": lambda: {"reduce_scatter": Quantize(8, rounding="stochastic")},
    "scatter_8_qsgd": lambda: {"reduce_scatter": QSGD(8)},
    "scatter_4": lambda: {"reduce_scatter": Quantize(4, block=64, rounding="stochastic")},
    "gather_8": lambda: {"all_gather": Quantize(8)},
    "both_8": lambda: {"reduce_scatter": Quantize(8, rounding="stochastic"), "all_gather": Quantize(8)},
}


def train(case: str, seed: int, steps: int, width: int) -> dict[str, float]:
    """Held-out loss after the last step, and what a rank sent along the shards in it, relative to fp32."""
    text = demo_text.load()
    torch.manual_seed(seed)
    model = transformer(len(text.vocabulary), width=width, length=LENGTH)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("shard",))
    for part in model.blocks:
        fully_shard(part, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    options = CASES[case]
    wire = None
    if options is not None:
        sharded = thinwire.Fsdp2Options(**options())
        wire = thinwire.attach(model, dense(), optimizer=optimizer, seed=seed, fsdp2=sharded)
    for step in range(steps):
        optimizer.zero_grad()
        loss_of(model, text.batch(step, dist.get_rank(), BATCH, LENGTH, seed)).backward()
        optimizer.step()
        schedule.step()
    found: dict[str, float] = {}
    if wire is not None:
        row = wire.ledger.rows[-1]
        for name in ("within_node_bytes", "within_node_dense_bytes", "gather_bytes", "gather_dense_bytes"):
            found[name] = getattr(row, name)
        wire.detach()  # what is evaluated are the exact weights
    with torch.no_grad():
        return found | {"heldout_loss": loss_of(model, text.held_out_batch(256, LENGTH)).item()}


def main(task: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    steps, width = task["steps"], task["width"]
    chosen = task["cases"] or CASES
    report({case: [train(case, seed, steps, width) for seed in range(task["seeds"])] for case in chosen})
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(json.loads(sys.argv[-1]))
