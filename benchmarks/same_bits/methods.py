"""Every recipe, with each of its options, and the optimizer that it goes with; each is made when it is called."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from benchmarks.same_bits.public import public as tw

Make = Callable[[], Any]
ROUTES = ("all_gather", "two_phase")
CODES = ("float16", "bfloat16", "int2", "int4", "int8", "sign")


class Chosen(NamedTuple):
    """A method, and the key of its optimizer in ``OPTIMIZERS``."""

    make: Make
    optimizer: str = "momentum"


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda params: torch.optim.SGD(params, lr=0.01),
    "momentum": lambda params: torch.optim.SGD(params, lr=0.05, momentum=0.9, weight_decay=1e-3),
    "nesterov": lambda params: torch.optim.SGD(params, lr=0.05, momentum=0.9, nesterov=True),
    "adamw": lambda params: torch.optim.AdamW(params, lr=1e-3),
    "onebit_adam": lambda params: tw.OneBitAdam(params, lr=1e-3, freeze_step=2),
    "zeroone_adam": lambda params: tw.ZeroOneAdam(params, lr=1e-3, refreshes=2),
    "onebit_lamb": lambda params: tw.OneBitLamb(params, lr=1e-3, freeze_step=2),
}

METHODS: dict[str, Chosen] = {
    "dense": Chosen(lambda: tw.dense()),
    "dense-clip": Chosen(lambda: tw.dense(clip=0.5)),
    "cast-float16": Chosen(lambda: tw.cast("float16")),
    "cast-bfloat16": Chosen(lambda: tw.cast("bfloat16"), "adamw"),
    "topk-exact": Chosen(lambda: tw.topk(0.02, selection="exact")),
    "topk-sampled": Chosen(lambda: tw.topk(0.02, selection="sampled"), "adamw"),
    "topk-state": Chosen(lambda: tw.topk(0.02, state_dtype="bfloat16")),
    "topk-second": Chosen(lambda: tw.topk(0.02, route="two_phase", second_stage_density_ratio=0.5)),
    "topk-clip": Chosen(lambda: tw.topk(0.02, clip=0.5)),
    "topk-warmup": Chosen(lambda: tw.topk(0.02, warmup=tw.Warmup(4, (1.0, 0.25)))),
    "dgc-exact": Chosen(lambda: tw.dgc(0.01, selection="exact")),
    "dgc-nesterov": Chosen(lambda: tw.dgc(0.01), "nesterov"),
    "dgc-sgd": Chosen(lambda: tw.dgc(0.01), "sgd"),
    "dgc-unmasked": Chosen(lambda: tw.dgc(0.01, masking=False)),
    "dgc-local-decay": Chosen(lambda: tw.dgc(0.01, decay="local")),
    "dgc-state": Chosen(lambda: tw.dgc(0.01, state_dtype="bfloat16")),
    "dgc-kept": Chosen(lambda: tw.dgc(0.01, keep_dense="last.*")),
    "dgc-clip": Chosen(lambda: tw.dgc(0.01, clip=0.5)),
    "dgc-warmup": Chosen(lambda: tw.dgc(0.01, warmup=tw.Warmup(4, (0.25, 0.05)))),
    "lean-topk": Chosen(lambda: tw.lean(0.1, momentum=False), "adamw"),
    "randk": Chosen(lambda: tw.randk(0.05)),
    "randk-unbiased": Chosen(lambda: tw.randk(0.05, feedback=False)),
    "randk-own": Chosen(lambda: tw.randk(0.05, shared=False)),
    "randk-warmup": Chosen(lambda: tw.randk(0.05, warmup=tw.Warmup(2, (0.5,)))),
    "sidco-pareto": Chosen(lambda: tw.sidco(0.02, fit="pareto")),
    "sidco-gamma": Chosen(lambda: tw.sidco(0.02, fit="gamma")),
    "sidco-int4": Chosen(lambda: tw.sidco(0.02, values="int4")),
    "scalecom": Chosen(lambda: tw.scalecom(0.02)),
    "scalecom-beta": Chosen(lambda: tw.scalecom(0.02, beta=0.1)),
    "powersgd": Chosen(lambda: tw.powersgd(2)),
    "powersgd-all": Chosen(lambda: tw.powersgd(1, min_compression_rate=0.0), "adamw"),
    "powersgd-state": Chosen(lambda: tw.powersgd(4, state_dtype="bfloat16")),
    "powersgd-warmup": Chosen(lambda: tw.powersgd(2, warmup=2)),
    "qsgd-2": Chosen(lambda: tw.qsgd(2, block=128, norm="max")),
    "qsgd-8": Chosen(lambda: tw.qsgd(8)),
    "maxmin-8": Chosen(lambda: tw.maxmin(8)),
    "maxmin-stochastic": Chosen(lambda: tw.maxmin(4, rounding="stochastic")),
    "maxmin-feedback": Chosen(lambda: tw.maxmin(4, block=128, feedback=True)),
    "terngrad-unclipped": Chosen(lambda: tw.terngrad(clip_rms=None)),
    "signsgd-plain": Chosen(lambda: tw.signsgd(0.0), "sgd"),
    "ef_sign-state": Chosen(lambda: tw.ef_sign(block=256, state_dtype="bfloat16")),
    "ef14-chain": Chosen(lambda: tw.ef14(tw.TopK(0.05) >> tw.Quantize(4, block=64))),
    "ef14-decay": Chosen(lambda: tw.ef14(0.02, decay=0.5)),
    "ef14-blocks": Chosen(lambda: tw.ef14(tw.BlockTopK(0.02))),
    "ef14-dct": Chosen(lambda: tw.ef14(tw.DctTopK(0.02))),
    "ef14-threshold": Chosen(lambda: tw.ef14(tw.Threshold(1e-3, 0.05))),
    "ef14-scaled": Chosen(lambda: tw.ef14(tw.Scaled(tw.QSGD(4, 64)))),
    "ef14-natural": Chosen(lambda: tw.ef14(tw.Natural())),
    "ef21-warmup": Chosen(lambda: tw.ef21(0.02, warmup=tw.Warmup(1, (1.0,)))),
    "ef21-sign": Chosen(lambda: tw.ef21(tw.Sign(256))),
    "econtrol-eta": Chosen(lambda: tw.econtrol(tw.TopK(0.02), eta=0.05)),
    "demo": Chosen(lambda: tw.decoupled_momentum(), "sgd"),
    "demo-float32": Chosen(lambda: tw.decoupled_momentum(0.01, values=None, sign=False), "sgd"),
    "chain": Chosen(lambda: tw.TopK(0.01) >> tw.Quantize(4)),
    "rule": Chosen(lambda: tw.Rule(tw.TopK(0.01), tw.MomentumCorrection(), min_ndim=2)),
}
"""By the name that a cell begins with."""

ROUTED: dict[str, tuple[Callable[..., Any], str]] = {
    "topk": (lambda **o: tw.topk(0.02, **o), "momentum"),
    "dgc": (lambda **o: tw.dgc(0.01, **o), "momentum"),
    **{f"topk-{code}": (lambda code=code, **o: tw.topk(0.02, values=code, **o), "momentum") for code in CODES},
    **{f"dgc-{code}": (lambda code=code, **o: tw.dgc(0.01, values=code, **o), "momentum") for code in CODES},
    "lean": (lambda **o: tw.lean(0.1, **o), "momentum"),
    "sidco": (lambda **o: tw.sidco(0.02, **o), "momentum"),
    "qsgd": (lambda **o: tw.qsgd(4, **o), "momentum"),
    "maxmin": (lambda **o: tw.maxmin(4, **o), "momentum"),
    "terngrad": (lambda **o: tw.terngrad(**o), "momentum"),
    "natural": (lambda **o: tw.natural(**o), "momentum"),
    "signsgd": (lambda **o: tw.signsgd(**o), "sgd"),
    "ef_sign": (lambda **o: tw.ef_sign(**o), "momentum"),
    "ef14": (lambda **o: tw.ef14(0.02, **o), "momentum"),
    "ef21": (lambda **o: tw.ef21(0.02, **o), "adamw"),
    "ef21_sgdm": (lambda **o: tw.ef21_sgdm(0.02, **o), "sgd"),
    "ef21_w": (lambda **o: tw.ef21_w(0.02, **o), "sgd"),
    "ef21_pp": (lambda **o: tw.ef21_pp(0.02, participation=0.5, **o), "sgd"),
    "ef21_bc": (lambda **o: tw.ef21_bc(0.02, 0.05, **o), "sgd"),
    "econtrol": (lambda **o: tw.econtrol(0.02, **o), "sgd"),
    **{name: (lambda name=name, **o: getattr(tw, name)(**o), name) for name in list(OPTIMIZERS)[4:]},
}
"""Recipes that take a route."""

for _name, (_make, _optimizer) in ROUTED.items():
    for _route in ROUTES:
        METHODS[f"{_name}-{_route}"] = Chosen(lambda make=_make, route=_route: make(route=route), _optimizer)
