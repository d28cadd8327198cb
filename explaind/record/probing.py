"""Are the rows that modules are called with the examples of the batch? Asked once, where no losses are given to compare with.

Half of the rows of the model's input go through a copy of it: every module must then be called with half of the rows. A table of positions,
which is looked up by ``torch.arange`` whatever the batch is, is not, even where there happen to be as many positions as examples.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from explaind.errors import RecordError
from explaind.record.hooks import Hook
from explaind.record.incoming import MicroBatch, random_state
from explaind.record.recomputing import copied, drawn_from
from explaind.record.tapping import kind_of


class Probe:
    """Waits for a forward pass of a model with at least two examples."""

    def __init__(self, model: nn.Module, device: torch.device, current: Callable[[], MicroBatch | None]) -> None:
        self._device, self._current = device, current
        self.fault: str | None = "the model itself was not called, or with no tensor that has a row for every example"
        """Why rows cannot be taken for examples; None once it is known that they can."""
        try:
            self._copy: nn.Module | None = copied(model)  # before it keeps anything of a forward pass
        except RecordError as error:
            self._copy, self.fault = None, str(error)
        self._hook = model.register_forward_hook(Hook(self._called), with_kwargs=True)

    def close(self) -> None:
        """Let go of the model."""
        self._hook.remove()

    def _called(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        batch = self._current()
        if batch is None or not torch.is_grad_enabled() or len(batch.ids) < 2:
            return
        self._hook.remove()
        rows, half, cut = len(batch.ids), len(batch.ids) // 2, list[int]()

        def halved(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor) or leaf.shape[:1] != (rows,):
                return leaf
            cut.append(half)
            return leaf[:half]

        some = tree_map(halved, (args, kwargs))
        if cut and self._copy is not None:
            self.fault = _asked(self._copy, some, half, self._device)
        self._copy = None


def _asked(own: nn.Module, some: tuple[tuple[Any, ...], dict[str, Any]], rows: int, device: torch.device) -> str | None:
    """What is wrong with the rows of a module, if anything is."""
    wrong = list[str]()

    def noted(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Any) -> None:
            x = args[0] if args else kwargs["input"]
            if x.shape[0] != rows:
                wrong.append(f"{name} is called with {x.shape[0]} rows where there are {rows} examples: no row is an example's")

        return hook

    for name, module in own.named_modules():
        if kind_of(module) is not None and any(p is not None and p.requires_grad for p in module._parameters.values()):
            module.register_forward_hook(noted(name), with_kwargs=True)
    args, kwargs = some
    try:
        with torch.no_grad(), drawn_from(random_state(device), device):
            own(*args, **kwargs)
    except Exception as error:  # whatever the user's model raises over half a batch
        return f"the model does not take half of a batch ({type(error).__name__})"
    return wrong[0] if wrong else None
