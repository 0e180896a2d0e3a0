"""Writes docs/methods.md from the catalogue and the recipes: ``python -m benchmarks.methods_page > docs/methods.md``.

What a method sends and whose idea it is stand in its docstring (**Wire**, Source); what it remembers, and whether it
contracts or is unbiased, is read from the code.
"""

import inspect
import re

import torch

from thinwire import methods
from thinwire.compressors.sparse import TopK
from thinwire.core import Compressor, registry
from thinwire.core.interfaces import local_state, shared_state
from thinwire.exchange.units import payload_nbytes
from thinwire.methods.method import Method

ELEMENTS = (1024, 1024)
ARGUMENTS = {
    "compressor": 0.01,
    "downlink": TopK(0.05),
    "participation": 0.5,
    "density": 0.01,
    "rank": 4,
    "bits_per_parameter": 0.1,
    "exchange": methods.dense(),
    "every": 50,
}
"""For recipes that have no default."""

TEMPLATE = """# Methods

Made by `python -m benchmarks.methods_page > docs/methods.md`; change the docstrings, not this file.

## Which one should I use

What has been measured so far, on small models and short runs; `benchmarks/results/` has the tables.

- **Momentum SGD**: `lean(bits_per_parameter)`, which is DGC with 4-bit values and without masking. At the same bytes it
  ended below `dgc()` as published at all three budgets and on both schedules, by 0.08 to 0.18 in every one of three
  seeds (`frontier_cpu2_202611.md`).
- **Many workers**: `route="two_phase"`, at 4 to 8 times the density: what a worker sends does not grow with their
  number. With 8 workers and 4-bit values it ended below the all-gather with 30 to 37 % of its bytes
  (`convergence_cpu2_202611.md`).
- **AdamW and every other optimizer**: `maxmin(4)`: 7 times fewer bytes, and it ended where dense did. Where that is not
  enough, `powersgd(4)` or `topk(0.01, values="int4")`, at the price of accuracy in a short run: 0.2 of a loss of 2.64
  after 300 steps (`adamw_cpu2_202611.md`: a small transformer, 3 seeds); below that `lean(0.06, momentum=False)`, which
  is Top-k in 4 bits at the density that the budget buys (`frontier_cpu2_202611.md`). Or `onebit_adam()` with its own
  optimizer, which lost nothing at 5 times fewer bytes in all (`onebit_cpu2_202611.md`).
- **Few samples a step, and data that differs between workers**: `ef21_sgdm`. Among methods that send one element in 68
  its floor was the lowest, within 4 times that of SGD without compression (`convex_cpu2_202611.md`).
- **Parameters that differ much in size or shape**: `attach(policy=LGreCo())` with any of these. At the uniform plan's
  sum of errors it saved 24 % of all bytes in the mean of six cases, most with Top-k, 7 % with 4 bits or PowerSGD on an
  LSTM; with Top-k the loss ended 0.02 to 0.06 higher, about where uniform Top-k of as few bytes ends
  (`lgreco_cpu2_202611.md`: one seed).
- **A link faster than your backward pass**: `dense()`.

## Recipes

For a parameter of 1024 x 1024 in float32. *Bits* are those of one rank's message, per element of the parameter.
*State* is float32 words per parameter, on each rank, kept twice so that a step can be taken back.

| recipe | bits | what it sends | state | contracts, or unbiased | all-reduced | two phases | paper |
|---|---:|---|---:|---|---|---|---|
{recipes}

## Compressors

| compressor | what it does | what it sends | paper |
|---|---|---|---|
{compressors}

## Memories

| memory | what it does | state | paper |
|---|---|---|---|
{memories}
"""


def first_sentence(thing: object) -> str:
    text = " ".join((inspect.getdoc(thing) or "").split("\n\n")[0].split())
    return re.split(r"(?<=[.:])\s", text)[0].rstrip(":")


def section(thing: object, name: str) -> str:
    """The paragraph of a docstring that begins with this word; empty where there is none."""
    for paragraph in (inspect.getdoc(thing) or "").split("\n\n"):
        for found in re.finditer(rf"(?m)^(?:\*\*)?{name}(?:\*\*)?: ", paragraph):
            return " ".join(paragraph[found.end() :].split())
    return ""


def cell(text: str) -> str:
    return (text or "-").replace("``", "`").replace("|", "\\|")


def example(recipe: object) -> Method:
    """The recipe with its defaults."""
    parameters = inspect.signature(recipe).parameters.values()
    return recipe(
        **{p.name: ARGUMENTS[p.name] for p in parameters if p.default is p.empty and p.kind is not p.VAR_KEYWORD}
    )


def kind(compressor: Compressor, n: int) -> str:
    omega, alpha = compressor.traits.variance(n), compressor.traits.contraction(n)
    if omega == 0.0:
        return "exact"
    if omega is not None:
        return f"unbiased, ω = {omega:.3g}"
    return "unknown" if alpha is None else f"contracts, α = {alpha:.2g}" if alpha else "neither"


def recipe_row(name: str) -> str:
    recipe = getattr(methods, name)
    rule = example(recipe).rule("weight", ELEMENTS, 1024 * 1024)
    like = torch.zeros(ELEMENTS)
    n = like.numel()
    states = [local_state(rule.memory, like), shared_state(rule.memory, like)]
    words = sum(x.numel() for state in states for x in state.values()) / n
    bits = 8 * payload_nbytes(rule.compressor, like.to("meta")) / n
    yes = {True: "yes", False: "no"}
    cells = [f"`{name}`", f"{bits:.3g}", cell(section(recipe, "Wire")), f"{words:g}", kind(rule.compressor, n)]
    cells += [
        yes[rule.compressor.traits.summable],
        yes[rule.compressor.traits.splittable],
        cell(section(recipe, "Source")),
    ]
    return f"| {' | '.join(cells)} |"


def page() -> str:
    recipes = [name for name in sorted(methods.__all__) if inspect.isfunction(getattr(methods, name))]
    parts = [
        f"| `{row.__name__}` | {cell(first_sentence(row))} | {cell(section(row, 'Wire'))} "
        f"| {cell(section(row, 'Source'))} |"
        for row in registry.COMPRESSORS.values()
        if row.__module__.startswith("thinwire.")
    ]
    memories = [
        f"| `{row.__name__}` | {cell(first_sentence(row))} | {cell(section(row, 'State'))} "
        f"| {cell(section(row, 'Source'))} |"
        for row in registry.MEMORIES.values()
        if row.__module__.startswith("thinwire.")
    ]
    tables = {"recipes": map(recipe_row, recipes), "compressors": parts, "memories": memories}
    return TEMPLATE.format(**{name: "\n".join(rows) for name, rows in tables.items()})


if __name__ == "__main__":
    print(page(), end="")
