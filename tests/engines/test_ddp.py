"""DistributedDataParallel on real gloo processes."""

import warnings

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import thinwire
from tests.comm.test_process_group import Clock
from tests.engines.models import Net, accumulated, batch, build, flat_parameters, loss_of, simulated, train_ddp
from thinwire import ThinwireError, Warmup, cast, dense, dgc, topk

SMALL_BUCKETS = {"bucket_cap_mb": 0.008}


def close(wire) -> dict:
    """What a test needs to know of a session, and an end to it."""
    rows = list(wire.ledger.rows)
    facts = {
        "wire_bytes": sum(row.wire_bytes for row in rows),
        "dense_bytes": sum(row.dense_bytes for row in rows),
        "compressed": [row.compressed_wire_bytes for row in rows],
        "error": rows[0].error if rows else None,
        "notes": wire.ledger.notes,
        "report": wire.report(),
    }
    wire.detach()
    return facts


def _train(rank, method, steps, ddp_options, sgd, options):
    parameters, wire = train_ddp(rank, method, steps, ddp_options, sgd, **options)
    return parameters, close(wire)


def trained(world, method, steps=20, ddp_options=None, sgd=None, **options):
    """Train on every rank; all must end bit-equal, having sent fewer bytes than dense with an error above zero."""
    results = world.run(_train, method, steps, ddp_options, sgd, options)
    parameters, facts = results[0]
    for other, _ in results[1:]:
        assert torch.equal(parameters, other), "replicas drifted apart"
    assert parameters.isfinite().all()
    if method.name != "dense":
        assert facts["wire_bytes"] < facts["dense_bytes"]
        assert facts["error"] > 0
    return parameters, facts


def _plain(rank, steps, ddp_options):
    return train_ddp(rank, None, steps, ddp_options)[0]


@pytest.mark.parametrize("options", [{}, {"gradient_as_bucket_view": True}, SMALL_BUCKETS], ids=str)
def test_dense_is_bit_equal_to_plain_ddp(world2, world4, options):
    for world in (world2, world4):
        expected = world.run(_plain, 6, options)[0]
        assert torch.equal(trained(world, dense(), 6, options)[0], expected)


METHODS = {
    "dgc": dgc(0.02),
    "dgc-sampled-nesterov": dgc(0.05, selection="sampled", values="float16"),
    "dgc-warmup-clip": dgc(0.01, warmup=Warmup(8), clip=0.5),
    "dgc-local-decay": dgc(0.02, decay="local", masking=False),
    "dgc-int4": dgc(0.02, values="int4"),
    "topk": topk(0.02),
    "topk-sign": topk(0.02, values="sign"),
    "fp16": cast("float16"),
    "dgc-two-phase": dgc(0.02, route="two_phase", warmup=Warmup(8)),
    "dgc-two-phase-sampled": dgc(
        0.05, route="two_phase", second_stage_density_ratio=2.0, selection="sampled", values="float16"
    ),
    "topk-two-phase-int4": topk(0.05, route="two_phase", values="int4", clip=0.5),
}
SGD = {
    "dgc-sampled-nesterov": {"nesterov": True},
    "dgc-warmup-clip": {"weight_decay": 1e-3},
    "dgc-local-decay": {"weight_decay": 1e-2},
}


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("workers", [2, 4])
def test_simulator_equals_the_real_run(world2, world4, workers, name):
    """Across DDP's bucket rebuild after the first step; with one bucket, everything here is gathered: bit for bit."""
    torch.set_num_threads(1)
    method, sgd = METHODS[name], SGD.get(name)
    real, facts = trained(world2 if workers == 2 else world4, method, 20, {}, sgd)
    expected, result = simulated(method, workers, 20, sgd)
    if workers == 2 or name.startswith(("topk", "dgc-s", "dgc-l", "dgc-i", "dgc-t")) or name == "dgc":
        assert torch.equal(real, expected)
    else:  # gloo's all-reduce of more than two picks its own order
        tolerance = 1e-3 if name == "fp16" else 1e-5
        torch.testing.assert_close(real, expected, rtol=tolerance, atol=tolerance)
    assert facts["wire_bytes"] == result.ledger.wire_bytes
    assert (real - simulated(dense(), workers, 20, sgd)[0]).abs().max() > 0


