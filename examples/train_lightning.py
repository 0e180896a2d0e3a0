"""Train a small character model with Lightning and Deep Gradient Compression.

    torchrun --nproc-per-node 2 examples/train_lightning.py --folder run
    torchrun --nproc-per-node 2 examples/train_lightning.py --folder run --resume --steps 400

The lines that concern thinwire are marked.
"""

import argparse

import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.utils.data import DataLoader

import thinwire  # <- thinwire
from thinwire.cli import text as demo_text
from thinwire.cli.demo_models import CharLM, loss_of
from thinwire.integrations.lightning import Compression  # <- thinwire

LENGTH = 32


class Module(lightning.LightningModule):
    """The character model of the demo."""

    def __init__(self, vocabulary: int, hidden: int) -> None:
        super().__init__()
        self.model = CharLM(vocabulary, hidden=hidden)

    def training_step(self, windows: Tensor) -> Tensor:
        loss = loss_of(self.model, windows)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.5, momentum=0.9)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--devices", type=int, default=2, help="processes on each machine")
    parser.add_argument("--folder", default="run")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --folder")
    args = parser.parse_args()

    text = demo_text.load()
    lightning.seed_everything(0)
    module = Module(len(text.vocabulary), args.hidden)
    data = DataLoader(text.batch(0, 0, 8192, LENGTH), batch_size=16, shuffle=True)
    method = thinwire.dgc(density=0.01, clip=1.0)  # clips on each rank: no gradient_clip_val below
    wired = Compression(method)  # <- thinwire
    saving = ModelCheckpoint(args.folder, every_n_train_steps=max(1, args.steps // 2), save_last=True)
    trainer = lightning.Trainer(
        devices=args.devices,
        strategy="ddp",
        max_steps=args.steps,
        callbacks=[wired, saving],  # <- thinwire
        logger=False,
        enable_progress_bar=False,
    )
    # with every rank's residuals, which lie in <name>.ckpt.thinwire
    trainer.fit(module, data, ckpt_path="last" if args.resume else None)
    if trainer.is_global_zero:
        print(f"last loss {trainer.callback_metrics['loss']:.3f}\n\n{wired.wire.report()}")  # <- thinwire


if __name__ == "__main__":
    main()
