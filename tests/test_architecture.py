"""The house: a room stands above everything it imports; what is public is frozen; files stay small."""

import ast
from pathlib import Path

import thinwire

SOURCE = Path(thinwire.__file__).parent
FLOORS = [
    ["tensors", "ambient", "_version", "backward"],
    ["loops", "checks", "absorbed", "files", "skips"],
    ["context"],
    ["core", "sharding"],
    ["supported"],
    ["link", "memories", "theory", "wire", "report", "folder"],
    ["kernels"],
    ["compressors"],
    ["policy", "untrusted"],
    ["units", "methods", "adding", "checksums"],
    ["exchange", "clipping", "given"],
    ["selecting", "receiving", "clock", "fingerprint", "optimizers", "foreign"],
    ["optim", "pipeline", "checkpoint", "replicas", "stages", "following", "arguments"],
    ["copies", "succession", "transaction", "detached"],
    ["stepping"],
    ["session"],
    ["layouts"],
    ["engines", "sim", "lgreco"],
    ["integrations"],
    ["__init__"],
    ["demo"],
    ["cli"],
    ["__main__"],
]
FLOOR = {room: height for height, rooms in enumerate(FLOORS) for room in rooms}


def rooms_imported(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            parts = name.split(".")
            if parts[0] == "thinwire":
                found.add(parts[1] if len(parts) > 1 and parts[1] in FLOOR else "__init__")
    return found


def test_nothing_imports_upward():
    for path in SOURCE.rglob("*.py"):
        room = path.relative_to(SOURCE).parts[0].removesuffix(".py")
        assert room in FLOOR, f"{path} stands on no floor"
        for other in rooms_imported(path):
            assert FLOOR[other] < FLOOR[room] or other == room, (
                f"{path.relative_to(SOURCE)} imports {other}, which does not stand below it"
            )


def test_files_are_small():
    for path in SOURCE.rglob("*.py"):
        assert len(path.read_text().splitlines()) <= 400, path


def test_pipeline_reads_as_the_journey():
    assert len((SOURCE / "pipeline.py").read_text().splitlines()) <= 150


def test_core_needs_no_extra():
    extras = {"click", "rich", "matplotlib", "numba", "llvmlite", "triton", "zstandard"}
    extras |= {"accelerate", "lightning", "ray", "torchft", "transformers"}
    kernels = {"kernels/cpu.py", "kernels/blocks.py", "kernels/bits.py", "kernels/cuda.py"}
    allowed = kernels | {"cli.py", "__main__.py", "report/html.py", "wire/zstd.py"}
    allowed |= {f"integrations/{name}.py" for name in ("accelerate", "lightning", "torchft", "trainer")}
    for path in SOURCE.rglob("*.py"):
        if path.relative_to(SOURCE).as_posix() in allowed:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            assert not extras & {name.split(".")[0] for name in names}, path


def test_public_names():
    assert sorted(thinwire.__all__) == [
        "BlockTopK", "CLTK", "Cast", "CompressedMomentum", "Compressor", "DctTopK", "DecoupledMomentum", "EControl",
        "EF21", "ErrorFeedback", "LGreCo", "Link", "MajorityVote", "Memory", "Method", "Momentum", "MomentumCorrection",
        "Natural", "NoMemory", "OneBitAdam", "OneBitLamb", "PowerSGD", "QSGD", "Quantize", "RandK", "Rule", "SIDCo",
        "Scaled", "Session", "Sign", "Simulation", "SteadyFeedback", "TernGrad", "ThinwireError", "Threshold", "TopK",
        "Warmup", "ZeroOneAdam", "__version__", "attach", "cast", "decoupled_momentum", "dense", "dgc", "econtrol",
        "ef14", "ef21", "ef21_bc", "ef21_pp", "ef21_sgdm", "ef21_w", "ef_sign", "lean", "maxmin", "natural",
        "onebit_adam", "onebit_lamb", "powersgd", "qsgd", "randk", "scalecom", "sidco", "signsgd", "simulate",
        "terngrad", "topk", "zeroone_adam",
    ]  # fmt: skip
