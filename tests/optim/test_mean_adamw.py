"""AdamW for the exchange of updates: its ratio, its sketch and its message."""

import copy
import io

import pytest
import torch
import torch.distributed as dist

from tests.engines.models import Net, batch, flat_parameters, loss_of
from thinwire import ThinwireError
from thinwire.comm.simulated import Local
from thinwire.core.context import Context
from thinwire.optim import MeanAdamW
from thinwire.optim.gradient_sketch import TENSOR_SUMS, layout, noise_scale, sketch, squared_norms

KW = {"lr": 0.01, "betas": (0.9, 0.99), "weight_decay": 0.01}
SHAPES = [(5, 7), (3,), (), (4, 3, 3, 3), (2, 1)]


def params(*shapes, dtype=torch.float32):
    torch.manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in shapes]


def workers(count, *shapes, **options):
    """Optimizers of ``count`` workers, each with its own parameters."""
    return [MeanAdamW(params(*shapes), **KW, **options) for _ in range(count)]


def each(optimizer):
    return [param for group in optimizer.param_groups for param in group["params"]]


def together(optimizers, grads):
    """Step all workers; ``grads(worker, index, param)``."""
    for worker, optimizer in enumerate(optimizers):
        for index, param in enumerate(each(optimizer)):
            param.grad = grads(worker, index, param)
    if optimizers[0].due:
        summed = torch.stack([optimizer.sketch() for optimizer in optimizers]).sum(0)
        for optimizer in optimizers:
            optimizer.take(summed, len(optimizers))
    for optimizer in optimizers:
        optimizer.step()


