"""Settings of Sphinx: ``make docs`` builds the site into ``docs/_build``, and a warning is an error."""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "src"))

project = "thinwire"
author = copyright = "thinwire contributors"
version = release = re.findall(r'"(.+)"', (ROOT / "src" / "thinwire" / "_version.py").read_text())[0]

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"thinwire {release}"
myst_heading_anchors = 3

autodoc_member_order = "bysource"
python_maximum_signature_line_length = 88
napoleon_numpy_docstring = False
napoleon_custom_sections = ["Departures", "Source", "Wire"]

nitpicky = True
nitpick_ignore_regex = [("py:.*", r"(?!thinwire\.).*")]  # other projects' types, and type variables
nitpick_ignore = [  # internal types that signatures of documented classes name
    ("py:class", f"thinwire.{name}")
    for name in (
        "coding.reader.Allowance",
        "comm.collectives.Carrier",
        "comm.collectives.Collective",
        "core.memory_capabilities.Absorbed",
        "core.memory_capabilities.MemoryTraits",
        "core.loops.Accumulation",
        "core.loops.Kernels",
        "core.loops.Selection",
        "core.registry.Kind",
        "exchange.workers.Worker",
        "session.optimizers.Several",
        "session.rounds.RoundState",
    )
]
