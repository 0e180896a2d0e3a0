"""Options that all recipes share, and the function that builds a recipe's rules."""

from collections.abc import Mapping, Sequence
from typing import Any, TypedDict, cast

from thinwire.compressors.cast import Cast
from thinwire.core import Compressor, Memory, ThinwireError
from thinwire.core.checks import shown, texts
from thinwire.memories.error_feedback import NoMemory
from thinwire.methods.method import Method, RouteName, Rule, Warmup

IDENTITY = Rule(Cast(), NoMemory())


class Options(TypedDict, total=False):
    """The options that every recipe takes by name; all are optional.

    Args:
        warmup: densities of the first steps; a number of steps means ``Warmup(steps)``.
        clip: local gradient clipping: the largest norm of the mean gradient, see ``thinwire.Method``.
        keep_dense: globs of parameter names to send dense.
        route: the route of compressed parameters, see ``thinwire.Method``.
        second_stage_density_ratio: density of the second of two phases over that of the first.
    """

    warmup: Warmup | int | None
    clip: float | None
    keep_dense: Sequence[str] | str
    route: RouteName
    second_stage_density_ratio: float


def recipe(
    name: str,
    compressor: Compressor,
    memory: Memory,
    options: Options,
    rest: Rule = IDENTITY,
    min_ndim: int = 2,
    route: RouteName = "all_gather",
) -> Method:
    """Make a method that compresses parameters of at least ``min_ndim`` dimensions; the others use the rule ``rest``.

    ``options`` are those given to the recipe; without a route among them it is ``route``.
    """
    given: Mapping[str, Any] = options
    if unknown := given.keys() - Options.__annotations__.keys():
        raise ThinwireError(
            f"{name} has no option {min(unknown)}={shown(cast(object, given[min(unknown)]))}; all recipes take "
            f"{', '.join(Options.__annotations__)}"
        )
    kept = (Rule(rest.compressor, rest.memory, match=glob) for glob in texts("keep_dense", given.get("keep_dense", ())))
    others = cast("dict[str, Any]", {"route": route} | {k: v for k, v in given.items() if k != "keep_dense"})
    return Method(name, (*kept, Rule(compressor, memory, min_ndim=min_ndim), rest), **others)
