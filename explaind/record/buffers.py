"""Where a model holds its parameters and buffers, and which of them are not ready, or move by themselves."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

COUNTER = "num_batches_tracked"


def statistics(module: nn.Module) -> tuple[str, ...]:
    """Names of the module's own buffers that it moves in train mode, among them a counter that nothing else reads."""
    tracks = isinstance(module, nn.modules.batchnorm._NormBase) and module.track_running_stats
    return ("running_mean", "running_var", COUNTER) if tracks else ()


def places_of(model: nn.Module) -> dict[str, tuple[dict[str, Any], str]]:
    """Where the model holds each parameter and buffer: by name, the dictionary and the key in it."""
    found = dict[str, tuple[dict[str, Any], str]]()
    for prefix, module in model.named_modules():
        for held in (module._parameters, module._buffers):
            found |= {f"{prefix}.{key}".removeprefix("."): (held, key) for key in held}
    return found


def same(now: Tensor | None, copy: Tensor) -> bool:
    """Whether what stands in a place is still what was copied from there."""
    return now is not None and now.dtype == copy.dtype and torch.equal(now, copy)


def lazy(model: nn.Module) -> str:
    """A parameter or buffer that a lazy module will make of its first batch; "" where there is none."""
    return next((name for name, t in (*model.named_parameters(), *model.named_buffers()) if is_lazy(t)), "")
