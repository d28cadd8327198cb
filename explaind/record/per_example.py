"""The losses of a batch, one an example: the most common mistake is to leave the reduction in, and it must be told from all others."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from explaind.errors import ReplayError


def checked(values: object, examples: int | None = None) -> Tensor:
    """What losses returned, if it is one number an example: Tensor[batch]. ReplayError where it is anything else.

    examples: of the batch, where that is known
    """
    if isinstance(values, Tensor) and values.is_floating_point() and values.ndim == 1 and examples in (None, len(values)):
        return values
    if isinstance(values, Tensor):
        got = "a single number" if values.ndim == 0 else f"{values.dtype} of shape {tuple(values.shape)}"
    else:
        got = f"a {type(values).__name__}"
    raise ReplayError(
        "losses must return one number an example",
        expected="a floating-point Tensor[batch]" if examples is None else f"a floating-point Tensor[batch] of shape ({examples},)",
        got=got,
        do="leave the reduction out, for instance cross_entropy(…, reduction='none')",
    )


def per_example(losses: Callable[[Any, Any], Tensor]) -> Callable[[Any, Any], Tensor]:
    """The same losses, checked each time."""

    def values(model: Any, batch: Any) -> Tensor:
        return checked(losses(model, batch))

    return values
