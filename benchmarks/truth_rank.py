"""One rank of ``benchmarks.truth``: what the ledger books, and what the interface counts meanwhile."""

import json
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import thinwire
from benchmarks import contenders
from benchmarks.lab import HEADERS, nic_counters, report

METHODS: dict[str, Callable[[], thinwire.Method]] = {
    "dense": thinwire.dense,
    "cast": thinwire.cast,
    "topk": lambda: thinwire.topk(0.01),
    "dgc": lambda: thinwire.dgc(0.01),
    "dgc_int4": lambda: thinwire.dgc(0.02, values="int4"),
    "dgc_two_phase": lambda: thinwire.dgc(0.02, route="two_phase"),
    "topk_two_phase": lambda: thinwire.topk(0.02, route="two_phase"),
    "sparse_loco_30": lambda: thinwire.sparse_loco(30),
}
"""One line for each method and route."""
WIDTH, LAYERS = 512, 4  # 1.05M parameters: gloo's own messages are some 300 bytes for each of ours


def compare(method: thinwire.Method, steps: int) -> dict[str, float]:
    """Bytes of one rank in so many steps, or in whole rounds of at least as many inner steps."""
    torch.manual_seed(0)
    if method.local is None:
        model, where = DistributedDataParallel(contenders.mlp(WIDTH, LAYERS)), {}
    else:  # few bytes, so four times the parameters, and no check of replicas, which the ledger does not count
        model, where = contenders.mlp(WIDTH, 4 * LAYERS), {"process_group": dist.group.WORLD, "check_every": 0}
        steps = -(-steps // method.local.every) * method.local.every
    optimizer = contenders.sgd(model, 0.9)
    wire = thinwire.attach(model, method, optimizer=optimizer, kernels="reference", **where)  # all send the same bytes
    contender = contenders.Contender(model, optimizer, wire=wire)
    for _ in range(2):  # the first has other buckets
        contender.step(torch.randn(4, WIDTH))
    dist.barrier()
    counted, booked = nic_counters(), wire.ledger.wire_bytes
    for _ in range(steps):
        contender.step(torch.randn(4, WIDTH))
    dist.barrier()
    sent, booked = nic_counters() - counted, wire.ledger.wire_bytes - booked
    wire.detach()
    tcp = sent.tx_bytes - HEADERS * sent.tx_packets
    return {"ledger_bytes": booked, "tcp_bytes": tcp, "nic_bytes": sent.tx_bytes, "steps": steps}


def main(task: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    report({name: compare(METHODS[name](), task["steps"]) for name in task["methods"]})
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(json.loads(sys.argv[-1]))
