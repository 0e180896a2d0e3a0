"""A plan from a seed: models x methods x routes x engines x worlds, weighted so that most of them are accepted."""

from dataclasses import replace

from tests.plans import methods
from tests.plans.ambient import KINDS
from tests.plans.draws import Draw
from tests.plans.plan import Layer, Plan, Spec

WORLDS = (2, 3, 4, 5)
FOLDS = {2: (), 3: (2,), 4: (2, 3), 5: (2, 3)}


def draw(seed: int) -> Plan:
    d = Draw(seed)
    engine = d.weighted(ddp=5, bare=5, fsdp2=2)
    world = d.one(2, 4) if engine == "fsdp2" else d.one(*WORLDS)
    steps = d.between(3, 6)
    linked = d.one(*methods.LINKED) if d.chance(0.1) else None
    kind = methods.LINKED[linked] if linked else d.one("SGD", "SGD", "SGD", "Adam", "AdamW", "Adagrad", "RMSprop")
    layers = _fsdp2_layers(d) if engine == "fsdp2" else _layers(d)
    plan = Plan(
        seed, engine, world, layers, methods.draw(d, linked, kind == "SGD"), _optimizer(d, kind), steps,
        accumulate=2 if d.chance(0.3) else 1,
        link="1gbit,0.1ms" if d.chance(0.1) else None,
        nonfinite=(d.between(0, steps - 1), d.between(0, world - 1)) if d.chance(0.15) else None,
    )  # fmt: skip
    plan = replace(plan, **_engine(d, plan), **_later(d, plan, linked, kind))
    plain = all(layer.dtype == "float32" for layer in layers)
    plan = replace(plan, **_manners(d, plan, plain))
    if any(layer.dtype.endswith("16") for layer in layers):  # PyTorch's leaves a momentum of 16 bits partly unwritten
        plan.optimizer["options"].pop("fused", None)
    if engine == "fsdp2":  # PyTorch has none for DTensors
        plan.optimizer["options"].pop("fused", None)
        often = (
            plan.accumulate > 1 or plan.looks
        )  # a second call finds weights that autocast has cached: wrong gradients
        plan = replace(plan, ambient="") if often and plan.ambient == "autocast" else plan
    return replace(plan, kernels="cpu" if world == 2 and plain and d.chance(0.5) else "reference")


def _engine(d: Draw, plan: Plan) -> Spec:
    match plan.engine:
        case "ddp":
            unused = any(layer.used in USED for layer in plan.layers)
            wrap = d.maybe(
                0.3, gradient_as_bucket_view=(True,), bucket_cap_mb=(0.001, 0.005), broadcast_buffers=(False,)
            )
            if unused or d.chance(0.2):
                wrap["find_unused_parameters"] = True
            elif plan.accumulate == 1 and d.chance(0.1):
                wrap["static_graph"] = True
            return {"wrap": wrap, "nodes": 2 if plan.world == 4 and d.chance(0.2) else None}
        case "bare":
            sparse = plan.optimizer["kind"] == "SGD" and d.chance(0.3)
            options: Spec = {"sparse_gradients": True} if sparse else {}
            return {"options": options, "nodes": 2 if plan.world == 4 and not sparse and d.chance(0.2) else None}
        case _:
            shards = 2 if plan.world == 4 and d.chance(0.6) else 1
            options = {}
            if shards == 2:
                coder = {"kind": "quantize", "bits": 8, "block": 64}
                options = d.maybe(0.25, reduce_scatter=({**coder, "rounding": "stochastic"},), all_gather=(coder,))
            return {"shards": shards, "options": options}


def _manners(d: Draw, plan: Plan, plain: bool) -> Spec:
    """What else a loop does."""
    scaled = plan.engine != "fsdp2" and not any(one.dtype == "float16" or one.sparse for one in plan.layers)
    kinds = [kind for kind in KINDS if kind != "autocast" or plain]
    manners: Spec = {
        "zeros": d.chance(0.15),
        "looks": d.chance(0.2),
        "scale": d.one(1e4, 1e-4) if d.chance(0.1) else 1.0,
        "scaler": scaled and d.chance(0.1),
        "ambient": d.one(*kinds) if d.chance(0.15) else "",
        "change": d.one("set_method", "set_method", "reattach"),
    }
    if not manners["zeros"] and not manners["scaler"] and plan.nonfinite is None and d.chance(0.1):
        manners["left_out"] = d.between(0, plan.steps - 1)
    if plan.checkpoint is not None and plan.switch is None and d.chance(0.25):
        manners["order"] = "rollback"
    return manners