def ratios(optimizer):
    return [optimizer.state[param]["ratio"] for param in each(optimizer)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("taken", [False, True], ids=["alone", "world of one"])
def test_one_worker_is_adamw(dtype, taken):
    ours, theirs = params(*SHAPES, dtype=dtype), params(*SHAPES, dtype=dtype)
    optimizer = MeanAdamW(ours, **KW)
    plain = torch.optim.AdamW(theirs, **KW, foreach=False)
    for step in range(20):
        for index, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
            mine.grad = torch.randn_like(mine) if (step + index) % 3 else None
            other.grad = None if mine.grad is None else mine.grad.clone()
        if taken and optimizer.due:
            optimizer.take(optimizer.sketch(), 1)
        optimizer.step()
        plain.step()
    for mine, other in zip(ours, theirs, strict=True):
        assert torch.equal(mine, other)
        assert torch.equal(optimizer.state[mine]["exp_avg_sq"], plain.state[other]["exp_avg_sq"])
    assert optimizer.metrics() == {}


@pytest.mark.parametrize("per", ["row", "tensor"])
def test_equal_gradients_have_ratio_one(per):
    optimizers = workers(4, (64, 48), (100,), per=per, sketch_every=1)
    for step in range(60):
        torch.manual_seed(step)
        same = [torch.randn(64, 48), torch.randn(100)]
        together(optimizers, lambda worker, index, param, same=same: same[index].clone())
    matrix, vector = ratios(optimizers[0])
    assert matrix.shape == ((64,) if per == "row" else (1,))
    assert vector.shape == (1,)
    assert torch.cat([matrix, vector]).mean() > 0.9
    assert matrix.min() > 0.5
    assert optimizers[0].metrics()["noise_scale"] < 0.1
    for a, b in zip(each(optimizers[0]), each(optimizers[3]), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("per", ["row", "tensor"])
def test_independent_noise_has_ratio_one_over_n(per):
    """So its second moment is that of the mean gradient, whose variance is N times smaller."""
    optimizers = workers(8, (64, 48), (100,), per=per, sketch_every=1)
    means = []

    def noise(worker, index, param):
        means[-1][index] += (grad := torch.randn_like(param)) / 8
        return grad

    for _ in range(80):
        means.append([torch.zeros(64, 48), torch.zeros(100)])
        together(optimizers, noise)
    for index, param in enumerate(each(optimizers[0])):
        state = optimizers[0].state[param]
        assert state["ratio"].mean() == pytest.approx(1 / 8, rel=0.2)
        assert state["ratio"].min() >= 1 / 8
        v = torch.zeros_like(param)
        for mean in means:
            v.mul_(0.99).addcmul_(mean[index], mean[index], value=0.01)
        assert float((state["exp_avg_sq"] * state["ratio"].mean()).mean()) == pytest.approx(float(v.mean()), rel=0.2)
    for first, other in zip(ratios(optimizers[0]), ratios(optimizers[5]), strict=True):
        assert torch.equal(first, other)


def test_rows_have_ratios_of_their_own():
    """One row of signal, one of noise, one without gradients: 1, 1 / N, and 1."""
    optimizers = workers(4, (3, 256), per="row", sketch_every=1)
    for step in range(60):
        signal = torch.randn(256, generator=torch.Generator().manual_seed(step))
        together(optimizers, lambda *_, s=signal: torch.stack([s, torch.randn(256), torch.zeros(256)]))
    signal, noise, nothing = ratios(optimizers[0])[0].tolist()
    assert signal > 0.7
    assert noise < 0.35
    assert nothing == 1.0


def test_the_ratio_divides_the_second_moment_alone():
    """Moments stay private; the step is AdamW's with ``r v``, as maths says."""
    one, other = workers(2, (4, 640))
    together([one, other], lambda *_: torch.randn(4, 640))
    param = each(one)[0]
    state, before = one.state[param], params((4, 640))[0].detach()
    m_hat, v_hat = param.grad, param.grad.square()
    root = (state["ratio"].unsqueeze(1) * v_hat).sqrt() + 1e-8
    assert state["ratio"].shape == (4,)
    torch.testing.assert_close(state["exp_avg_sq"], 0.01 * v_hat)
    torch.testing.assert_close(param.detach(), before * (1 - 1e-4) - 0.01 * m_hat / root)


@pytest.mark.parametrize("shape", [(200,), (16, 24), (8, 3, 5, 5)])
@pytest.mark.parametrize("per", ["row", "tensor"])
def test_the_sketch_is_linear_and_unbiased(shape, per):
    grads = torch.randn(3, *shape) + torch.randn(shape)
    of = layout(shape, per, 4, 8)
    estimates = []
    for step in range(400):
        ctx = Context(0, step, "0", 0)
        parts = [sketch(g.reshape(of.ratios, -1), of, ctx) for g in grads]
        of_mean = sketch(grads.mean(0).reshape(of.ratios, -1), of, ctx)
        torch.testing.assert_close(sum(parts)[:, :-1] / 3, of_mean[:, :-1], rtol=1e-4, atol=1e-4)
        estimates.append(squared_norms(sum(parts), 3))
    matrix = grads.reshape(3, of.ratios, -1)
    exact = matrix.mean(0).square().sum(1)
    found = torch.stack([mean for mean, _ in estimates])
    spread = 2 / of.sums
    torch.testing.assert_close(found.mean(0), exact, rtol=5 * (spread / 400) ** 0.5, atol=0.0)
    assert float((found / exact - 1).square().mean()) < 1.2 * spread
    torch.testing.assert_close(estimates[0][1], matrix.square().sum(2).mean(0))


def test_a_short_tensor_is_exact():
    x = torch.randn(1, TENSOR_SUMS)
    mean, local = squared_norms(sketch(x, layout((TENSOR_SUMS,), "auto", 4, 8), Context(0, 0, "", 0)), 1)
    torch.testing.assert_close(mean, local)


@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 3), (1, 5), (2, 1), ()])
def test_odd_shapes(shape):
    optimizers = workers(2, shape, (4,), per="row")
    for _ in range(9):
        together(optimizers, lambda worker, index, param: torch.randn_like(param))
    assert all(((r >= 0.5) & (r <= 1)).all() for r in ratios(optimizers[0]))


@pytest.mark.parametrize(
    ("shape", "per", "numbers"),
    [
        ((1000, 640), "auto", 5000), ((1000, 639), "auto", 32), ((1000, 639), "row", 5000), ((1000, 640), "tensor", 32),
        ((640,), "row", 32), ((7,), "auto", 8), ((), "auto", 2), ((64, 128, 3, 3), "auto", 320), ((8, 2), "row", 24),
    ],
)  # fmt: skip
def test_layouts(shape, per, numbers):
    assert layout(shape, per, 4, 8).numbers == numbers


def test_bytes_are_few():
    """Of the docstring, and below those of a dense exchange and below the bits that auto allows."""
    (optimizer,) = workers(1, (768, 768), (3072, 768), (768,), (50, 96))
    for param in each(optimizer):
        param.grad = torch.randn_like(param)
    message = optimizer.sketch()
    assert message.dtype == torch.float32
    assert message.nbytes == 8 + 4 * 5 * (768 + 3072) + 2 * 4 * 32
    dense = 4 * sum(param.numel() for param in each(optimizer))
    assert message.nbytes / 8 < dense / 32 / 32 * 1.01


