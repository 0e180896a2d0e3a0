"""Training of the demo's model on its text with many simulated workers."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from thinwire import Warmup, dense, dgc, simulate
from thinwire.cli import text as demo_text
from thinwire.cli.demo_models import CharLM, loss_of
from thinwire.report.results import Row

CLIP = 1.0


@dataclass(frozen=True)
class SimulationSettings:
    """Settings of one comparison; each worker gets its own batches."""

    workers: int = 32
    density: float = 0.001
    steps: int = 200
    hidden: int = 128
    seed: int = 0
    batch: int = 2
    length: int = 32
    lr: float = 1.0


def simulate_text(settings: SimulationSettings, progress: Callable[[str, int, float], object]) -> list[Row]:
    """Train dense and with DGC from the same start on the same batches; calls ``progress(case, step, train loss)``."""
    text = demo_text.load()
    held_out = text.held_out_batch(64, 128)
    rows: list[Row] = []
    stages = min(settings.steps // 10, 4)
    warmup = Warmup(settings.steps // 10, Warmup(4).stages[:stages]) if stages else None
    for case, method in (
        ("dense", dense(clip=CLIP)),
        ("dgc", dgc(settings.density, clip=CLIP, warmup=warmup)),
    ):
        torch.manual_seed(settings.seed)
        model = CharLM(len(text.vocabulary), 64, settings.hidden)
        result = simulate(
            model,
            method,
            optimizer=torch.optim.SGD(model.parameters(), lr=settings.lr, momentum=0.9),
            batches=lambda worker, step: text.batch(step, worker, settings.batch, settings.length, settings.seed),
            loss=loss_of,
            workers=settings.workers,
            steps=settings.steps,
            seed=settings.seed,
            after_step=lambda step, loss, case=case: progress(case, step, loss),
        )
        with torch.no_grad():
            rows.append(Row(case, "heldout_loss", loss_of(model, held_out).item()))
        rows.append(Row(case, "train_loss", result.losses[-1]))
        rows.append(Row(case, "ratio", result.ledger.ratio))
    return rows
