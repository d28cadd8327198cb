"""What can be asked of a classifier: differentiable functions of the model and a batch of queries."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from explaind.tasks.task import Batch, Measure

Logits = Callable[[nn.Module, Batch], Tensor]
"""(model, batch) -> Float[query, output]."""

Target = Callable[[Batch], Tensor]
"""batch -> Int[query], the index of the true class."""


def classification(logits: Logits, target: Target) -> dict[str, Measure]:
    """The usual questions about a classifier with these logits and targets, by name; the first is the default.

    All are in nats or logits, and go through ``torch.func`` (vmap, grad, jvp) also in a batch of one.
    ``mean_loss`` divides by the number of queries of the batch it is given, so ask it of the whole set at once.
    """

    def log_probabilities(model: nn.Module, batch: Batch) -> Tensor:
        """Float[query, output]."""
        return F.log_softmax(logits(model, batch), dim=-1)

    def target_log_probability(model: nn.Module, batch: Batch) -> Tensor:
        """Float[query]."""
        return _at(log_probabilities(model, batch), target(batch))

    def margin(model: nn.Module, batch: Batch) -> Tensor:
        """Float[query]: the target's logit minus the largest other logit; positive where the model is right."""
        return _margin(logits(model, batch), target(batch))

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        """Float[query]: the cross-entropy."""
        return -target_log_probability(model, batch)

    def mean_loss(model: nn.Module, batch: Batch) -> Tensor:
        """Float[query]: the share of each query in the mean loss of the batch, which is the sum of the shares."""
        shares = loss(model, batch)
        return shares / shares.shape[0]

    return {
        "target_log_probability": target_log_probability,
        "logits": logits,
        "log_probabilities": log_probabilities,
        "margin": margin,
        "loss": loss,
        "mean_loss": mean_loss,
    }


def _at(values: Tensor, index: Tensor) -> Tensor:
    """Float[query, output] at Int[query] -> Float[query]."""
    return values.gather(-1, index.unsqueeze(-1)).squeeze(-1)


def _margin(logits: Tensor, target: Tensor) -> Tensor:
    """Float[query, output], Int[query] -> Float[query].

    The −inf stands in the constant branch of ``where``, so no gradient passes it.
    """
    is_target = torch.arange(logits.shape[-1], device=logits.device) == target.unsqueeze(-1)
    others = torch.where(is_target, float("-inf"), logits)
    return _at(logits, target) - others.amax(-1)
