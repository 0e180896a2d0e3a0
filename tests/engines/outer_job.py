"""One rank of a job with local updates, which saves after every second step and continues from the last save of all.

python -m tests.engines.outer_job FOLDER STEPS [KILLED_RANK KILLED_STEP [RECIPE MOMENT]]

With a recipe, the others go on without the killed rank, and nothing is saved. It is killed in the inner step, or at the
moment "arrived", when it has received the exchange of that number; "twice": another one four steps later.
"""

import os
import signal
import sys
from pathlib import Path

import torch
import torch.distributed as dist

import thinwire
from tests.engines.test_outer import RECIPES, batch, build, flat, loss_of
from thinwire import ThinwireError, methods, topk
from thinwire.engines.outer import flight


def main(folder: Path, steps: int, killed: tuple[int, int] | None, recipe: str = "", moment: str = "step") -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    model, optimizer = build(seed=0)
    method = RECIPES[recipe] if recipe else methods.diloco(3, exchange=topk(0.1))
    wire = thinwire.attach(
        model, method, optimizer=optimizer, process_group=dist.group.WORLD, kernels="reference", timeout=20.0,
        on_lost="continue" if recipe else "error",
    )  # fmt: skip
    saved = [{int(file.stem) for file in folder.glob(f"{other}/*.pt")} for other in range(world)]
    first = max(set.intersection(*saved), default=0)
    if first:
        state = torch.load(folder / f"{rank}/{first}.pt", weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        wire.load_state_dict(state["wire"])
    if moment == "arrived":
        land = flight.land

        def landed(session, *arguments):
            found = land(session, *arguments)
            if killed == (rank, session.step):
                os.kill(os.getpid(), signal.SIGKILL)
            return found

        flight.land = landed
    try:
        for step in range(first, steps):
            optimizer.zero_grad()
            loss_of(model, batch(rank, step)).backward()
            dies = killed == (rank, step) and moment != "arrived"
            if dies or (moment == "twice" and killed and (1 + killed[0] % 3, killed[1] + 4) == (rank, step)):
                os.kill(os.getpid(), signal.SIGKILL)
            optimizer.step()
            if step % 2 and not recipe:
                (folder / f"{rank}").mkdir(exist_ok=True)
                file = folder / f"{rank}/{step + 1}.pt"
                state = {"wire": wire.state_dict(), "model": model.state_dict(), "optimizer": optimizer.state_dict()}
                torch.save(state, file.with_suffix(".part"))
                file.with_suffix(".part").rename(file)
        wire.detach()
        facts = (wire.collective.world, wire.ledger.notes) if recipe else ""
        print(f"ended {flat(model.parameters()).sum().item().hex()} {facts}", flush=True)
        if recipe:
            os._exit(0)  # the group of all ranks is broken, and destroying it would wait
    except ThinwireError as error:
        print(f"error {error}", flush=True)
        os._exit(3)


if __name__ == "__main__":
    where, number, *whom = sys.argv[1:]
    main(Path(where), int(number), (int(whom[0]), int(whom[1])) if whom else None, *whom[2:])
