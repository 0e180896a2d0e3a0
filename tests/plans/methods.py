"""Random methods: every recipe with random options, chains, and rules of one's own. A spec is plain JSON."""

from typing import Any

import thinwire
from tests.plans.draws import Draw
from tests.plans.plan import Spec
from thinwire.core import registry
from thinwire.methods.method import Method, Rule

DENSITIES = (0.01, 0.03, 0.1, 0.25)
VALUES = (None, "float16", "bfloat16", "int2", "int4", "int8", "sign")
ROUTES = ("all_gather", "two_phase", "auto")
STATES = ("float32", "bfloat16")
LINKED = {"onebit_adam": "OneBitAdam", "onebit_lamb": "OneBitLamb", "zeroone_adam": "ZeroOneAdam"}


def build(spec: Spec) -> Method:
    """The method of a spec; a ``ThinwireError`` where it is refused."""
    args, options = [_value(v) for v in spec["args"]], {key: _value(v) for key, v in spec["options"].items()}
    if spec["recipe"] != "own":
        return getattr(thinwire.methods, spec["recipe"])(*args, **options)
    rule, rest = Rule(*args, min_ndim=spec["min_ndim"]), Rule(thinwire.compressors.Cast(), thinwire.memories.NoMemory())
    return Method("own", (rule, rest), **options)


def part(value: Spec) -> Any:
    """A compressor or a memory."""
    rows = registry.MEMORIES if value["kind"] in registry.MEMORIES else registry.COMPRESSORS
    return registry.from_json(value, rows)


