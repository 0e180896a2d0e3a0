"""Parameters and modules of a model by name; residuals and checkpoints are keyed by the names, without wrappers."""

from collections.abc import Iterator, Sequence

from torch import Tensor, nn

from thinwire.core.errors import ThinwireError

INSERTED = {"_orig_mod", "_checkpoint_wrapped_module"}


def clean(name: str) -> str:
    """Return the parameter's name without the parts that ``torch.compile`` and ``checkpoint_wrapper`` insert."""
    return ".".join(part for part in name.split(".") if part not in INSERTED)


def modules_of(model: nn.Module) -> list[tuple[str, nn.Module]]:
    return [*model.named_modules()]  # pyright: ignore[reportUnknownArgumentType]


def sparse_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the trained weights that have sparse gradients."""
    for name, module in modules_of(model):
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.sparse and module.weight.requires_grad:
            yield clean(f"{name}.weight" if name else "weight"), module.weight


def check_some(named: Sequence[tuple[str, Tensor]], kind: str = "parameter") -> None:
    if not named:
        raise ThinwireError(f"the model has no {kind} that requires a gradient; there is nothing to exchange")
