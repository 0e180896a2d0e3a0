"""A coverage-guided fuzzing target for ``thinwire.session.checkpoint`` (libFuzzer, through atheris).

    python tests/fuzz/fuzz_checkpoint.py -runs=1000000 -max_len=200 -rss_limit_mb=1500

The bytes of every input choose how the state of a tiny session is changed before it is restored: values of any kind at
any path, other world sizes, lists of states, or the bytes that ``torch.save`` wrote. Anything but a ``ThinwireError``
or a finite state of the right shapes is a crash. What ``torch.load`` itself raises is torch's.
"""

import contextlib
import io
import json
import sys
import tempfile
import warnings
import zipfile
from collections.abc import Iterable
from pathlib import Path

import atheris
import torch

with atheris.instrument_imports(include=["thinwire.session.checkpoint", "thinwire.core.registry", "thinwire.memories"]):
    from thinwire.session import checkpoint

from thinwire import ThinwireError, dgc, topk
from thinwire.comm.simulated import Local
from thinwire.session.rounds import OptimizerSteps
from thinwire.session.session import Session

WORLDS = (1, 2, 3, 4)
SHAPE = (6, 5)
NUMBERS = (0, 1, 2, 3, 4, -1, 17, 2**31, 2**62 - 1, 2**62, 2**63, -(2**63), 10**5000, True, False)
REALS = (0.0, -0.0, 0.5, 0.9, 0.999999, 1.0, 1e-320, 1e38, 1e300, float("nan"), float("inf"), float("-inf"))
TEXTS = (
    "",
    "w",
    "b",
    "residual",
    "momentum",
    "pending_residual",
    "decay",
    "kind",
    "none",
    "\ud800",
    "[" * 3000,
    "\n",
    "{}",
)
DTYPES = (
    torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.int64, torch.uint8,
    torch.bool, torch.complex64,
)  # fmt: skip
SHAPES = ((), (0,), (1,), (4,), SHAPE, (1, *SHAPE), (2, *SHAPE), (4, *SHAPE), (0, *SHAPE), (1, 5), (1, 30), (5, 6))


def session(method, momentum: float) -> Session:
    torch.manual_seed(0)
    named = [("w", torch.nn.Parameter(torch.randn(SHAPE))), ("b", torch.nn.Parameter(torch.randn(5)))]
    optimizer = torch.optim.SGD([param for _, param in named], lr=0.1, momentum=momentum, weight_decay=0.01)
    made = Session(named, method, Local.of(1)[0], OptimizerSteps(optimizer))
    for state in (*made.workers[0].local.values(), *(unit.shared for unit in made.units)):
        for tensor in state.now.values():
            tensor.normal_()
    return made


SESSIONS = [session(dgc(0.1), 0.9), session(topk(0.1), 0.9), session(dgc(0.1), 0.0)]


def saved(made: Session, world: int) -> list[dict]:
    clock = {"world": world, "step": 17, "installed_at": 3}
    states = []
    for rank in range(world):
        made.workers[0].rank = rank
        states.append(
            checkpoint.save(
                made.units, made.workers[0], lambda t, like=None: t.unsqueeze(0), clock, made.method.to_json()
            )
        )
    return states


SAVED = [{world: saved(made, world) for world in WORLDS} for made in SESSIONS]