def test_noise_scale():
    """Of ``G`` with norm 3 and noise of variance 2 in each of 500 elements, seen by 4 workers."""
    signal, noise = 9.0, 1000.0
    assert noise_scale(signal + noise / 4, signal + noise, 4) == pytest.approx(noise / signal)
    assert noise_scale(1.0, 4.0, 4) == float("inf")
    assert noise_scale(4.0, 4.0, 4) == 0.0
    model = torch.nn.Linear(64, 10)
    optimizers = [MeanAdamW(copy.deepcopy(model).named_parameters(), **KW, sketch_every=1) for _ in range(4)]
    for _ in range(60):
        together(optimizers, lambda worker, index, param: 1.0 + 2.0 * torch.randn_like(param))
    found = optimizers[0].metrics()
    assert list(found) == ["noise_scale", "noise_scale/weight", "noise_scale/bias"]
    assert found["noise_scale"] == pytest.approx(4.0, rel=0.4)
    assert found["noise_scale/weight"] == pytest.approx(4.0, rel=0.4)
    assert optimizers[3].metrics() == found


def train(rank, model, optimizer, first, last, before_step=lambda: None):
    for step in range(first, last):
        optimizer.zero_grad()
        loss_of(model, batch(rank, step)).backward()
        before_step()
        optimizer.step()


def _real(rank, per, resume):
    """Each rank steps on its own, and only sketches are exchanged, by the default group."""
    torch.manual_seed(0)
    model = Net()
    optimizer = MeanAdamW(model.parameters(), **KW, per=per, sketch_every=3)
    train(rank, model, optimizer, 0, 5)
    if resume:
        file = io.BytesIO()
        torch.save((model.state_dict(), optimizer.state_dict()), file)
        file.seek(0)
        model = Net()
        optimizer = MeanAdamW(model.parameters(), per="row", process_group=dist.group.WORLD)
        saved, state = torch.load(file)
        model.load_state_dict(saved)
        optimizer.load_state_dict(state)
    train(rank, model, optimizer, 5, 8)
    return flat_parameters(model), optimizer.state_dict(), optimizer.metrics(), optimizer.carrier.sent


@pytest.mark.parametrize(("per", "resume"), [("row", False), ("auto", False), ("tensor", True)])
def test_processes_are_the_simulation(world2, per, resume):
    models, optimizers = [], []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(Net())
        optimizers.append(MeanAdamW(models[-1].parameters(), **KW, per=per, sketch_every=3))
    carriers = Local.of(2)
    for step in range(8):
        for rank, (model, optimizer) in enumerate(zip(models, optimizers, strict=True)):
            optimizer.zero_grad()
            loss_of(model, batch(rank, step)).backward()
        if optimizers[0].due:
            flights = [carrier.all_reduce(o.sketch()) for carrier, o in zip(carriers, optimizers, strict=True)]
            for flight, optimizer in zip(flights, optimizers, strict=True):
                optimizer.take(flight.wait(1.0), 2)
        for optimizer in optimizers:
            optimizer.step()
    for rank, (parameters, state, metrics, sent) in enumerate(world2.run(_real, per, resume, timeout=240.0)):
        assert torch.equal(parameters, flat_parameters(models[rank]))
        assert metrics == optimizers[rank].metrics()
        assert sent == carriers[0].sent / (5 if resume else 1)  # steps 0, 1, 2, 3 and 6, or 6 alone
        expected = optimizers[rank].state_dict()
        assert state["param_groups"][0].items() >= expected["param_groups"][0].items()
        for index, values in expected["state"].items():
            assert state["state"][index].keys() == values.keys()
            assert all(torch.equal(state["state"][index][key], value) for key, value in values.items())
    assert not torch.equal(flat_parameters(models[0]), flat_parameters(models[1]))
    frozen = next(i for i, param in enumerate(models[0].parameters()) if not param.requires_grad)
    assert frozen not in expected["state"]


