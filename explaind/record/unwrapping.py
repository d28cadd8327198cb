"""What libraries put around an optimizer or a model, taken off."""

import torch
from torch import nn

from explaind.errors import RecordError
from explaind.rules import RULES

AROUND_MODELS = ("DistributedDataParallel", "DataParallel")
SHARDED = ("FullyShardedDataParallel", "DeepSpeedEngine")


def unwrapped_optimizer(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The optimizer that steps, inside one that only decides when (accelerate's): it alone is told of real steps."""
    inner = getattr(optimizer, "optimizer", None)
    if isinstance(inner, torch.optim.Optimizer) and type(optimizer).__name__ not in RULES:
        return unwrapped_optimizer(inner)
    return optimizer


def unwrapped_model(model: nn.Module) -> nn.Module:
    """The model as it was before it was compiled or made parallel: its parameters have their own names then."""
    inner = getattr(model, "_orig_mod", None) if hasattr(model, "_orig_mod") else getattr(model, "module", None)
    if isinstance(inner, nn.Module) and (hasattr(model, "_orig_mod") or type(model).__name__ in AROUND_MODELS):
        return unwrapped_model(inner)
    if type(model).__name__ in SHARDED:
        raise RecordError("a model whose parameters are sharded cannot be recorded", got=type(model).__name__, do="train it with DDP")
    return model
