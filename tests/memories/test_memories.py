"""The laws of DGC and error feedback: spec 3.10."""

import pytest
import torch

from thinwire.compressors.sparse import TopK
from thinwire.core import Context
from thinwire.core.errors import ThinwireError
from thinwire.core.interfaces import local_state, shared_state
from thinwire.core.tensors import Dense
from thinwire.memories.error_feedback import ErrorFeedback
from thinwire.memories.momentum import Momentum, MomentumCorrection


def journey(memory, compressor, grads, param=None):
    """One rank alone: what it sent at each step, and its state."""
    param = torch.zeros_like(grads[0]) if param is None else param
    state = local_state(memory, grads[0])
    sent = []
    for step, grad in enumerate(grads):
        ctx = Context(0, step, "w", 0)
        x = memory.compensate(grad.clone(), param, state, state)
        own = compressor.decompress(compressor.compress(x, {}, ctx), x, {}, ctx)
        out = torch.empty_like(x)
        own.write_to(out)
        memory.sent(own, state)
        sent.append(out)
    return sent, state


def test_worked_example():
    grads = [torch.tensor([4.0, -3.0, 2.0, -1.0])] * 3
    sent, state = journey(MomentumCorrection(0.5, mask_below_density=1.0), TopK(0.25), grads)
    assert [s[s != 0].tolist() for s in sent] == [[4.0], [-7.5], [10.0]]
    assert [s.nonzero().item() for s in sent] == [0, 1, 0]
    assert state["momentum"].tolist() == [0.0, -3.0, 3.5, -1.75]
    assert state["residual"].tolist() == [0.0, -3.0, 8.5, -4.25]
    sent, _ = journey(MomentumCorrection(0.5, nesterov=True, mask_below_density=1.0), TopK(0.25), grads[:2])
    assert [s[s != 0].tolist() for s in sent] == [[6.0], [-9.75]]


@pytest.mark.parametrize("values", [None, "float16", "bfloat16", "sign", "int2", "int4", "int8"])
@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("masking", [False, True])
def test_conservation_per_coordinate(nesterov, masking, values):
    """Everything that entered the residual was sent or is still there, also what a cast lost."""
    grads = list(torch.randn(30, 400, dtype=torch.float64))
    memory, compressor = MomentumCorrection(0.9, nesterov, masking=masking), TopK(0.02, values)
    state = local_state(memory, grads[0])
    compensated = torch.zeros(400, dtype=torch.float64)
    total = torch.zeros(400, dtype=torch.float64)
    for step, grad in enumerate(grads):
        ctx, before = Context(0, step, "w", 0), state["residual"].clone()
        x = memory.compensate(grad, grad, state, state)
        compensated += x - before
        own = compressor.decompress(compressor.compress(x, {}, ctx), x, {}, ctx)
        own.add_to(total)
        memory.sent(own, state)
    assert state["residual"].abs().max() > 0
    torch.testing.assert_close(total + state["residual"], compensated, rtol=0, atol=1e-12)


def test_what_enters_is_the_velocity():
    grads = list(torch.randn(10, 50, dtype=torch.float64))
    memory = MomentumCorrection(0.9, masking=False)
    sent, state = journey(memory, TopK(0.1), grads)
    velocity = torch.zeros(50, dtype=torch.float64)
    entered = torch.zeros(50, dtype=torch.float64)
    for grad in grads:
        velocity = 0.9 * velocity + grad
        entered += velocity
    torch.testing.assert_close(sum(sent) + state["residual"], entered, rtol=0, atol=1e-12)


def test_masking_at_density_one_turns_momentum_off():
    grads = list(torch.randn(5, 20, dtype=torch.float64))
    for nesterov, factor in ((False, 1.0), (True, 1.9)):
        sent, _ = journey(MomentumCorrection(0.9, nesterov, mask_below_density=1.0), TopK(1.0), grads)
        torch.testing.assert_close(torch.stack(sent), factor * torch.stack(grads), rtol=0, atol=1e-12)


def test_masking_stops_above_its_density():
    grads = list(torch.randn(3, 100))
    masked = journey(MomentumCorrection(0.9, mask_below_density=0.05), TopK(0.05), grads)
    kept = journey(MomentumCorrection(0.9, mask_below_density=0.05), TopK(0.06), grads)
    assert (masked[1]["momentum"] == 0).sum() == 5
    assert (kept[1]["momentum"] == 0).sum() == 0


def test_without_momentum_dgc_is_error_feedback():
    grads = list(torch.randn(20, 300, dtype=torch.float64))
    a, _ = journey(MomentumCorrection(0.0), TopK(0.05), grads)
    b, state = journey(ErrorFeedback(), TopK(0.05), grads)
    assert torch.equal(torch.stack(a), torch.stack(b))
    torch.testing.assert_close(sum(b) + state["residual"], sum(grads), rtol=0, atol=1e-12)


def test_bounded_delay():
    grads = [torch.ones(40)] * 20
    sent, _ = journey(ErrorFeedback(), TopK(0.1), grads)
    assert (torch.stack(sent[:10]).sum(0) > 0).all()  # ceil(1 / density) steps


def test_separate_and_decoupled_decay():
    param, mean = torch.randn(6, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
    memory = MomentumCorrection(0.9, weight_decay=0.1, decay="decoupled")
    torch.testing.assert_close(memory.receive(mean.clone(), param, {}, {}), mean + 0.1 * param)
    memory = MomentumCorrection(0.9, weight_decay=0.1, decay="separate")
    shared = shared_state(memory, param)
    memory.receive(mean.clone(), param, shared, shared)
    torch.testing.assert_close(memory.receive(mean.clone(), param, shared, shared), mean + (0.9 * 0.1 + 0.1) * param)


def test_old_and_new_state_may_be_apart():
    """Writing to a second copy leaves the first untouched, so a step can be taken back."""
    grad = torch.randn(30)
    for memory in (ErrorFeedback(), MomentumCorrection(0.9), MomentumCorrection(0.9, nesterov=True)):
        old = {key: torch.randn(30) for key in local_state(memory, grad)}
        before = {key: value.clone() for key, value in old.items()}
        new = {key: torch.full((30,), torch.nan) for key in old}
        x = memory.compensate(grad, grad, old, new)
        memory.sent(Dense(x.clone()), new)
        assert all(torch.equal(old[key], before[key]) for key in old)
        inplace = {key: value.clone() for key, value in before.items()}
        x = memory.compensate(grad, grad, inplace, inplace)
        memory.sent(Dense(x.clone()), inplace)
        assert all(torch.equal(new[key], inplace[key]) for key in new)


@pytest.mark.parametrize(
    "options",
    [{"momentum": 1.0}, {"momentum": -0.1}, {"weight_decay": -1.0}, {"decay": "none"}, {"mask_below_density": 2.0}],
)
def test_bad_options(options):
    with pytest.raises(ThinwireError, match=str(next(iter(options.values())))):
        MomentumCorrection(**options)
    if "mask_below_density" not in options:
        with pytest.raises(ThinwireError):
            Momentum(**options)
