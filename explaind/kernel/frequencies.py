"""Tables whose backward pass counts: torch.nn.Embedding(…, scale_grad_by_freq=True), and EmbeddingBag.

The gradient of a row is divided by how often the batch has it. A training does so, and its examples then depend on each other although
their losses do not. The derivative of a measure is that of its values, which know nothing of it.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from explaind.kernel.points import Function

COUNTING = "scale_grad_by_freq"


class _Uncounted(TorchFunctionMode):
    """The same tables with the gradient of their values."""

    used = False
    """Whether one had another."""

    def __torch_function__(self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if function in (F.embedding, F.embedding_bag) and kwargs.get(COUNTING):  # torch gives it by name
            self.used = True
            kwargs = {**kwargs, COUNTING: False}
        return function(*args, **kwargs)


def uncounted(function: Function, parameters: Mapping[str, Tensor], batch: Any) -> tuple[Tensor, Function]:
    """(function(parameters, batch), the function with the gradient of its values: itself where it has that)."""

    def of_values(parameters: Mapping[str, Tensor], batch: Any) -> Tensor:
        with _Uncounted():
            return function(parameters, batch)

    with _Uncounted() as tables:
        values = function(parameters, batch)
    return values, of_values if tables.used else function