def _conserves(rank, method):
    """What was compensated of one weight whose gradients are known, what all received of it, and what is left."""
    torch.manual_seed(0)
    model = nn.Linear(64, 50, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9 if method.absorbs else 0.0)
    wire = thinwire.attach(ddp := DistributedDataParallel(model), method, optimizer=optimizer)
    compensated, velocity, received = torch.zeros(3, 50, 64)
    for step in range(15):
        x, y = torch.randn(6, 114, generator=torch.Generator().manual_seed(100 * step + rank)).split([64, 50], 1)
        optimizer.zero_grad()
        (ddp(x) * y).sum().backward()
        received += model.weight.grad
        optimizer.step()
        velocity = (0.9 if method.absorbs else 0.0) * velocity + y.t() @ x
        compensated += velocity
    residual = wire.workers[0].local["weight"].now["residual"]
    return compensated, received, residual, model.weight.detach(), close(wire)


@pytest.mark.parametrize("values", [None, "float16", "int8", "int4", "int2", "sign"])
@pytest.mark.parametrize("recipe", [topk, dgc])
def test_sent_and_left_is_what_was_asked(world2, recipe, values):
    method = recipe(0.02, values=values, **({"masking": False} if recipe is dgc else {}))
    (compensated, received, left, weight, facts), other = world2.run(_conserves, method)
    assert torch.equal(weight, other[3])
    assert torch.equal(received, other[1])
    assert facts["wire_bytes"] < facts["dense_bytes"]
    assert facts["error"] > 0
    torch.testing.assert_close(2 * received + left + other[2], compensated + other[0], rtol=1e-5, atol=1e-4)


def test_fifty_steps_keep_replicas_equal(world2, world4):
    for world in (world2, world4):
        for options in ({}, SMALL_BUCKETS | {"gradient_as_bucket_view": True}):
            trained(world, dgc(0.01, warmup=Warmup(12)), 50, options)


def test_buckets_do_not_change_the_result(world2):
    for method in (dgc(0.02), dgc(0.02, clip=0.3), topk(0.05)):
        one = trained(world2, method, 10)[0]
        assert torch.equal(trained(world2, method, 10, SMALL_BUCKETS)[0], one)
        assert torch.equal(trained(world2, method, 10, SMALL_BUCKETS | {"gradient_as_bucket_view": True})[0], one)
        assert torch.equal(trained(world2, method, 10, {"static_graph": True})[0], one)


def _two_dtypes(rank, method, options):
    torch.manual_seed(0)
    module = torch.nn.ModuleList([torch.nn.Linear(12, 20), torch.nn.Linear(12, 20).double(), torch.nn.Linear(12, 3)])
    module.forward = lambda x: sum(one(x.to(one.weight.dtype)).square().mean().float() for one in module)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.05, momentum=0.9)
    ddp = DistributedDataParallel(module, **options)
    wire = thinwire.attach(ddp, method, optimizer=optimizer, kernels="reference")
    for step in range(4):
        optimizer.zero_grad()
        ddp(torch.randn(5, 12, generator=torch.Generator().manual_seed(10 * step + rank))).backward()
        optimizer.step()
    wire.detach()
    return flat_parameters(module), wire.step, [row.wire_bytes for row in wire.ledger.rows]


def test_a_static_graph_of_several_buckets_is_exchanged_from_the_first_step_on(world2):
    """In its first pass DDP calls every bucket the first and none the last."""
    for method in (dgc(0.1), topk(0.1), thinwire.ef21(0.1), thinwire.dense()):
        (weight, steps, sent), other = world2.run(_two_dtypes, method, {"static_graph": True})
        assert torch.equal(weight, other[0])
        plain = world2.run(_two_dtypes, method, {})[0]
        assert torch.equal(weight, plain[0])
        assert (steps, len(sent)) == (4, 4)
        assert sum(sent) == sum(plain[2]) > 0


def test_small_messages_travel_together(world2):
    one, facts = trained(world2, dgc(0.02), 10, SMALL_BUCKETS)
    assert any(note.startswith("1 exchanges a step for ") for note in facts["notes"])
    alone, facts = trained(world2, dgc(0.02), 10, SMALL_BUCKETS, emulate_link="1gbit")  # no latency: nothing to save
    assert not any("travel together" in note for note in facts["notes"])
    assert torch.equal(one, alone)


