"""What a run says of itself: one frozen value, stored as JSON attributes."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from explaind.errors import StoreError


@dataclass(frozen=True)
class Layer:
    """One recorded parameter tensor: where it stands in the flat parameter vector."""

    name: str
    shape: tuple[int, ...]
    offset: int
    size: int
    group: int
    """Index of its parameter group in the optimizer."""


@dataclass(frozen=True)
class Manifest:
    """The facts of a run that do not change while it goes on."""

    rule: str
    optimizer: str
    flags: Mapping[str, Any]
    """Options of the optimizer that choose an implementation (foreach, fused, …), per group."""
    options: tuple[str, ...]
    layers: tuple[Layer, ...]
    dtype: str
    """numpy dtype of theta; every layer's own dtype embeds in it without loss."""
    block: int
    """Steps between two commits, and between two anchors of the momentum."""
    reduction: str
    model: str
    modules: tuple[str, ...]
    """Names of the modules whose train or eval mode is recorded."""
    examples: int | None
    """Number of examples in the data, where the recorder was given it."""
    seed: int
    threads: int
    device: str
    versions: Mapping[str, str]
    config: Mapping[str, Any] | None
    """The resolved configuration, for runs of the command line."""

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
            known = {**value, "options": tuple(value["options"]), "modules": tuple(value["modules"])}
            known["layers"] = tuple(Layer(**{**layer, "shape": tuple(layer["shape"])}) for layer in value["layers"])
            return Manifest(**known)
        except (KeyError, TypeError, AttributeError) as error:
            raise StoreError(
                "the run's attributes are damaged", where=where, got=repr(error), do="restore zarr.json from a copy"
            ) from error
