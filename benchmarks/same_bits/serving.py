"""One process of a revision: runs the cells that it reads the names of, and answers each with a line of JSON."""

import json
import logging
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

import thinwire
from benchmarks.same_bits.grid import cells
from benchmarks.same_bits.training import Ranks


def ranks_of(rank: int, world: int) -> Ranks:
    if world == 1:
        return Ranks(rank)
    dist.init_process_group("gloo")
    four = dist.group.WORLD if world == 4 else None
    pair = dist.new_group([0, 1])
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard")) if world == 4 else None
    return Ranks(rank, pair, four, mesh)


def main(source: str) -> None:
    """``source``: where the package has to come from."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what gloo prints is no answer
    torch.set_num_threads(1)
    logging.getLogger("thinwire").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    assert Path(thinwire.__file__).is_relative_to(source), f"this is {thinwire.__file__}, not of {source}"
    every, ranks = cells(), ranks_of(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))
    print(json.dumps("ready"), file=answers, flush=True)
    for line in sys.stdin:
        answer: dict[str, Any]
        torch.manual_seed(0)
        try:
            answer = every[line.strip()].run(ranks)
        except Exception as error:
            answer = {"error": type(error).__name__, "said": str(error)[:400]}
        print(json.dumps(answer), file=answers, flush=True)
    os._exit(0)  # nobody else waits for a farewell


if __name__ == "__main__":
    main(sys.argv[1])
