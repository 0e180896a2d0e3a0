"""ulink.c: a wire in user space that adds latency, for kernels without netem; it costs a quarter of a core a link."""

import atexit
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

from benchmarks.lab.features import LabError

COMPILERS = ("cc", "gcc", "clang")
SOURCE = Path(__file__).with_name("ulink.c")


@cache
def program() -> Path:
    """Compile the program; returns its path, valid until this process ends.

    Raises:
        LabError: there is no C compiler, or it refuses.
    """
    compiler = next(filter(None, map(shutil.which, COMPILERS)), None)
    if compiler is None:
        raise LabError(
            "a latency needs a kernel with netem (CONFIG_NET_SCH_NETEM), or a C compiler for ulink.c; this machine has "
            "neither: leave the latency out, or install gcc"
        )
    folder = Path(tempfile.mkdtemp(prefix="thinwire-lab-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    command = [compiler, "-O2", "-o", str(folder / "ulink"), str(SOURCE)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise LabError(f"{' '.join(command)} failed: {done.stderr.strip()[:500]}")
    return folder / "ulink"