def _value(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    if "kind" not in value:
        return thinwire.Warmup(**value)
    return part(value)


def recipe(name: str, *args: Any, **options: Any) -> Spec:
    return {"recipe": name, "args": list(args), "options": options}


def draw(d: Draw, linked: str | None, sgd: bool) -> Spec:
    """A method for an optimizer: one of the 1-bit ones, SGD, or any other."""
    if linked is not None:
        rest = d.maybe(0.4, block=(64, 4096), clip=(0.5, 5.0), route=ROUTES)
        return recipe(linked, **rest)
    names = [name for name in RECIPES if sgd or name != "dgc"]
    return RECIPES[d.one(*names)](d, sgd)


def common(d: Draw, *without: str) -> Spec:
    """Options of most recipes."""
    rest = d.maybe(
        0.3,
        warmup=({"steps": 2, "stages": [1.0]}, {"steps": 4, "stages": [0.5, 0.25]}),
        clip=(0.5, 5.0),
        keep_dense=(["*.bias"], ["0.*"], ["1*"]),
        route=ROUTES,
    )
    if rest.get("route", "all_gather") != "all_gather":
        rest |= d.maybe(0.3, second_stage_density_ratio=(0.5, 2.0))
    return {key: value for key, value in rest.items() if key not in without}


def sparsifier(d: Draw) -> Spec:
    density = d.one(*DENSITIES)
    match d.between(0, 6):
        case 0:
            return {"kind": "block_topk", "density": density, "block": d.one(16, 64, 4096)}
        case 1:
            return {"kind": "threshold", "threshold": d.one(1e-3, 0.1), "capacity": density}
        case 2:
            return {"kind": "sidco", "density": density, "fit": d.one("exponential", "gamma", "pareto")}
        case 3:
            return {"kind": "dct_topk", "density": density, "chunk": d.one(4, 16, 64)}
        case 4:
            return {"kind": "randk", "density": density, "shared": d.chance(0.5), "scaled": False}
        case _:
            return {"kind": "topk", "density": density, **d.maybe(0.5, selection=("exact", "sampled"))}


def coder(d: Draw) -> Spec:
    """Codes every element, and contracts."""
    match d.between(0, 5):
        case 0:
            return {"kind": "cast", "dtype": d.one("float16", "bfloat16")}
        case 1:
            return {"kind": "quantize", "bits": d.one(4, 8), "block": d.one(16, 64)}
        case 2:
            return {"kind": "natural"}
        case 3:
            return {"kind": "sign", "block": d.one(16, 4096)}
        case 4:
            return {"kind": "qsgd", "bits": 8, "block": 16}
        case _:
            inner = d.one(
                {"kind": "qsgd", "bits": 2, "block": 64}, {"kind": "randk", "density": 0.1}, {"kind": "terngrad"}
            )
            return {"kind": "scaled", "compressor": inner}


def contractive(d: Draw) -> Any:
    """A density, a compressor, or a chain of two."""
    match d.weighted(density=2, sparsifier=3, coder=2, chain=3, lowrank=1, led=1):
        case "density":
            return d.one(*DENSITIES)
        case "sparsifier":
            return sparsifier(d)
        case "coder":
            return coder(d)
        case "chain":
            return {"kind": "chain", "first": sparsifier(d), "then": coder(d)}
        case "lowrank":
            return {"kind": "powersgd", "rank": d.one(1, 2, 4)}
        case _:
            return {"kind": "cltk", "density": d.one(*DENSITIES)}


def own(d: Draw, sgd: bool) -> Spec:
    """A rule of one's own, for tensors of any number of dimensions perhaps."""
    memories: list[Spec] = [
        {"kind": "error_feedback", **d.maybe(0.3, state_dtype=STATES, decay=(0.9,), beta=(0.5,))},
        {"kind": "ef21", **d.maybe(0.3, eta=(0.5,), participation=(0.5,))},
        {"kind": "econtrol", "eta": 0.1},
    ]
    unbiased: list[Spec] = [
        {"kind": "randk", "density": 0.25},
        {"kind": "qsgd", "bits": d.one(2, 4), "block": d.one(16, 512)},
        {"kind": "quantize", "bits": 4, "block": 64, "rounding": "stochastic"},
        {"kind": "chain", "first": {"kind": "randk", "density": 0.25}, "then": {"kind": "natural"}},
    ]
    memory = d.one(*memories, {"kind": "none"})
    compressor = d.one(*unbiased) if memory["kind"] == "none" else d.one(sparsifier, coder)(d)
    rest = common(d, "keep_dense")
    return recipe("own", compressor, memory, **rest) | {"min_ndim": d.one(0, 1, 2)}


def _family(name: str, **extra: tuple[Any, ...]) -> Any:
    def made(d: Draw, _: bool) -> Spec:
        more = {key: d.one(*values) for key, values in extra.items()}
        return recipe(name, contractive(d), **more, **common(d))

    return made


def _top(name: str) -> Any:
    def made(d: Draw, _: bool) -> Spec:
        more = d.maybe(0.4, values=VALUES, selection=("exact", "sampled"), state_dtype=STATES)
        if name == "dgc":
            more |= d.maybe(0.4, masking=(False,), mask_below_density=(0.0, 1.0), decay=("local", "decoupled"))
        return recipe(name, d.one(*DENSITIES), **more, **common(d))

    return made


def _lean(d: Draw, sgd: bool) -> Spec:
    return recipe("lean", d.one(0.5, 1.5), momentum=sgd and d.chance(0.7), **common(d, "second_stage_density_ratio"))


def _bits(name: str, **extra: tuple[Any, ...]) -> Any:
    def made(d: Draw, _: bool) -> Spec:
        return recipe(name, **d.maybe(0.5, **extra, route=ROUTES))

    return made


def _some(name: str, *densities: float, **extra: tuple[Any, ...]) -> Any:
    def made(d: Draw, _: bool) -> Spec:
        args = [d.one(*densities)] if densities else []
        return recipe(name, *args, **d.maybe(0.4, **extra))

    return made


WARMUPS = ({"steps": 2, "stages": [1.0]}, {"steps": 4, "stages": [0.5, 0.25]})
RECIPES: dict[str, Any] = {
    "dense": _some("dense", clip=(0.5,)),
    "cast": lambda d, _: recipe("cast", d.one("float16", "bfloat16", "float32")),
    "topk": _top("topk"),
    "dgc": _top("dgc"),
    "ef14": _family("ef14", decay=(1.0, 1.0, 0.9)),
    "ef21": _family("ef21"),
    "ef21_sgdm": _family("ef21_sgdm", eta=(0.1, 0.5)),
    "ef21_w": _family("ef21_w"),
    "ef21_pp": _family("ef21_pp", participation=(0.3, 0.7)),
    "ef21_bc": lambda d, _: recipe(
        "ef21_bc", contractive(d), d.one(0.3, {"kind": "cast", "dtype": "float16"}), **common(d)
    ),
    "econtrol": _family("econtrol", eta=(0.0, 0.1)),
    "lean": _lean,
    "powersgd": lambda d, _: recipe(
        "powersgd",
        d.one(1, 2, 4),
        **d.maybe(0.5, min_compression_rate=(0, 1.0), state_dtype=STATES),
        **common(d, "route", "second_stage_density_ratio"),
    ),
    "randk": _some("randk", *DENSITIES, feedback=(False,), shared=(False,), warmup=WARMUPS, state_dtype=STATES),
    "sidco": _some(
        "sidco", *DENSITIES, fit=("gamma", "pareto"), values=VALUES, warmup=WARMUPS, route=ROUTES, state_dtype=STATES
    ),
    "scalecom": _some("scalecom", *DENSITIES, beta=(0.3,), warmup=WARMUPS, state_dtype=STATES),
    "decoupled_momentum": _some(
        "decoupled_momentum", 0.03, 0.1, chunk=(4, 16), decay=(0.5,), sign=(False, True), values=(None, "float16")
    ),
    "qsgd": _bits("qsgd", bits=(2, 8), block=(16, 512), norm=("max",)),
    "maxmin": _bits("maxmin", bits=(4, 8), block=(16, 64), rounding=("stochastic",), feedback=(True,)),
    "terngrad": _bits("terngrad", clip_rms=(None,)),
    "natural": _bits("natural"),
    "signsgd": _bits("signsgd", momentum=(0.0, 0.5)),
    "ef_sign": _bits("ef_sign", block=(16,), state_dtype=STATES),
    "own": own,
}
