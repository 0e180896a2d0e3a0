"""The name of a parameter, whatever its module was wrapped in; residuals and checkpoints go by it."""

INSERTED = {"_orig_mod", "_checkpoint_wrapped_module"}


def clean(name: str) -> str:
    """The parameter's name, without what ``torch.compile`` and ``checkpoint_wrapper`` put in."""
    return ".".join(part for part in name.split(".") if part not in INSERTED)