def members(state: dict) -> dict[str, bytes]:
    """The files inside what ``torch.save`` writes."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    with zipfile.ZipFile(buffer) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


FILES = [[members(state) for state in states[2]] for states in SAVED]


def pick(data: atheris.FuzzedDataProvider, values: Iterable) -> object:
    return data.PickValueInList(list(values))


def tensor(data: atheris.FuzzedDataProvider) -> object:
    shape, dtype = pick(data, SHAPES), pick(data, DTYPES)
    made = torch.full(shape, pick(data, REALS), dtype=torch.float64).to(dtype)
    kind = data.ConsumeIntInRange(0, 9)
    if kind == 0:
        return torch.empty(shape, dtype=dtype, device="meta")
    if kind == 1 and shape:
        return torch.ones(shape).to_sparse()
    if kind == 2:
        return torch.nn.Parameter(torch.ones(shape))
    if kind == 3:
        return torch.ones(()).expand(2**40, *SHAPE)
    if kind == 4:
        return torch.ones(shape).as_subclass(type("Odd", (torch.Tensor,), {}))
    if kind == 5:
        return torch.nested.nested_tensor([torch.ones(shape)])
    if kind == 6 and len(shape) == 3:
        return torch.ones(shape[0], *shape[:0:-1]).to(dtype).transpose(1, 2)
    return made


def value(data: atheris.FuzzedDataProvider, plain: bool) -> object:
    kind = data.ConsumeIntInRange(0, 6 if plain else 8)
    if kind == 0:
        return None
    if kind == 1:
        return pick(data, NUMBERS[:12] if plain else NUMBERS)
    if kind == 2:
        return pick(data, REALS)
    if kind == 3:
        return pick(data, TEXTS)
    if kind == 4:
        return data.ConsumeUnicode(6)
    if kind == 5:
        return [value(data, plain) for _ in range(data.ConsumeIntInRange(0, 3))]
    if kind == 6:
        return {pick(data, TEXTS): value(data, plain) for _ in range(data.ConsumeIntInRange(0, 2))}
    return tensor(data)


def change(place: dict, data: atheris.FuzzedDataProvider, plain: bool = False) -> None:
    """One change, somewhere in a nested dict; in the JSON of a plan, one that JSON has (``plain``)."""
    while True:
        if not place or data.ConsumeIntInRange(0, 7) == 0:
            place[pick(data, TEXTS if plain else (*TEXTS, *NUMBERS, None))] = value(data, plain)
            return
        key = pick(data, place)
        if not isinstance(place[key], dict) or data.ConsumeIntInRange(0, 7) == 0:
            break
        place = place[key]
    what = data.ConsumeIntInRange(0, 5)
    ordinary = type(place[key]) is torch.Tensor and place[key].layout is torch.strided and place[key].numel() < 1000
    if what == 0:
        del place[key]
    elif what == 1 and ordinary:
        place[key] = place[key].double() * pick(data, REALS)
    elif what == 2 and ordinary:
        place[key] = place[key].to(pick(data, DTYPES))
    elif what >= 1 and isinstance(place[key], str) and place[key].startswith("{") and not plain:
        with contextlib.suppress(ValueError, RecursionError):  # where an earlier change has damaged it
            plan = json.loads(place[key])
            change(plan, data, plain=True)
            place[key] = json.dumps(plan)
    elif what == 3 and not plain:
        place[key] = place[pick(data, place)]
    else:
        place[key] = value(data, plain)


def copied(given: object) -> object:
    return {key: copied(inner) for key, inner in given.items()} if isinstance(given, dict) else given


def loaded(files: dict[str, bytes], data: atheris.FuzzedDataProvider) -> object:
    """What ``torch.load`` makes of a file in which some bytes are changed, if it reads it."""
    name = pick(data, [name for name in files if "/.data/" not in name])
    content = bytearray(files[name])
    for _ in range(data.ConsumeIntInRange(1, 4)):
        at = data.ConsumeIntInRange(0, len(content))
        content[at : at + data.ConsumeIntInRange(0, 3)] = data.ConsumeBytes(data.ConsumeIntInRange(0, 4))
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for other, old in files.items():
            archive.writestr(other, bytes(content) if other == name else old)
    buffer.seek(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.load(buffer, weights_only=True)


def target(raw: bytes) -> None:
    data = atheris.FuzzedDataProvider(raw)
    which = data.ConsumeIntInRange(0, len(SESSIONS) - 1)
    saver = data.ConsumeIntInRange(0, len(SESSIONS) - 1)
    from_bytes = data.ConsumeIntInRange(0, 15) == 0
    saved_world = 2 if from_bytes else pick(data, WORLDS)
    world = saved_world if data.ConsumeBool() else pick(data, WORLDS)
    rank = data.ConsumeIntInRange(0, world - 1)
    states = [copied(state) for state in SAVED[saver][saved_world]]
    if from_bytes:
        at = data.ConsumeIntInRange(0, 1)
        try:
            states[at] = loaded(FILES[saver][at], data)
        except Exception:  # torch's own
            return
    for _ in range(data.ConsumeIntInRange(0, 4)):
        state = pick(data, states)
        inner = state.get(pick(data, ("local", "plan", "shared", "top"))) if isinstance(state, dict) else None
        if isinstance(state, dict):
            change(inner if isinstance(inner, dict) else state, data)
    shape = data.ConsumeIntInRange(0, 15)
    given: object = states
    if shape == 0:
        given = states[min(rank, len(states) - 1)]
    elif shape == 1:
        given = states[:-1]
    elif shape == 2:
        given = [*states, pick(data, states)]
    elif shape == 3:
        given = value(data, plain=False) if data.ConsumeBool() else [*states[1:], value(data, plain=False)]
    how = pick(data, ("ignore", "error", "reset", "fold", "fold", "reset", "fold", "fold"))
    try:
        restored = checkpoint.restore(given, SESSIONS[which].units, rank, world, how)
    except ThinwireError as error:
        str(error).encode(errors="backslashreplace")
        return
    check(restored, SESSIONS[which])


def check(restored: checkpoint.Restored, made: Session) -> None:
    assert 0 <= restored.installed_at <= restored.step
    assert all(isinstance(note, str) for note in restored.notes)
    restored.fingerprint()
    for unit in made.units:
        fresh = unit.fresh_local().now, unit.fresh_shared().now
        local, shared = restored.local[unit.name], restored.shared[unit.name]
        assert local.keys() - {"pending_residual"} == fresh[0].keys(), local.keys()
        assert shared.keys() == fresh[1].keys(), shared.keys()
        for key, got in [*local.items(), *shared.items()]:
            assert type(got) is torch.Tensor
            assert got.shape == unit.param.shape
            assert got.stride() == unit.param.stride()
            assert got.dtype == (fresh[0] | fresh[1]).get(key, got).dtype
            assert not got.requires_grad
            assert bool(got.isfinite().all()), f"{unit.name}: {key} is not finite"
    assert restored.local.keys() == restored.shared.keys() == {unit.name for unit in made.units}


def seeds(folder: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    for i in range(20):
        (folder / f"{i}").write_bytes(bytes(torch.randint(0, 256, (120,), generator=generator).tolist()))


if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as corpus:
        seeds(Path(corpus))
        atheris.Setup([*sys.argv, corpus], target)
        atheris.Fuzz()
