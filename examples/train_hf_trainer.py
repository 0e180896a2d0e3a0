"""Train a small GPT-2 with the Hugging Face Trainer, and Top-k with error feedback.

    torchrun --nproc-per-node 2 examples/train_hf_trainer.py --folder run
    torchrun --nproc-per-node 2 examples/train_hf_trainer.py --folder run --resume --steps 400

The lines that concern thinwire are marked.
"""

import argparse

import torch
from torch.utils.data import Dataset
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments, set_seed

import thinwire  # <- thinwire
from thinwire.cli import text as demo_text
from thinwire.integrations.trainer import Compression  # <- thinwire

LENGTH = 32


class Windows(Dataset):
    """Windows of the text that the demo trains on."""

    def __init__(self, text: demo_text.Text, size: int) -> None:
        self.windows = text.batch(0, 0, size, LENGTH)

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> dict:
        return {"input_ids": self.windows[index], "labels": self.windows[index]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--folder", default="run")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --folder")
    args = parser.parse_args()

    text = demo_text.load()
    set_seed(0)
    config = GPT2Config(
        vocab_size=len(text.vocabulary),
        n_positions=LENGTH + 1,
        n_embd=args.width,
        n_layer=args.layers,
        n_head=4,
        bos_token_id=0,
        eos_token_id=0,
    )
    arguments = TrainingArguments(
        args.folder,
        max_steps=args.steps,
        save_steps=max(1, args.steps // 2),
        logging_steps=50,
        learning_rate=1e-3,
        per_device_train_batch_size=8,
        max_grad_norm=0,  # it would clip after the exchange
        ddp_find_unused_parameters=False,  # the model uses all of its parameters
        use_cpu=not torch.cuda.is_available(),  # without that, it stays alone on CPUs
        report_to="none",
    )
    trainer = Trainer(GPT2LMHeadModel(config), arguments, train_dataset=Windows(text, 4096))
    wired = Compression(trainer, thinwire.topk(0.02))  # <- thinwire
    result = trainer.train(resume_from_checkpoint=args.resume)  # with every rank's residuals
    if trainer.is_world_process_zero():
        print(f"mean loss {result.training_loss:.3f}\n\n{wired.wire.report()}")  # <- thinwire


if __name__ == "__main__":
    main()
