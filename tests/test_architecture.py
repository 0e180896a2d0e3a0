"""The layers of the package: imports go downwards only; public names are frozen; files stay small."""

import ast
from pathlib import Path

import thinwire

SOURCE = Path(thinwire.__file__).parent
LAYERS = [
    ["core", "_version"],
    ["coding", "report"],
    ["kernels"],
    ["compressors", "memories", "comm"],
    ["methods", "optim"],
    ["exchange"],
    ["session"],
    ["policies"],
    ["engines"],
    ["attach"],
    ["__init__"],
    ["integrations", "testing", "cli", "__main__"],
]
"""A package imports what stands in a layer above its own line here, and nothing of another package in its own."""
LAYER = {package: height for height, packages in enumerate(LAYERS) for package in packages}
LOOSE = {"attach", "__init__", "__main__", "_version"}


def packages_imported(path: Path) -> set[str]:
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
                found.add(parts[1] if len(parts) > 1 and parts[1] in LAYER else "__init__")
    return found


def test_imports_go_downwards():
    assert len(LAYERS) <= 12
    for path in SOURCE.rglob("*.py"):
        package = path.relative_to(SOURCE).parts[0].removesuffix(".py")
        assert package in LAYER, f"{path} belongs to no layer"
        for other in packages_imported(path):
            assert LAYER[other] < LAYER[package] or other == package or {package, other} == {"cli", "__main__"}, (
                f"{path.relative_to(SOURCE)} imports {other}, which is not in a layer below"
            )


def test_packages_are_few():
    packages = [path for path in SOURCE.rglob("*") if path.is_dir() and path.name != "__pycache__"]
    assert {path.stem for path in SOURCE.glob("*.py")} == LOOSE
    assert len(packages) + len(LOOSE) <= 24
    assert all((path / "__init__.py").exists() for path in packages)


def test_names_of_files_are_unique():
    names = [path.stem for path in SOURCE.rglob("*.py") if not path.stem.startswith("__")]
    assert not {name for name in names if names.count(name) > 1}


def test_files_are_small():
    for path in SOURCE.rglob("*.py"):
        assert len(path.read_text().splitlines()) <= 400, path


def test_pipeline_reads_as_the_journey():
    assert len((SOURCE / "exchange/pipeline.py").read_text().splitlines()) <= 170


def test_core_needs_no_extra():
    extras = {"click", "rich", "matplotlib", "numba", "llvmlite", "triton", "zstandard"}
    extras |= {"accelerate", "lightning", "ray", "torchft", "transformers"}
    kernels = {"kernels/cpu.py", "kernels/cpu_blocks.py", "kernels/cpu_bits.py", "kernels/cuda.py"}
    kernels |= {"kernels/cpu_normal.py", "kernels/cuda_normal.py"}
    allowed = kernels | {"cli/main.py", "__main__.py", "report/html.py", "coding/zstd.py"}
    allowed |= {f"integrations/{name}.py" for name in ("accelerate", "lightning", "torchft", "trainer")}
    for path in SOURCE.rglob("*.py"):
        if path.relative_to(SOURCE).as_posix() in allowed:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            assert not extras & {name.split(".")[0] for name in names}, path


def test_public_names():
    packages = {"compressors", "memories", "methods", "optim", "policies", "zeroth"}
    assert sorted(set(thinwire.__all__) - packages) == [
        "Compressor", "Fsdp2Options", "Memory", "Method", "Rule", "Session", "ThinwireError", "Warmup", "ZerothOrder",
        "__version__", "attach", "cast", "dense", "dgc", "diloco", "econtrol", "ef21", "lean", "maxmin", "onebit_adam",
        "powersgd", "qsgd", "register", "scalecom", "signsgd", "simulate", "sparse_loco", "topk", "updates",
        "zeroone_adam",
    ]  # fmt: skip
    assert packages < set(thinwire.__all__)
