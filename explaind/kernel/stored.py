"""Products with example gradients that the training stored: the same products as ever, only that no gradient is computed."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from explaind.errors import RequestError
from explaind.kernel.products import Mode, Products, Route
from explaind.kernel.whole import some_at_a_time
from explaind.replay.steps import Logged, Part


class NoLosses:
    """Stands for the losses of a training, where their gradients are stored."""

    def __call__(self, parameters: Mapping[str, Tensor], batch: Any) -> Tensor:
        """RequestError: nobody gave them."""
        raise RequestError("the losses of the training were not given", expected="losses= and data=", do="give them")

    def set_mode(self, mode: Mode, precision: float = 0.0) -> None:
        """There is no model that could be in one."""


class StoredProducts(Products):
    """``Products`` of parts that are ``Logged``."""

    def prepare(self, theta: Tensor, part: Part, mode: Mode = ()) -> None:
        """Nothing is to be found out."""

    def covered(self, theta: Tensor, part: Part, rows: int, mode: Mode = ()) -> dict[str, str]:
        """Every layer is "stored"."""
        return dict.fromkeys(self.layout.names, "stored")

    def _chosen(self, theta: Tensor, part: Part, a: Tensor) -> Route:
        return ()

    def _crowded(self, part: Part, a: Tensor, groups: np.ndarray, members: np.ndarray) -> np.ndarray:
        return groups if 2 * len(groups) <= len(part.ids) else groups[:0]

    def _sum_groups(self, theta: Tensor, part: Part, belongs: np.ndarray, into: Float[Tensor, "group param"]) -> None:
        weights = torch.from_numpy(belongs).to(into) * part.weights  # [group, example]
        for span, stored in self._pieces(part, theta, self.chunk):
            into.addmm_(weights[:, span], stored)

    def _materialise(self, theta: Tensor, part: Part, a: Tensor, total: Tensor | None) -> Iterator[tuple[slice, Tensor]]:
        for span, stored in self._pieces(part, theta, self.chunk // (len(a) if self.finest == "param" else 1)):
            if total is not None:
                total.addmv_(stored.T, part.weights[span])
            yield span, self._contract(stored, a)

    def _pieces(self, part: Part, theta: Tensor, most: int) -> Iterator[tuple[slice, Float[Tensor, "example param"]]]:
        """Stored gradients of at most so many bytes at a time."""
        assert isinstance(part.batch, Logged)
        for span in some_at_a_time(part.batch.examples, theta, most):
            yield span, part.batch.read(span)
