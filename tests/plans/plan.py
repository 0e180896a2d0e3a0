"""The value that says what one random run does: it goes to JSON and back."""

import json
from dataclasses import asdict, dataclass
from typing import Any

Spec = dict[str, Any]


@dataclass(frozen=True)
class Layer:
    """One module of the model; ``tests.plans.model`` builds it."""

    kind: str
    dtype: str
    sizes: tuple[int, ...]
    used: str = "always"
    """Where and when it takes part in the loss: see ``tests.plans.model.takes_part``."""
    frozen: bool = False
    channels_last: bool = False
    sparse: bool = False


@dataclass(frozen=True)
class Plan:
    """A run of ``steps`` optimizer steps on ``world`` ranks."""

    seed: int
    engine: str  # ddp, bare or fsdp2
    world: int
    layers: tuple[Layer, ...]
    method: Spec
    optimizer: Spec
    steps: int
    shards: int = 1
    """FSDP2: over how many ranks a parameter is sharded; the rest are replicas."""
    nodes: int | None = None
    accumulate: int = 1
    kernels: str = "reference"
    link: str | None = None
    wrap: Spec | None = None
    """Options of DDP."""
    options: Spec | None = None
    """Further options of attach: sparse_gradients, reduce_scatter, all_gather."""
    nonfinite: tuple[int, int] | None = None
    """At which step a gradient is not finite, and on which rank."""
    left_out: int | None = None
    """At which step no rank calls the optimizer."""
    zeros: bool = False
    """Whether gradients are set to zero instead of None."""
    looks: bool = False
    """Whether the model is also called without gradients before each step."""
    scale: float = 1.0
    """Of the loss."""
    scaler: bool = False
    ambient: str = ""
    switch: int | None = None
    """Before which step the method changes to ``then``."""
    then: Spec | None = None
    change: str = "set_method"  # or detach, and attach again
    checkpoint: int | None = None
    """After how many steps a checkpoint is taken, from which a second run goes on."""
    saved: str = "files"  # files: torch.save a rank; folder: torch.distributed.checkpoint
    order: str = "after"  # model and optimizer are loaded after attach or before, or all into the running session
    fold: int | None = None
    """Another world size that the checkpoint is loaded at too."""

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> "Plan":
        data = json.loads(text)
        layers = tuple(Layer(**{**layer, "sizes": tuple(layer["sizes"])}) for layer in data.pop("layers"))
        nonfinite = data.pop("nonfinite")
        return Plan(**data, layers=layers, nonfinite=tuple(nonfinite) if nonfinite else None)

    @property
    def workers(self) -> int:
        """How many exchange with each other."""
        return self.world // self.shards // (self.nodes or 1)

    def worker_of(self, rank: int) -> int:
        return rank // (self.shards * (self.nodes or 1))
