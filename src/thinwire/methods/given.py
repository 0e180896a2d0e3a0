"""Conversion of the ``method`` argument: a compressor or a rule becomes a method; anything else is an error."""

from collections.abc import Callable
from inspect import signature
from typing import Any, cast

import torch
from torch import nn

from thinwire import methods
from thinwire.compressors.cast import Cast
from thinwire.core import Compressor, Memory, ThinwireError, registry
from thinwire.core.capabilities import title
from thinwire.core.checks import shown
from thinwire.core.memory_capabilities import traits_of
from thinwire.memories.error_feedback import ErrorFeedback, NoMemory
from thinwire.methods.method import TYPICAL, Method, Rule

EXAMPLES = "thinwire.dgc(0.001) with SGD, thinwire.topk(0.01) with any optimizer, thinwire.dense()"
RECIPES: dict[str, Callable[..., Method]] = {
    name: getattr(methods, name) for name in methods.__all__ if callable(getattr(methods, name))
}


def method_of(given: Any) -> Method:
    """Return the method that a method, compressor or rule stands for.

    A compressor is used as in the recipes: on parameters of two or more dimensions, with error feedback if it needs
    it. Parameters that it declines are sent dense.
    """
    if isinstance(given, Method):
        return given
    if isinstance(given, Compressor):
        registry.to_json(given)  # says what is missing of one that ranks could not compare
        traits = given.traits
        silent = traits.contraction(TYPICAL) is None and traits.variance(TYPICAL) is None  # it may be biased
        memory = ErrorFeedback() if traits.needs_feedback or silent else NoMemory()
        return _with_rest(Rule(given, memory, min_ndim=2))
    if isinstance(given, Rule):
        return _with_rest(given)
    raise ThinwireError(f"method is {_wrong(given)}")


def _with_rest(rule: Rule) -> Method:
    """Make a method of a rule, with a dense rule for the parameters that it does not fit."""
    return Method(title(rule.compressor), (rule, Rule(Cast(), traits_of(rule.memory).uncompressed or NoMemory())))


def _wrong(given: Any) -> str:
    """Describe what was given instead of a method, and the way out."""
    if isinstance(given, str):
        name = given.strip().lower().removeprefix("thinwire.").removesuffix("()")
        if name in RECIPES:
            return f"the text {given!r}; pass thinwire.{name}({_needs(RECIPES[name])}), without quotes"
        return f"the text {shown(given)}; pass a method, e.g. {EXAMPLES}"
    for name, recipe in RECIPES.items():
        if given is recipe:
            return f"the function thinwire.{name} itself; call it: thinwire.{name}({_needs(recipe)})"
    if isinstance(given, type):
        if issubclass(given, Compressor):
            return f"the class {given.__name__}; make one of it: {given.__name__}(...), e.g. TopK(0.01)"
        return f"the class {given.__name__}; pass a method, e.g. {EXAMPLES}"
    if isinstance(given, Memory):
        kind = type(given).__name__
        return f"a memory, {kind}, which is one half; pass thinwire.Rule(thinwire.compressors.TopK(0.01), {kind}(...))"
    if isinstance(given, torch.optim.Optimizer):
        return f"an optimizer, {type(given).__name__}; pass it by name: attach(model, method, optimizer=optimizer)"
    if isinstance(given, nn.Module):
        return f"a model, {type(given).__name__}; the model comes first and the method second: attach(model, method)"
    if isinstance(given, (bool, int, float)):
        return f"the number {shown(given)}; say of which method it is, e.g. {EXAMPLES}"
    if isinstance(given, (list, tuple)):
        return "a list; put rules into a method: thinwire.Method('mine', rules)"
    return f"{shown(cast(object, given))}; pass a method, e.g. {EXAMPLES}"


def _needs(recipe: Callable[..., Method]) -> str:
    """Return the required arguments of a recipe, as text for an example."""
    needed = [p for p in signature(recipe).parameters.values() if p.default is p.empty and p.kind is not p.VAR_KEYWORD]
    return ", ".join("0.01" if p.kind is p.POSITIONAL_OR_KEYWORD else f"{p.name}=0.5" for p in needed)
