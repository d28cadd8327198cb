"""The named tolerances: how close two results must be, by what can make them differ.

same        bitwise: nothing was computed, or the same operations in the same order
algebra     an identity evaluated in float64 in two ways
rounding    the same formula in float32 and in float64
falls       a quadrature's miss, which must fall at its known rate
"""

import numpy as np

ALGEBRA = 1e-10
"""Of the largest number compared."""
ROUNDING = 1e-4
"""Of the largest number compared; float32 has 6e-8, and a run of a few steps loses two digits of it by cancellation in θ' − θ."""
QUADRATURE = 0.05
"""Of the known rate."""


def same(got, want, what=""):
    """Bitwise, so that NaN equals NaN and 0 does not equal −0."""
    got, want = np.asarray(got), np.asarray(want)
    assert (got.dtype, got.shape) == (want.dtype, want.shape), f"{what}: {got.dtype}{got.shape} is not {want.dtype}{want.shape}"
    assert got.tobytes() == want.tobytes(), f"{what}: {np.sum(got != want)} of {got.size} numbers differ"


def algebra(got, want, what="", scale=0.0):
    """Equal but for float64 rounding. `scale` is the size of the numbers that were summed, where the result is smaller than they are."""
    _close(got, want, ALGEBRA, what, scale)


def rounding(got, want, what="", scale=0.0):
    """Equal but for float32 rounding."""
    _close(got, want, ROUNDING, what, scale)


def falls(misses, factor, what=""):
    """Each miss is `factor` times smaller than the one before it."""
    misses = np.abs(np.asarray(misses, dtype=np.float64))
    found = misses[:-1] / misses[1:]
    assert np.all(np.abs(found / factor - 1) <= QUADRATURE), f"{what}: misses {misses} fall by {found}, not by {factor}"


def _close(got, want, share, what, scale):
    got, want = np.asarray(got, dtype=np.float64), np.asarray(want, dtype=np.float64)
    assert got.shape == want.shape, f"{what}: shape {got.shape} is not {want.shape}"
    scale = max(scale, float(np.abs(want).max(initial=0.0)))
    off = float(np.abs(got - want).max(initial=0.0))
    assert off <= share * scale, (
        f"{what}: off by {off:.3g}, which is {off / scale if scale else np.inf:.3g} of {scale:.3g}; {share:g} is allowed"
    )
