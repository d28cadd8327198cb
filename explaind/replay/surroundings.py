"""What must be around a call of the user's model while it is replayed or differentiated."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils import checkpoint


@contextmanager
def drawing(states: Iterable[Tensor], device: torch.device) -> Iterator[None]:
    """Random generators in recorded states, the host's first, and back in their own afterwards."""
    host, *own = states
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.set_rng_state(host)
        if own and device.type == "cuda":
            torch.cuda.set_rng_state(own[0], device)
        yield


@contextmanager
def as_in_training(threads: int) -> Iterator[None]:
    """What a training has around it by default, whatever is set up around the kernel: gradients, every attention, so many threads.

    Products of float32 round as this process has them round.
    """
    before, fast = torch.get_num_threads(), torch.backends.mha.get_fastpath_enabled()
    torch.set_num_threads(threads)
    torch.backends.mha.set_fastpath_enabled(True)
    try:
        with torch.enable_grad(), sdpa_kernel(ATTENTIONS), rounding_in_products(*(_Differentiable.outside or float32_products())):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        torch.set_num_threads(before)


ATTENTIONS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.MATH]


@contextmanager
def rounding_as(precision: torch.dtype, device: torch.device) -> Iterator[None]:
    """Autocast as in the training, and every attention, since another kernel rounds elsewhere: for plain backward passes alone."""
    with torch.autocast(device.type, precision, cache_enabled=False), sdpa_kernel(ATTENTIONS):
        yield


def autocast_dtype(precision: float) -> torch.dtype | None:
    """The dtype that autocast computed in, by its ε; None without."""
    return next((dtype for dtype in (torch.bfloat16, torch.float16) if torch.finfo(dtype).eps == precision), None)


def float32_products() -> tuple[str, bool]:
    """How products of float32 round: torch's name for that of matrices, and whether convolutions of cuDNN take TF32."""
    return torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32


@contextmanager
def rounding_in_products(matrices: str, convolutions: bool) -> Iterator[None]:
    """As ``float32_products`` tells it."""
    before = float32_products()
    torch.set_float32_matmul_precision(matrices)
    torch.backends.cudnn.allow_tf32 = convolutions
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


class DifferentiableStatistics(TorchFunctionMode):
    """Normalisation by running statistics, written out: torch's own is not differentiable by them."""

    def __torch_function__(self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if function is F.batch_norm and not _argument(args, kwargs, 5, "training", False):
            return _normalised(*args[:5], **{k: v for k, v in kwargs.items() if k not in ("training", "momentum")})
        if function is F.instance_norm and not _argument(args, kwargs, 5, "use_input_stats", True):
            return _normalised(*args[:5], **{k: v for k, v in kwargs.items() if k not in ("use_input_stats", "momentum")})
        return function(*args, **kwargs)


FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
CASTS = {Tensor.half: torch.float16, Tensor.bfloat16: torch.bfloat16, Tensor.float: torch.float32, Tensor.double: torch.float64}


class Lifted(TorchFunctionMode):
    """Casts to a floating point precision that a model or a loss has written in it become casts to the kernel's: ``logits.float()``."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self._dtype = dtype
        self.used = False
        """Whether there was any."""

    def __torch_function__(self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if self._other(CASTS.get(function)):
            self.used = True
            return args[0].to(self._dtype)
        if function is not Tensor.view and any(self._other(value) for value in (*args, *kwargs.values())):
            self.used = True
            args = tuple(self._dtype if self._other(value) else value for value in args)
            kwargs = {name: self._dtype if self._other(value) else value for name, value in kwargs.items()}
        return function(*args, **kwargs)

    def _other(self, value: Any) -> bool:
        return isinstance(value, torch.dtype) and value in FLOATS and value != self._dtype


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


class _Uncheckpointed:
    """Activation checkpointing saves memory by means that no function transform knows: what is checkpointed is just called."""

    @staticmethod
    def apply(function: Any, preserve: Any, *args: Any) -> Any:
        return function(*args)


def _nothing_around(*args: Any, **kwargs: Any) -> Iterator[None]:
    yield


CHECKPOINTING = {"CheckpointFunction": _Uncheckpointed, "_checkpoint_without_reentrant_generator": _nothing_around}
"""Of torch.utils.checkpoint: what its two ways to checkpoint are made of."""


class _Differentiable(AbstractContextManager[None]):
    """Attention in its math form: the fused kernels have no forward-mode derivative. And no checkpoints."""

    outside: ClassVar[tuple[str, bool] | None] = None
    """How products round for who is not within."""

    def __init__(self, tf32: bool) -> None:
        self._rounding = rounding_in_products("high" if tf32 else "highest", tf32)

    def __enter__(self) -> None:
        self._before = _Differentiable.outside
        _Differentiable.outside = self._before or float32_products()
        self._rounding.__enter__()
        self._checkpointing = {name: getattr(checkpoint, name) for name in CHECKPOINTING if hasattr(checkpoint, name)}
        for name in self._checkpointing:
            setattr(checkpoint, name, CHECKPOINTING[name])
        self._fast = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        self._math = sdpa_kernel(SDPBackend.MATH)
        self._math.__enter__()

    def __exit__(self, *error: Any) -> None:
        self._math.__exit__(*error)
        self._rounding.__exit__(*error)
        _Differentiable.outside = self._before
        for name, own in self._checkpointing.items():
            setattr(checkpoint, name, own)
        torch.backends.mha.set_fastpath_enabled(self._fast)


def differentiable(tf32: bool = False) -> AbstractContextManager[None]:
    """Within it attention and checkpointed modules have reverse- and forward-mode derivatives; settings are put back afterwards.

    tf32: whether products of float32 may take TF32 where the device has it, ten bits of each factor; what was set up does not count.
    """
    return _Differentiable(tf32)
