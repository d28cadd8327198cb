"""What must be around a call of the user's model while it is replayed or differentiated."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode


@contextmanager
def drawing(states: Iterable[Tensor], device: torch.device) -> Iterator[None]:
    """Random generators in recorded states, the host's first, and back in their own afterwards."""
    host, *own = states
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.set_rng_state(host)
        if own and device.type == "cuda":
            torch.cuda.set_rng_state(own[0], device)
        yield


class DifferentiableStatistics(TorchFunctionMode):
    """Normalisation by running statistics, written out: torch's own is not differentiable by them."""

    def __torch_function__(self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if function is F.batch_norm and not _argument(args, kwargs, 5, "training", False):
            return _normalised(*args[:5], **{k: v for k, v in kwargs.items() if k not in ("training", "momentum")})
        if function is F.instance_norm and not _argument(args, kwargs, 5, "use_input_stats", True):
            return _normalised(*args[:5], **{k: v for k, v in kwargs.items() if k not in ("use_input_stats", "momentum")})
        return function(*args, **kwargs)


def _argument(args: tuple[Any, ...], kwargs: Mapping[str, Any], place: int, name: str, default: Any) -> Any:
    return args[place] if len(args) > place else kwargs.get(name, default)


def _normalised(
    input: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """(x − mean) / √(var + eps) · weight + bias, channel by channel: [batch, channel, …]."""

    def by_channel(values: Tensor) -> Tensor:
        return values.reshape(1, -1, *(1 for _ in input.shape[2:]))

    out = (input - by_channel(running_mean)) * by_channel((running_var + eps).rsqrt())
    out = out if weight is None else out * by_channel(weight)
    return out if bias is None else out + by_channel(bias)


class _DifferentiableAttention(AbstractContextManager[None]):
    """Attention in its math form: the fused kernels have no forward-mode derivative."""

    def __enter__(self) -> None:
        self._fast = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        self._math = sdpa_kernel(SDPBackend.MATH)
        self._math.__enter__()

    def __exit__(self, *error: Any) -> None:
        self._math.__exit__(*error)
        torch.backends.mha.set_fastpath_enabled(self._fast)


def differentiable_attention() -> AbstractContextManager[None]:
    """Within it every attention of torch has reverse- and forward-mode derivatives; settings are put back afterwards."""
    return _DifferentiableAttention()
