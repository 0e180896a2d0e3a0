"""Worlds of processes that plans are sent to, and what becomes of a plan."""

import shutil
import tempfile

from tests.plans import laws
from tests.plans.outcome import Outcome
from tests.plans.packing import unpack
from tests.plans.plan import Plan
from tests.plans.records import Report
from tests.plans.running import ready, run
from tests.world import World

HOSTS = {2: 2, 3: 5, 4: 4, 5: 5}
"""The size of the world that hosts a plan's: a larger one has groups of fewer ranks."""
PATIENCE = 180.0


class Fleet:
    def __init__(self, worlds: dict[int, World] | None = None) -> None:
        self.worlds = worlds or {}

    def run(self, plan: Plan) -> Outcome:
        size = HOSTS[plan.world]
        if size not in self.worlds:
            self.worlds[size] = World(size)
        world, folder = self.worlds[size], tempfile.mkdtemp()
        if not world.processes:  # to start them takes long where much else is running
            world.run(ready, timeout=10 * PATIENCE)
        try:
            answers = world.run(run, plan.to_json(), folder, timeout=PATIENCE)
        except (TimeoutError, AssertionError) as error:
            return Outcome(plan, [f"no hang, no death: {error}"])
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        reports: list[Report] = [unpack(one) for one in answers[: plan.world]]
        if any(one.raised for one in reports):
            world.stop()  # the ranks may have parted
        return laws.judge(plan, reports)

    def stop(self, *but: World) -> None:
        """End the processes, but those of worlds that others use too."""
        for world in self.worlds.values():
            if world not in but:
                world.stop()
