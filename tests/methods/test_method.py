import math

import pytest
import torch

from thinwire import Method, Rule, ThinwireError, Warmup, cast, dense, dgc, topk
from thinwire.compressors import Cast, TopK
from thinwire.compressors.cast import Cast as Identity
from thinwire.exchange.units import resolve, set_stage
from thinwire.memories import ErrorFeedback

METHODS = [dense(), cast("bfloat16"), topk(0.01, keep_dense=["embed*"]), dgc(0.001, warmup=Warmup(100), clip=0.25)]


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
def test_json_round_trip(method):
    assert Method.from_json(method.to_json()) == method


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"name": 1, "rules": [{}], "clip": null, "warmup": null}'])
def test_json_that_is_no_method(text):
    with pytest.raises(ThinwireError, match="not a method"):
        Method.from_json(text)


def test_the_first_rule_that_fits_counts():
    method = dgc(0.01, keep_dense=["*.embedding.weight"])
    assert method.rule("a.embedding.weight", (10, 4), 40).compressor == Cast()
    assert method.rule("a.linear.weight", (10, 4), 40).compressor == TopK(0.01)
    assert method.rule("a.linear.bias", (10,), 10).compressor == Cast()
    with pytest.raises(ThinwireError, match=r"no rule of mine fits parameter 'w' of shape \(3,\)"):
        Method("mine", (Rule(TopK(0.1), ErrorFeedback(), min_numel=10),)).rule("w", (3,), 3)


@pytest.mark.parametrize("clip", [0.0, -1.0, float("nan")])
def test_bad_clip(clip):
    with pytest.raises(ThinwireError, match="clip is"):
        dgc(clip=clip)


def test_the_papers_stages_by_steps_and_epochs():
    warmup = Warmup(4, steps_per_epoch=10)
    assert [warmup.density(step) for step in (0, 9, 10, 20, 39, 40)] == [0.25, 0.25, 0.0625, 0.015625, 0.004, None]
    one_epoch = Warmup(1, steps_per_epoch=8)
    assert [one_epoch.density(step) for step in range(9)] == [0.25] * 2 + [0.0625] * 2 + [0.015625] * 2 + [
        0.004
    ] * 2 + [None]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 3}, "a warm-up of 3 steps can't hold 4 stages"),
        ({"steps": 4, "stages": ()}, "can't hold"),
        ({"steps": 4, "stages": (0.5, 0.0)}, "stage 0.0 is not a density"),
        ({"steps": 4, "steps_per_epoch": 0}, "steps_per_epoch is 0"),
    ],
)
def test_bad_warmup(options, message):
    with pytest.raises(ThinwireError, match=message):
        Warmup(**options)


@pytest.mark.parametrize("world", [1, 2, 8, 32])
def test_what_would_be_more_bytes_is_sent_dense(world):
    units = resolve([("w", torch.zeros(1000, 100))], dgc(0.001), {})
    for density in (1.0, 0.9, 0.25, 0.0625, 0.004, None):
        notes = set_stage(units, density, world)
        p = density or 0.001
        low = math.floor(math.log2(1 / p))
        index_bits = low + 1 + 1 / (p * 2**low)  # Elias-Fano
        dense_is_cheaper = world * p * (32 + index_bits) > 64  # spec 0.3
        assert (units[0].compressor == Identity()) == (density == 1.0 or (dense_is_cheaper and world > 1))
        assert bool(notes) == (units[0].compressor == Identity() and density != 1.0), "what was asked is no news"