def _many_buckets(rank, repeats, method):
    for _ in range(repeats):
        _, wire = train_ddp(rank, method, 6, SMALL_BUCKETS)
        buckets = len(wire.stages.buckets)
        wire.detach()
    return buckets


def test_many_buckets_do_not_hang(world2, world4):
    for world in (world2, world4):
        assert min(world.run(_many_buckets, 20, dgc(0.02), timeout=120)) >= 3
        assert min(world.run(_many_buckets, 10, dgc(0.02, route="two_phase"), timeout=120)) >= 3


def test_channels_last(world2):
    torch.set_num_threads(1)
    method, sgd = dgc(0.02, decay="local"), {"weight_decay": 0.1}
    real, _ = trained(world2, method, 12, {}, sgd, channels_last=True)
    expected, _ = simulated(method, 2, 12, sgd, channels_last=True)
    assert torch.equal(real, expected)


def _momentum_sgd(rank, method, sgd, ddp_options):
    torch.set_default_dtype(torch.float64)
    try:
        return train_ddp(rank, method, 25, ddp_options, sgd)[0]
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize(("decay", "weight_decay"), [("separate", 0.0), ("separate", 0.01), ("local", 0.01)])
def test_dgc_at_density_one_is_momentum_sgd(world2, nesterov, decay, weight_decay):
    sgd = {"nesterov": nesterov, "weight_decay": weight_decay}
    expected = world2.run(_momentum_sgd, None, sgd, {})[0]
    got = world2.run(_momentum_sgd, dgc(1.0, masking=False, decay=decay), sgd, {})[0]
    assert (got - expected).abs().max() < 1e-12
    sparse = world2.run(_momentum_sgd, dgc(0.01, masking=False, decay=decay), sgd, {})[0]
    assert (sparse - expected).abs().max() > 1e-4, "the same test must tell compressed from dense"


def test_decoupled_decay_at_density_one(world2):
    """AdamW-style: momentum SGD on the loss alone, and ``lr * wd * x`` apart from it."""
    sgd = {"weight_decay": 0.01}
    got = world2.run(_momentum_sgd, dgc(1.0, decay="decoupled"), sgd, {})[0]
    assert (got - world2.run(_decoupled_oracle, sgd)[0]).abs().max() < 1e-12


def _decoupled_oracle(rank, sgd):
    torch.set_default_dtype(torch.float64)
    try:
        model, optimizer = build()
        ddp = DistributedDataParallel(model)
        trainable = [p for p in model.parameters() if p.requires_grad]
        for step in range(25):
            optimizer.zero_grad()
            loss_of(ddp, batch(rank, step)).backward()
            decay = [0.05 * sgd["weight_decay"] * p.detach() for p in trainable]
            optimizer.step()
            with torch.no_grad():
                for p, d in zip(trainable, decay, strict=True):
                    p.sub_(d)
        return flat_parameters(model)
    finally:
        torch.set_default_dtype(torch.float32)


def _accumulate(rank, method):
    """Two micro-batches under no_sync equal one batch of both."""
    model, optimizer = build()
    ddp = DistributedDataParallel(model, **SMALL_BUCKETS)
    wire = thinwire.attach(ddp, method, optimizer=optimizer)
    for step in range(8):
        optimizer.zero_grad()
        with ddp.no_sync():
            (loss_of(ddp, batch(rank, 2 * step)) / 2).backward()
        (loss_of(ddp, batch(rank, 2 * step + 1)) / 2).backward()
        optimizer.step()
    close(wire)
    return flat_parameters(model)


def test_accumulation_under_no_sync(world2):
    torch.set_num_threads(1)
    method = dgc(0.02)
    a, b = world2.run(_accumulate, method)
    assert torch.equal(a, b)
    torch.testing.assert_close(a, accumulated(method, 8), rtol=1e-4, atol=1e-5)


def _accumulate_without_no_sync(rank):
    model, optimizer = build()
    ddp = DistributedDataParallel(model)
    wire = thinwire.attach(ddp, topk(0.1), optimizer=optimizer)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loss_of(ddp, batch(rank, 0)).backward()
        loss_of(ddp, batch(rank, 1)).backward()
        loss_of(ddp, batch(rank, 2)).backward()
    wire.detach()
    return [str(w.message) for w in caught if "no_sync" in str(w.message)]


def test_accumulation_without_no_sync_warns_once(world2):
    assert [len(messages) for messages in world2.run(_accumulate_without_no_sync)] == [1, 1]


