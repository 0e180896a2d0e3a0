"""The registry: the name of every compressor and memory, and their way to JSON and back.

A class that is registered can be compared between ranks, written to JSON and into checkpoints, and run by the tests of
the catalogue. Those of this package and a user's own are registered alike.
"""

from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any, TypeVar, cast

from thinwire.core.errors import ThinwireError
from thinwire.core.interfaces import Compressor, Memory, Traits

COMPRESSORS: dict[str, type[Compressor]] = {}
MEMORIES: dict[str, type[Memory]] = {}

JSON = (str, int, float, bool, type(None), tuple, dict)

Kind = TypeVar("Kind", bound=type[Compressor] | type[Memory])


def register(name: str) -> Callable[[Kind], Kind]:
    """Register a compressor or a memory of your own, a frozen dataclass, under a name.

    The name stands for the class in JSON, in checkpoints, and where ranks compare their methods; so every process that
    reads one must have imported the file with the class.

    Args:
        name: not that of another registered class. Naming the same class again (a module that is loaded a second time)
            replaces it.

    Raises:
        ThinwireError: the name is taken, or the class is neither a compressor nor a memory, or no dataclass.

    Example:
        >>> from dataclasses import dataclass
        >>> @register("first half")
        ... @dataclass(frozen=True)
        ... class FirstHalf(Compressor):
        ...     def compress(self, x, state, ctx):
        ...         return (flat(x)[: x.numel() // 2].clone(),)
        ...     def decompress(self, payload, like, state, ctx):
        ...         return Sparse(torch.arange(payload[0].numel()), payload[0], 0.5)
        >>> to_json(FirstHalf())["kind"]
        'first half'
    """

    if not isinstance(cast(object, name), str) or not name:
        raise ThinwireError('register needs a name: write @thinwire.register("name") above the class')

    def add(kind: Kind) -> Kind:
        rows = _rows(kind)
        _check_class(kind, name)
        for taken in (COMPRESSORS.get(name), MEMORIES.get(name)):
            if taken is not None and _place(taken) != _place(kind):
                raise ThinwireError(
                    f"the name {name!r} is that of {'.'.join(_place(taken))} already; register {kind.__name__} under "
                    "another"
                )
        rows[name] = kind
        return kind

    return add


def _check_class(kind: type, name: str) -> None:
    above = f"write @thinwire.register({name!r}) above @dataclass(frozen=True)"
    if "__dataclass_fields__" not in vars(kind):
        raise ThinwireError(f"{kind.__name__} is no dataclass, so ranks can't compare its settings; {above}")
    if not cast(Any, kind).__dataclass_params__.frozen:
        raise ThinwireError(f"{kind.__name__} is not frozen, and a setting that changes would part the ranks; {above}")
    names = {field.name for field in fields(cast(Any, kind))}
    if taken := names & {"kind", "traits", "slots"}:
        raise ThinwireError(f"{kind.__name__} has a setting {min(taken)!r}, a name that is taken; give it another")
    if issubclass(kind, Compressor):
        known = {field.name for field in fields(Traits)} - names
        if stray := known & vars(kind).keys():
            raise ThinwireError(
                f"{kind.__name__}.{min(stray)} has no effect: write traits = Traits({min(stray)}=...) in the class"
            )


def _rows(kind: type) -> dict[str, Any]:
    for base, rows in ((Compressor, COMPRESSORS), (Memory, MEMORIES)):
        if isinstance(cast(object, kind), type) and issubclass(kind, base):
            return cast("dict[str, Any]", rows)
    raise ThinwireError(f"{kind!r} is neither a Compressor nor a Memory; @thinwire.register stands above such a class")


def _place(kind: type) -> tuple[str, str]:
    # A process that a script has spawned imports the script as __mp_main__.
    module = "__main__" if kind.__module__ == "__mp_main__" else kind.__module__
    return module, kind.__qualname__


def to_json(part: Compressor | Memory) -> dict[str, Any]:
    """``{"kind": name, **hyper-parameters}``; of a class that is not thinwire's, also where it is."""
    kind = type(part)
    name = next((name for name, known in (COMPRESSORS | MEMORIES).items() if known is kind), None)
    if name is None:
        raise ThinwireError(
            f"{kind.__name__} is not registered, so ranks can't compare it; write @thinwire.register("
            f"{kind.__name__.lower()!r}) above the class"
        )
    pairs = ((f.name, getattr(part, f.name)) for f in fields(cast(Any, part)))
    row = {key: to_json(v) if isinstance(v, Compressor) else v for key, v in pairs}
    for key, value in row.items():
        if not isinstance(value, JSON):
            raise ThinwireError(
                f"{kind.__name__}.{key} is {value!r}, which JSON can't hold; take a text, a number, a bool, None, a "
                "tuple of them, or a compressor"
            )
    where = {} if kind.__module__.startswith("thinwire.") else {"class": ".".join(_place(kind))}
    return {"kind": name, **where, **row}


def from_json(data: Mapping[str, Any], rows: Mapping[str, Any]) -> Any:
    """The compressor or memory that ``to_json`` wrote; ``rows`` is ``COMPRESSORS`` or ``MEMORIES``."""
    own = dict(data)
    kind, place = own.pop("kind", None), own.pop("class", None)  # no field can be called class
    if kind not in rows:
        if place is not None:
            raise ThinwireError(
                f"kind {kind!r} is the class {place}, which this process has not registered; import the file that "
                "holds it first (it is never imported for you, since that runs code)"
            )
        raise ThinwireError(f"kind {kind!r} is not registered; known are {', '.join(rows)}")
    try:
        return rows[kind](**{key: _part(value) for key, value in own.items()})
    except TypeError as error:
        raise ThinwireError(f"{kind}: {error}") from error


def _part(value: Any) -> Any:
    """A hyper-parameter, which may be a compressor or a list of numbers."""
    if isinstance(value, list):
        return tuple(cast("list[Any]", value))
    return from_json(cast("dict[str, Any]", value), COMPRESSORS) if isinstance(value, dict) else value
