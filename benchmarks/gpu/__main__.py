"""``python -m benchmarks.gpu``: see ``run.py``, for which torch must be there."""

import importlib.util
import shutil
import sys

if __name__ == "__main__":
    if importlib.util.find_spec("torch") is None:
        there = shutil.which("nvidia-smi") is not None
        where = (
            "this machine has a GPU: name another" if there else "and no nvidia-smi, so nothing was run; to name one:"
        )
        print(f"make gpu: no torch in {sys.executable}, {where} make gpu PYTHON=...")
        sys.exit(int(there))
    from benchmarks.gpu.run import main

    sys.exit(main())