def test_checkpoints_resume_bit_for_bit():
    """At any step, also between take and step; bfloat16 parameters keep float32 moments."""
    for stop in range(5):
        whole, half = (
            [MeanAdamW([p.data.bfloat16().requires_grad_() for p in params((6, 50), (9,))], sketch_every=2, per="row")
             for _ in range(2)] for _ in range(2)
        )  # fmt: skip

        def grads(worker, index, param, step):
            generator = torch.Generator().manual_seed(100 * step + 10 * worker + index)
            return torch.randn(param.shape, generator=generator).to(param.dtype)

        def steps(optimizers, first, last):
            for step in range(first, last):
                together(optimizers, lambda *args, step=step: grads(*args, step))

        steps(whole, 0, 6)
        steps(half, 0, stop)
        resumed = []
        for optimizer in half:
            clones = [param.detach().clone().requires_grad_() for param in each(optimizer)]
            resumed.append(MeanAdamW(clones, lr=1.0, sketch_every=5, seed=3))
            resumed[-1].load_state_dict(copy.deepcopy(optimizer.state_dict()))
        steps(resumed, stop, 6)
        for a, b in zip(whole, resumed, strict=True):
            for one, other in zip(each(a), each(b), strict=True):
                assert torch.equal(one, other)
                assert a.state[one]["exp_avg_sq"].dtype == b.state[other]["exp_avg_sq"].dtype == torch.float32
                assert all(torch.equal(b.state[other][key], value) for key, value in a.state[one].items())


def test_the_first_steps_have_a_sketch_each():
    (optimizer,) = workers(1, (4,), sketch_every=3)
    due = []
    for _ in range(10):
        due.append(optimizer.due)
        optimizer.step()
    assert [step for step in range(10) if due[step]] == [0, 1, 2, 3, 6, 9]


def test_a_taken_sketch_is_in_the_checkpoint():
    (optimizer,) = workers(1, (6, 50))
    each(optimizer)[0].grad = torch.randn(6, 50)
    assert optimizer.due
    optimizer.take(2 * optimizer.sketch(), 2)
    assert not optimizer.due
    (other,) = workers(1, (6, 50))
    other.load_state_dict(optimizer.state_dict())
    assert not other.due
    assert torch.equal(*(one.state[each(one)[0]]["ratio"] for one in (optimizer, other)))


def test_goes_on_from_adamw():
    ours, theirs = params((4, 6)), params((4, 6))
    plain = torch.optim.AdamW(theirs, **KW, foreach=False)
    theirs[0].grad = torch.randn(4, 6)
    plain.step()
    optimizer = MeanAdamW(ours, sketch_every=3)
    optimizer.load_state_dict(plain.state_dict())
    ours[0].data.copy_(theirs[0].data)
    for _ in range(3):
        theirs[0].grad = torch.randn(4, 6)
        ours[0].grad = theirs[0].grad.clone()
        plain.step()
        optimizer.step()
        assert torch.equal(ours[0], theirs[0])
    assert optimizer.param_groups[0]["sketch_every"] == 3


def test_closures_schedulers_and_copies():
    (optimizer,) = workers(1, (3,))
    (param,) = each(optimizer)

    def closure():
        optimizer.zero_grad()
        (loss := param.square().sum()).backward()
        return loss.item()

    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
    losses = []
    for _ in range(5):
        losses.append(optimizer.step(closure))
        schedule.step()
    assert losses == sorted(losses, reverse=True)
    assert copy.deepcopy(optimizer).steps == 5


def test_a_missing_gradient_counts_as_zero():
    """So messages have one size; a worker without a gradient does not step the parameter."""
    optimizers = workers(2, (2, 50), per="row")
    together(optimizers, lambda worker, index, param: torch.ones_like(param) if worker == 0 else None)
    assert ratios(optimizers[1])[0].tolist() == [0.5, 0.5]
    assert torch.equal(each(optimizers[1])[0], params((2, 50))[0])
    assert not torch.equal(each(optimizers[0])[0], params((2, 50))[0])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_a_nonfinite_row_keeps_its_ratio(value):
    optimizers = workers(2, (3, 50), per="row", sketch_every=1)
    same = torch.randn(3, 50)
    together(optimizers, lambda *_: same + 0.5 * torch.randn(3, 50))
    before = ratios(optimizers[0])[0].clone()
    damaged = torch.randn(3, 50)
    damaged[1, 7] = value
    together(optimizers, lambda worker, *_: damaged if worker else torch.randn(3, 50))
    for optimizer in optimizers:
        after = ratios(optimizer)[0]
        assert after[1] == before[1]
        assert (after[[0, 2]] != before[[0, 2]]).any()