def _later(d: Draw, plan: Plan, linked: str | None, kind: str) -> Spec:
    """What happens in mid-run: another method, a checkpoint."""
    later: Spec = {}
    if linked is None and d.chance(0.25):
        later |= {"switch": d.between(1, plan.steps - 1), "then": methods.draw(d, None, kind == "SGD")}
    if d.chance(0.5):
        fold = d.one(*FOLDS[plan.world]) if plan.engine != "fsdp2" and plan.world > 2 and d.chance(0.5) else None
        saved = d.one("files", "files", "files", "folder")
        order = d.one("after", "before")
        later |= {"checkpoint": d.between(1, plan.steps - 1), "saved": saved, "order": order, "fold": fold}
    return later


def _optimizer(d: Draw, kind: str) -> Spec:
    decay = d.one(0.0, 0.0, 0.01)
    match kind:
        case "SGD":
            momentum = d.one(0.0, 0.9, 0.9)
            options = {
                "lr": 0.05,
                "momentum": momentum,
                "nesterov": bool(momentum) and d.chance(0.3),
                "weight_decay": decay,
            }
        case "Adam" | "AdamW":
            options = {"lr": 0.01, "eps": 1e-4, "weight_decay": decay}
        case "ZeroOneAdam":
            options = {"lr": 0.01, "eps": 1e-4, "weight_decay": decay, "refreshes": d.one(1, 2)}
        case "OneBitAdam" | "OneBitLamb":
            options = {"lr": 0.01, "eps": 1e-4, "weight_decay": decay, "freeze_step": d.one(1, 2, "auto")}
        case _:
            options = {"lr": 0.01, "weight_decay": decay, "eps": 1e-4}
    if kind in ("SGD", "Adam", "AdamW") and d.chance(0.15):
        options |= {d.one("foreach", "fused"): True}
    return {"kind": kind, "options": options, "groups": d.one(1, 1, 2)}


USED = ("never", "even ranks", "last rank", "even steps", "last part", "first part")
DTYPES = ("float32", "float32", "float32", "float64", "float16", "bfloat16")


def _layers(d: Draw) -> tuple[Layer, ...]:
    mixed, base = d.chance(0.3), d.one(*DTYPES)
    odd = [_odd(d) for _ in range(d.between(1, 4))]
    layers = [Layer("linear", base, (d.one(24, 31), d.one(16, 33))), *odd]
    layers = [
        replace(one, used="always") if one.sparse else one for one in layers
    ]  # DDP takes no other sparse gradient
    return tuple(replace(layer, dtype=d.one(*DTYPES) if mixed else base) for layer in layers)


def _odd(d: Draw) -> Layer:
    kind = d.one(
        "linear",
        "tied",
        "conv2d",
        "conv3d",
        "embedding",
        "norm",
        "batchnorm",
        "scalar",
        "empty",
        "one",
        "turned",
        "large",
    )
    sizes = {
        "linear": (d.one(1, 3, 17), d.one(1, 5)),
        "tied": (d.one(5, 16),),
        "conv2d": (d.one(1, 3), d.one(2, 8), d.one(1, 3)),
        "conv3d": (d.one(1, 2), 4, 2),
        "embedding": (d.one(7, 50), d.one(1, 8)),
        "norm": (d.one(3, 10),),
        "batchnorm": (d.one(3, 10),),
        "scalar": (),
        "empty": d.one((0,), (0, 3), (4, 0), (2, 0, 3)),
        "one": d.one((1,), (1, 1)),
        "turned": d.one((6, 4), (3, 5, 2)),
        "large": (d.one(64, 90), d.one(48, 33)),
    }[kind]
    used = d.one(*USED, "zero") if d.chance(0.25) else "always"
    channels_last = kind.startswith("conv") and d.chance(0.6)
    return Layer(kind, "", sizes, used, d.chance(0.1), channels_last, kind == "embedding" and d.chance(0.15))


def _fsdp2_layers(d: Draw) -> tuple[Layer, ...]:
    """One dtype for all, and no shape that FSDP2 refuses; a layer is used by whole replicas."""
    base = d.one("float32", "float32", "float32", "bfloat16", "float64")
    kinds = ("linear", "tied", "conv2d", "embedding", "norm", "one", "large")
    odd = [layer for layer in (_odd(d) for _ in range(d.between(3, 9))) if layer.kind in kinds][:4]
    layers = [Layer("linear", base, (d.one(24, 31), d.one(16, 33))), *odd]
    return tuple(replace(layer, dtype=base, channels_last=False, sparse=False) for layer in layers)
