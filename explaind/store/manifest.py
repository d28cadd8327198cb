"""What a run says of itself: one frozen value, stored as JSON attributes."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import prod
from typing import Any

from explaind.errors import StoreError

BLOCK, RANDOM = 1 << 20, 1 << 20
"""Most steps of a block, and most bytes of the state of generators."""


ROUNDINGS = 32.0
"""In a precision lower than float32, that an update may be off by: of a product that is one rounding off, over a few layers."""
FLOATS = ("float16", "float32", "float64")
"""What numbers may be stored in."""


def is_count(number: object, most: int = 2**48) -> bool:
    """Whether it is a number of things."""
    return type(number) is int and 0 <= number <= most


@dataclass(frozen=True)
class Layer:
    """One recorded parameter tensor: where it stands in the flat parameter vector."""

    name: str
    shape: tuple[int, ...]
    offset: int
    size: int
    optimizer: int = 0
    """Index of the optimizer that trains it; −1 for a buffer that moves, which none does."""


@dataclass(frozen=True)
class Optimized:
    """One optimizer of a run."""

    rule: str
    kind: str
    """Its class."""
    flags: tuple[Mapping[str, Any], ...]
    """Options that choose an implementation (foreach, fused, …), per parameter group."""
    options: tuple[str, ...]
    """Names of the hyper-parameters that its rule needs."""
    scalars: tuple[str, ...]
    """Names of the numbers that its rule needs of every update of a parameter tensor."""
    rounding: float = 0.0
    """How far, relative to an update, its arithmetic may be from its rule's, where that is coarser than float32."""


@dataclass(frozen=True)
class Manifest:
    """The facts of a run that do not change while it goes on."""

    optimizers: tuple[Optimized, ...]
    layers: tuple[Layer, ...]
    dtype: str
    """numpy dtype of theta; every layer's own dtype embeds in it without loss."""
    block: int
    """Steps between two anchors of the momentum."""
    reduction: str
    model: str
    modules: tuple[str, ...]
    """Names of the modules whose train or eval mode is recorded."""
    examples: int | None
    """Number of examples in the data, where the recorder was given it."""
    seed: int
    random_bytes: int
    """Length of the state of the generators that a forward pass may draw from."""
    threads: int
    device: str
    versions: Mapping[str, str]
    config: Mapping[str, Any] | None
    """The resolved configuration, for runs of the command line."""
    gradient_filter: Mapping[str, Any] | None = None
    """What stood between the backward pass and the optimizers (``GradientFilter.to_json``)."""
    filter_seen: tuple[int, ...] = ()
    """How many gradients of each layer it had seen when the recording began; empty: none."""
    thin: Mapping[str, Any] | None = None
    """Where parameters are stored once a block alone: the dtypes in which its steps are to be lived again (``Living.facts``)."""

    gradients: str | None = None
    """numpy dtype of the stored gradients of single examples; None: there are none."""
    together: int = 1
    """Blocks that are written at once, and stand in one chunk."""

    @property
    def span(self) -> int:
        """Steps between two commits."""
        return self.block * self.together

    @property
    def optimizer(self) -> str:
        """The classes of its optimizers, in words."""
        return " and ".join(o.kind for o in self.optimizers)

    @property
    def rounding(self) -> list[float]:
        """Of the optimizer of each layer."""
        return [0.0 if layer.optimizer < 0 else self.optimizers[layer.optimizer].rounding for layer in self.layers]

    @property
    def params(self) -> int:
        """How many numbers theta holds."""
        return sum(layer.size for layer in self.layers)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(value: Mapping[str, Any], where: str) -> "Manifest":
        """Rebuild from attributes; StoreError when a field is missing or makes no sense."""
        try:
            known = {**value, "modules": tuple(value["modules"]), "filter_seen": tuple(value.get("filter_seen", ()))}
            known["optimizers"] = tuple(Optimized(**{**o, **_tuples(o, "flags", "options", "scalars")}) for o in value["optimizers"])
            known["layers"] = tuple(Layer(**{**layer, "shape": tuple(layer["shape"])}) for layer in value["layers"])
            made = Manifest(**known)
            if not made._sane():
                raise ValueError("numbers that are those of no run")
            return made
        except (KeyError, TypeError, AttributeError, ValueError, OverflowError, RecursionError) as error:
            raise StoreError(
                "the run's attributes are damaged", where=where, got=repr(error)[:200], do="restore zarr.json from a copy"
            ) from error

    def _sane(self) -> bool:
        """Whether its numbers can be those of a run: layers that lie end to end, a dtype, a block and a state of generators."""
        at = 0
        for layer in self.layers:
            if not isinstance(layer.name, str) or not all(is_count(n) for n in (*layer.shape, layer.size, layer.offset)):
                return False
            if layer.offset != at or layer.size != prod(layer.shape) or layer.optimizer not in range(-1, len(self.optimizers)):
                return False
            at += layer.size
        counts = is_count(self.block, BLOCK) and is_count(self.together, BLOCK) and is_count(self.random_bytes, RANDOM)
        known = self.dtype in FLOATS and self.gradients in (None, *FLOATS) and bool(self.optimizers) and bool(self.layers)
        return counts and known and self.span > 0 and (self.examples is None or is_count(self.examples))


def _tuples(value: Mapping[str, Any], *names: str) -> dict[str, tuple[Any, ...]]:
    return {name: tuple(value[name]) for name in names}