def _silent(rank):
    """Rank 1 has another seed, later another model; both ranks get the error."""
    texts = []
    for options, shape in (({"seed": rank}, (4, 50)), ({}, (4 + rank, 50))):
        (optimizer,) = workers(1, shape, **options)
        each(optimizer)[0].grad = torch.ones(shape)
        message = optimizer.sketch()
        try:
            if "seed" in options:
                optimizer.step()
            else:
                optimizer.take(torch.cat([message, message[:rank]]) if rank else message[:-1], 2)
        except ThinwireError as error:
            texts.append(str(error))
    return texts


def test_workers_that_differ_are_found(world2):
    for seeds, sizes in world2.run(_silent, timeout=240.0):
        assert "different steps or have different seeds" in seeds
        assert "give all one seed" in seeds
        assert "give all workers the same parameters and options" in sizes


def test_steps_that_differ_are_found():
    one, other = workers(2, (4, 50), sketch_every=1)
    for optimizer in (one, other):
        each(optimizer)[0].grad = torch.ones(4, 50)
    caught = 0
    for _ in range(8):
        summed = one.sketch() + other.sketch()
        other.param_groups[0]["steps"] += 1
        summed_apart = one.sketch() + other.sketch()
        other.param_groups[0]["steps"] -= 1
        for optimizer in (one, other):
            optimizer.take(summed, 2)
            optimizer.step()
        try:
            one.take(summed_apart, 2)
        except ThinwireError:
            caught += 1
    assert caught >= 6


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"lr": -1.0}, "lr is -1.0"),
        ({"betas": (0.9, 1.0)}, "betas are"),
        ({"eps": 0.0}, "eps is 0.0"),
        ({"weight_decay": -0.1}, "weight_decay is -0.1"),
        ({"sketch_every": 0}, "sketch_every is 0; it must be a whole number, at least 1, e.g. 8"),
        ({"sketches": 0}, "sketches is 0; it must be a whole number, at least 1, e.g. 4"),
        ({"ratio_beta": 1.0}, r"ratio_beta is 1.0; it must be in \[0, 1\), e.g. 0.95"),
        ({"per": "column"}, "per is 'column'; choose one of auto, row, tensor"),
        ({"seed": 0.5}, "seed is 0.5; it must be a whole number"),
        ({"process_group": 3}, "process_group is a int; give the process group of all workers"),
    ],
)
def test_wrong_options(options, says):
    with pytest.raises(ThinwireError, match=says):
        MeanAdamW(params((2, 2)), **options)


def test_wrong_groups_and_tensors():
    with pytest.raises(ThinwireError, match=r"seed is 1 in a parameter group, and 0 elsewhere; .*MeanAdamW\(groups"):
        MeanAdamW([{"params": params((2, 2)), "seed": 1}])
    with pytest.raises(ThinwireError, match="per is 'rows'"):
        MeanAdamW([{"params": params((2, 2)), "per": "rows"}])
    with pytest.raises(ThinwireError, match=r"shape \(2,\) is complex; .* use torch.optim.AdamW"):
        MeanAdamW(params((2,), dtype=torch.complex64))
    (optimizer,) = workers(1, (2, 2))
    with pytest.raises(ThinwireError, match="world is 0"):
        optimizer.take(optimizer.sketch(), 0)
    embedding = torch.nn.Embedding(4, 3, sparse=True)
    optimizer = MeanAdamW(embedding.parameters())
    embedding(torch.tensor([1])).sum().backward()
    for call in (optimizer.sketch, optimizer.step):
        with pytest.raises(ThinwireError, match=r"sparse, .* use torch.nn.Embedding\(sparse=False\)"):
            call()


def test_groups_have_a_per_of_their_own():
    matrices = params((4, 6), (4, 6))
    optimizer = MeanAdamW([{"params": matrices[:1], "per": "row"}, {"params": matrices[1:], "per": "tensor"}])
    optimizer.add_param_group({"params": params((3,)), "lr": 0.5})
    for param in each(optimizer):
        param.grad = torch.ones_like(param)
    optimizer.take(2 * optimizer.sketch(), 2)
    assert [len(ratio) for ratio in ratios(optimizer)] == [4, 1, 1]


def test_the_callers_settings_do_not_matter():
    results = []
    for settings in (torch.enable_grad(), torch.inference_mode(), torch.autocast("cpu", torch.bfloat16)):
        optimizers = workers(2, (6, 50), per="row")
        torch.manual_seed(1)
        with settings:
            together(optimizers, lambda *_: torch.randn(6, 50))
        results.append(torch.cat([each(optimizers[0])[0].flatten(), ratios(optimizers[0])[0]]))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
