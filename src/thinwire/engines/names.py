"""Parameter names without wrappers; residuals and checkpoints are keyed by them."""

INSERTED = {"_orig_mod", "_checkpoint_wrapped_module"}


def clean(name: str) -> str:
    """Return the parameter's name without the parts that ``torch.compile`` and ``checkpoint_wrapper`` insert."""
    return ".".join(part for part in name.split(".") if part not in INSERTED)
