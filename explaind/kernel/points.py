"""Functions of the parameters and a batch, and where they are differentiated."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

Function = Callable[[Mapping[str, Tensor], Any], Tensor]
"""(parameters, batch) -> Tensor[query] or Tensor[query, output] (a measure), or Tensor[batch] (losses)."""


@dataclass(frozen=True)
class Point:
    """What is differentiated: a function of (parameters, row or batch), at theta [param], with its weight in a sum."""

    function: Function
    theta: Tensor
    weight: float = 1.0