class Mixed(nn.Module):
    """Parameters of three dtypes: so DDP makes a bucket for each."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(3, 64)
        self.b = nn.Linear(64, 64).to(torch.bfloat16)
        self.c = nn.Linear(64, 4).double()

    def forward(self, x):
        x = torch.tanh(self.a(x.mean((2, 3))))
        return self.c(torch.tanh(self.b(x.bfloat16())).double())


def _mixed(rank, method):
    torch.manual_seed(0)
    model = Mixed()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    wire = thinwire.attach(ddp := DistributedDataParallel(model), method, optimizer=optimizer)
    losses = []
    for step in range(12):
        optimizer.zero_grad()
        loss = ddp(batch(rank, step % 3)).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    dtypes = {key: value.dtype for state in wire.workers[0].local.values() for key, value in state.now.items()}
    facts = close(wire)
    return [p.detach() for p in model.parameters()], losses, facts, dtypes


@pytest.mark.parametrize("method", [dense(), dgc(0.05), topk(0.1), cast("float16")], ids=lambda m: m.name)
def test_several_dtypes(world2, method):
    (a, losses, facts, dtypes), (b, *_) = world2.run(_mixed, method)
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    assert losses[-1] < losses[0]
    assert torch.bfloat16 not in dtypes.values(), "residuals are kept in float32 at least"
    if method.name in ("dgc", "topk"):
        assert 0 < facts["error"] < 1
        assert facts["wire_bytes"] < facts["dense_bytes"]


def _adamw(rank):
    torch.manual_seed(0)
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    wire = thinwire.attach(ddp := DistributedDataParallel(model), topk(0.05), optimizer=optimizer)
    losses = []
    for step in range(40):
        optimizer.zero_grad()
        loss = loss_of(ddp, batch(rank, step % 4))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    close(wire)
    return flat_parameters(model), losses


def test_topk_trains_with_adamw(world2):
    (a, losses), (b, _) = world2.run(_adamw)
    assert torch.equal(a, b)
    assert sum(losses[-4:]) < 0.7 * sum(losses[:4])


def _attach_late_and_detach(rank):
    """Plain DDP, then DGC at density 1, then plain again: the same as plain all the way."""
    torch.set_default_dtype(torch.float64)
    sgd = {"weight_decay": 0.01, "nesterov": True}
    try:
        model, optimizer = build(**sgd)
        ddp = DistributedDataParallel(model)
        seen, wire = [], None
        for step in range(12):
            if step == 4:
                wire = thinwire.attach(ddp, dgc(1.0, masking=False), optimizer=optimizer)
            if step == 8:
                wire.detach()
            if step in (3, 4, 8):
                seen.append({key: optimizer.param_groups[0][key] for key in ("momentum", "nesterov", "weight_decay")})
            optimizer.zero_grad()
            loss_of(ddp, batch(rank, step)).backward()
            optimizer.step()
        again = thinwire.attach(ddp, topk(0.1), optimizer=optimizer)
        again.detach()
        return flat_parameters(model), train_ddp(rank, None, 12, {}, sgd)[0], seen
    finally:
        torch.set_default_dtype(torch.float32)


def test_attach_between_steps_and_detach(world2):
    for got, expected, seen in world2.run(_attach_late_and_detach):
        assert (got - expected).abs().max() < 1e-12
        assert (
            seen == [{"momentum": 0.9, "nesterov": True, "weight_decay": 0.01}] * 3
        )  # what is written is what is meant


def _change_method(rank):
    model, optimizer = build()
    ddp = DistributedDataParallel(model)
    wire = thinwire.attach(ddp, dgc(0.02), optimizer=optimizer)
    facts = []
    for step in range(12):
        if step == 4:
            before = {name: state.now["residual"].clone() for name, state in wire.workers[0].local.items() if state.now}
            wire.set_method(topk(0.05))
            after = {name: wire.workers[0].local[name].now["residual"] for name in before}
            kept = all(torch.allclose(after[name], 0.1 * r) for name, r in before.items())  # 1 - momentum
            facts.append((kept, optimizer.param_groups[0]["momentum"], len(before)))
        if step == 8:
            wire.set_method(dense())
            facts.append("pending_residual" in wire.workers[0].local["middle.weight"].now)
        if step == 9:
            facts.append("pending_residual" in wire.workers[0].local["middle.weight"].now)
            wire.set_method(dgc(0.01))
            facts.append(optimizer.param_groups[0]["momentum"])
        optimizer.zero_grad()
        loss_of(ddp, batch(rank, step)).backward()
        optimizer.step()
    ratios = [row.compressed_wire_bytes for row in wire.ledger.rows]
    close(wire)
    return flat_parameters(model), facts, ratios


def test_methods_change_in_mid_run(world2):
    (a, facts, sent), (b, _, _) = world2.run(_change_method)
    assert torch.equal(a, b)
    assert facts == [(True, 0.9, 4), True, False, 0.9]
    assert sent[0] < sent[5]
    assert sent[8] == 0  # nothing is compressed while dense


def _bad(rank, what):
    model, optimizer = build()
    ddp = DistributedDataParallel(model)
    method = dgc(0.01)
    if what == "adam":
        optimizer = torch.optim.AdamW(model.parameters())
    elif what == "no optimizer":
        optimizer = None
    elif what == "other parameters":
        optimizer = torch.optim.SGD(model.first.parameters(), lr=0.1, momentum=0.9)
    elif what == "dampening":
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, dampening=0.5)
    elif what == "no ddp":
        ddp = model
    elif what == "slot":
        from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook

        ddp.register_comm_hook(None, fp16_compress_hook)
    elif what == "twice":
        thinwire.attach(ddp, topk(0.1), optimizer=optimizer)
    elif what == "replaced":
        model.first.weight = nn.Parameter(model.first.weight.detach().clone())
    elif what == "plans":
        method = dgc(0.01 if rank == 0 else 0.02)
    elif what == "one rank fails":
        optimizer = optimizer if rank == 0 else torch.optim.AdamW(model.parameters())
    elif what == "clip":
        method = dgc(0.01, clip=0.1 + rank)
    elif what == "sparse":
        model = nn.Sequential(nn.EmbeddingBag(50, 8, sparse=True), nn.Linear(8, 2))
        ddp, optimizer = DistributedDataParallel(model), torch.optim.SGD(model.parameters(), lr=0.1)
    before = [dict(group) for group in optimizer.param_groups] if optimizer else None
    try:
        thinwire.attach(ddp, method, optimizer=optimizer)
    except ThinwireError as error:
        if optimizer:
            changed = [
                g["momentum"] != b["momentum"]
                for g, b in zip(optimizer.param_groups, before, strict=True)
                if "momentum" in g
            ]
            assert not any(changed), "an attach that fails must change nothing"
        return str(error)
    return None


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("adam", r"needs torch.optim.SGD, not AdamW; thinwire.topk\(density\) works with every optimizer"),
        ("no optimizer", r"must see optimizer\.step\(\)"),
        ("other parameters", r"parameter 'conv.weight' is not in the optimizer"),
        ("dampening", r"dampening=0.5"),
        ("no ddp", r"takes a DistributedDataParallel or .*, not Net; wrap the model first"),
        ("slot", r"communication hook of this DDP model is taken"),
        ("twice", r"topk is attached to this model"),
        ("replaced", r"parameter 'first.weight' was replaced"),
        ("plans", r"rank 0 has unit 'conv.weight'.*'density': 0.01.*rank 1 has unit 'conv.weight'.*'density': 0.02"),
        ("one rank fails", r"rank 0 has .*; rank 1 has error: dgc owns the momentum|needs torch.optim.SGD, not AdamW"),
        ("clip", r"rank 0 has method.*\"clip\": 0.1.*rank 1 has method.*\"clip\": 1.1"),
        ("sparse", r"0.weight has sparse gradients, which dgc can't compress, remember or clip"),
    ],
)
def test_bad_input_is_refused_before_anything_is_sent(world2, what, message):
    import re

    for text in world2.run(_bad, what, timeout=30):
        assert text is not None
        assert re.search(message, text), text


def _sparse_dense(rank, method):
    torch.manual_seed(0)
    model = nn.Sequential(nn.EmbeddingBag(50, 8, sparse=True), nn.Linear(8, 2))
    ddp = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    wire = thinwire.attach(ddp, method, optimizer=optimizer) if method else None
    for _ in range(3):
        optimizer.zero_grad()
        ddp(torch.arange(6).view(2, 3) + rank).square().sum().backward()
        optimizer.step()
    if wire:
        wire.detach()
    return flat_parameters(model)


def test_sparse_gradients_pass_an_uncompressed_unit(world2):
    expected = world2.run(_sparse_dense, None)[0]
    for method in (dense(), topk(0.1, keep_dense=["0.weight"])):
        got = world2.run(_sparse_dense, method)
        assert torch.equal(got[0], got[1])
        if method.name == "dense":
            assert torch.equal(got[0], expected)


def _sparse_refused(rank, method):
    model = nn.Sequential(nn.EmbeddingBag(50, 8, sparse=True), nn.Linear(8, 2))
    ddp = DistributedDataParallel(model)
    with pytest.raises(ThinwireError, match=r"0.weight has sparse gradients, which .* can't compress"):
        thinwire.attach(ddp, method, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))


def test_sparse_gradients_are_refused_before_a_backward_by_what_loses_without_a_memory_too(world2):
    for method in (cast("float16"), thinwire.methods.randk(0.1, feedback=False), thinwire.qsgd(4), topk(0.1)):
        world2.run(_sparse_refused, method)


def _replaced_later(rank):
    model, optimizer = build()
    ddp = DistributedDataParallel(model)
    wire = thinwire.attach(ddp, topk(0.1), optimizer=optimizer)
    loss_of(ddp, batch(rank, 0)).backward()
    model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True)
    with pytest.raises(ThinwireError, match="replaced after wrapping"):
        ddp(batch(rank, 1))
    wire.detach()


def test_a_parameter_replaced_while_attached(world2):
    world2.run(_replaced_later)


def _tuple_bucket(rank):
    model, optimizer = build()
    ddp = DistributedDataParallel(model)
    wire = thinwire.attach(ddp, topk(0.1), optimizer=optimizer)
    hook = ddp._comm_hooks[0][0]
    with pytest.raises(ThinwireError, match="compiled autograd's python reducer"):
        hook(None, (torch.zeros(1), torch.zeros(1)))
    wire.detach()


def test_the_python_reducer_is_refused(world2):
    world2.run(_tuple_bucket)


def _break_even(rank):
    _, wire = train_ddp(rank, dgc(0.02, warmup=Warmup(8, (0.9, 0.5, 0.2, 0.1))), 10)
    sent = [row.compressed_wire_bytes for row in wire.ledger.rows]
    facts = close(wire)
    return sent, facts["notes"]


def test_stages_above_the_break_even_density_go_dense(world4):
    sent, notes = world4.run(_break_even)[0]
    assert sent[0] == sent[3] > sent[4] == sent[5] > sent[6] > sent[8]  # two steps a stage, two stages dense
    assert any("sent dense at warm-up density 0.5" in note and "with 4 workers" in note for note in notes)


def _on_a_link(rank, link):
    """Seconds of the link's own clock in the last step, the times when messages arrived, bytes sent, and the label."""
    from functools import partial

    from thinwire.comm import hierarchical

    clock, paced = Clock(), hierarchical.Paced
    hierarchical.Paced = partial(paced, clock=clock)
    try:
        model = nn.Sequential(*[nn.Linear(256, 256) for _ in range(4)])
        ddp = DistributedDataParallel(model, bucket_cap_mb=0.2)
        wire = thinwire.attach(ddp, cast("float16"), emulate_link=link)
    finally:
        hierarchical.Paced = paced
    x = torch.randn(4, 256)
    for _ in range(4):
        start, before = clock.now, len(clock.slept)
        ddp(x).sum().backward()
    wire.detach()
    arrived = [now - start for now, _ in clock.slept[before:]]
    return clock.now - start, arrived, wire.ledger.rows[-1].wire_bytes, wire.ledger.link


def test_an_emulated_link_takes_its_time_and_is_labelled(world2):
    """On the link's own clock a step takes as long as its bytes do, one bucket after the other, and no longer."""
    size = 4 * (256 * 256 + 256) * 2  # bytes in fp16
    for link in ("50mbit", "200mbit"):
        seconds, arrived, sent, label = world2.run(_on_a_link, link)[0]
        assert size <= sent < 1.001 * size, "the gradients and the headers"
        assert seconds == pytest.approx(sent * 8 / (50e6 if link == "50mbit" else 200e6), rel=1e-6)
        assert len(arrived) > 1
        assert arrived == sorted(set(arrived)), "the link carries one bucket at a time"
        assert "emulated" in label
