"""What a run needs by name, so that every later command works from the run folder alone."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

Batch = Any
"""What torch's ``default_collate`` makes of a list of ``data[i]``: a tensor, or a tuple or dict of tensors."""

Measure = Callable[[nn.Module, Batch], Tensor]
"""(model, batch of queries) -> Tensor[query] or Tensor[query, output]; called in eval mode."""


class Split(Protocol):
    """A map-style dataset: ``data[i]`` for i in 0 … len(data) − 1, the same every time it is read."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


@runtime_checkable
class Grouped(Protocol):
    """A task that names groups of its model's layers; a task need not."""

    def layer_groups(self) -> Mapping[str, Sequence[str]]:
        """Name of each group, from input to output, and its parameter tensors, by name or pattern such as "heads.*"."""
        ...


class Task(Protocol):
    """Model, data, losses and measures of one kind of training.

    A task is a frozen dataclass: its fields are the options that a config's ``[task]`` table may set.
    Two tasks with equal options give the same data.
    """

    def model(self) -> nn.Module:
        """A freshly initialised model; draws from torch's global generator, which the caller seeds."""
        ...

    def data(self, split: str) -> Split:
        """The examples of a split: "train" or "val" (KeyError-free: an unknown split raises ConfigError)."""
        ...

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        """The training loss of each example: Tensor[batch], the reduction left out."""
        ...

    def measures(self) -> Mapping[str, Measure]:
        """What can be asked of the model, by name; the first is the default."""
        ...

    def predict(self, model: nn.Module, batch: Batch) -> Tensor:
        """The predicted class of each example: Tensor[batch] of integers, for accuracies and figures."""
        ...

    def target(self, batch: Batch) -> Tensor:
        """The true class of each example: Tensor[batch] of integers."""
        ...

    def describe(self, split: str, index: int) -> str:
        """A few words for a figure, such as "3 + 5 = 8"."""
        ...

    def outputs(self) -> Sequence[str]:
        """Names of the entries of the output axis, one per class."""
        ...
