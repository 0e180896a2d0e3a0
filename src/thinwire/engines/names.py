"""The name of a parameter, whatever its module was wrapped in; residuals and checkpoints go by it."""


def clean(name: str) -> str:
    """The parameter's name, without what ``torch.compile`` and ``checkpoint_wrapper`` put in."""
    return name.replace("_orig_mod.", "").replace("_checkpoint_wrapped_module.", "")
