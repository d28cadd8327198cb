"""(f(b) − f(a)) / (b − a) of elementwise functions, also where a and b nearly or exactly agree.

Slopes are constants of the linearisation: they are never differentiated themselves.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.func import jvp

Elementwise = Callable[[Tensor], Tensor]

REACH = {torch.float64: 0.02, torch.float32: 0.3}
"""Where b − a is smaller, the quotient would lose digits to cancellation, and three Gauss nodes of f′ are exact to rounding.

For an f that varies on the scale of 1, as tanh does; a scaled f(β x) has a reach of 1/β of it.
"""
NODES = ((0.5 - 0.15**0.5, 5 / 18), (0.5, 8 / 18), (0.5 + 0.15**0.5, 5 / 18))


def difference(a: Tensor, b: Tensor) -> Tensor:
    """b − a, and 0 where both are the same infinity (a mask)."""
    return torch.where(a == b, torch.zeros_like(a), b - a)


def quotient(rise: Tensor, run: Tensor, otherwise: Tensor) -> Tensor:
    """rise / run, and `otherwise` where run is 0."""
    still = run == 0
    return torch.where(still, otherwise, rise / torch.where(still, torch.ones_like(run), run))


def derivative(f: Elementwise, x: Tensor) -> Tensor:
    """f′(x)."""
    return jvp(f, (x,), (torch.ones_like(x),))[1]


def smooth(f: Elementwise, a: Tensor, b: Tensor, kinks: Sequence[float] = (), scale: float | Tensor = 1.0) -> Tensor:
    """Slope of an f that is smooth but for kinks. scale: of x, on which f varies; it may differ from element to element."""
    run = difference(a, b)
    far = run.abs() > REACH[a.dtype] * scale
    for kink in kinks:
        far = far | ((a - kink) * (b - kink) < 0)
    start = torch.where(far, b, a)  # where the quotient serves, keep f′ away from what may lie between
    width = torch.where(far, torch.zeros_like(run), run)
    near = sum(w * derivative(f, start + t * width) for t, w in NODES)
    assert isinstance(near, Tensor)
    return torch.where(far, quotient(f(b) - f(a), run, near), near)


def ramp(a: Tensor, b: Tensor, kink: float = 0.0) -> Tensor:
    """Slope of max(x − kink, 0): the share of the way from a to b that lies above the kink; at a = b = kink it is torch's, 0."""
    if kink:
        a, b = a - kink, b - kink
    return share(a, b, b.relu() - a.relu())


def share(a: Tensor, b: Tensor, rise: Tensor) -> Tensor:
    """Slope of max(x, 0), given how far it rises from a to b."""
    return torch.where(a == b, (a > 0).to(a.dtype), rise / (b - a))


def reciprocal(a: Tensor, b: Tensor) -> Tensor:
    """Slope of 1/x: −1 / (a b)."""
    return -1.0 / (a * b)


def root(a: Tensor, b: Tensor) -> Tensor:
    """Slope of √x: 1 / (√a + √b); at a = b = 0 it is 0, as torch has it for a norm."""
    both = a.sqrt() + b.sqrt()
    return torch.where(both == 0, torch.zeros_like(both), 1.0 / both)


def reciprocal_root(a: Tensor, b: Tensor) -> Tensor:
    """Slope of 1/√x: −1 / (√a √b (√a + √b))."""
    p, q = a.sqrt(), b.sqrt()
    return -1.0 / (p * q * (p + q))


def logarithm(a: Tensor, b: Tensor) -> Tensor:
    """Slope of log x: log1p(r) / (r a) with r = (b − a) / a."""
    run = difference(a, b)
    return quotient(torch.log1p(run / a), run, 1.0 / a)
