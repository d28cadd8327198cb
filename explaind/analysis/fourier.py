"""Functions on the integers mod p, p odd, by frequency."""

import numpy as np

from explaind.errors import RequestError


def frequencies(p: int) -> np.ndarray:
    """1 … (p − 1) / 2. RequestError for an even p, whose highest frequency has no sine."""
    if p < 3 or p % 2 == 0:
        raise RequestError("frequencies are told apart for odd moduli", expected="an odd p of at least 3", got=p, do="choose a prime")
    return np.arange(1, (p - 1) // 2 + 1)


def waves(p: int) -> np.ndarray:
    """Orthonormal cosine and sine of every frequency: [frequency, 2, number]. With the constant 1/√p they are a basis."""
    angle = 2 * np.pi * frequencies(p)[:, None] * np.arange(p) / p
    return np.sqrt(2 / p) * np.stack([np.cos(angle), np.sin(angle)], axis=1)


def amplitudes(matrix: np.ndarray) -> np.ndarray:
    """Norm of the rows' component along each cosine and sine: [number, width] -> [frequency, 2]."""
    return np.linalg.norm(waves(len(matrix)) @ (matrix - matrix.mean(0)), axis=-1)


def power(matrix: np.ndarray) -> np.ndarray:
    """Share of the variance over numbers that each frequency has: [number, width] -> [frequency], summing to 1 (0 for a constant)."""
    squares = np.square(amplitudes(matrix)).sum(1)
    whole = squares.sum()
    return squares / whole if whole > 0 else squares


def gini(values: np.ndarray) -> float:
    """Gini coefficient of non-negative values: 0 where all are equal, 1 − 1/n where one has all."""
    ordered = np.sort(np.asarray(values, dtype=np.float64).reshape(-1))
    count, whole = len(ordered), ordered.sum()
    if whole == 0:
        return 0.0
    return float(((2 * np.arange(1, count + 1) - count - 1) * ordered).sum() / (count * whole))


def by_neuron(activations: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The single frequency that explains each neuron best, and the share of its variance that it explains.

    activations [a, b, neuron] -> (frequency [neuron], share [neuron]). The terms of one frequency are the products of 1, cos, sin of a
    with 1, cos, sin of b, the constant left out (Nanda et al., arXiv 2301.05217, section 4.1). A neuron that is constant has share 0.
    """
    p, _, neurons = activations.shape
    centred = activations - activations.mean((0, 1))
    one, own = np.full((1, p), p**-0.5), waves(p)
    shares = np.zeros((len(own), neurons))
    whole = np.square(centred).sum((0, 1))
    for k, pair in enumerate(own):
        terms = np.concatenate([one, pair])  # [3, number]
        shares[k] = np.square(np.einsum("xa,abn,yb->xyn", terms, centred, terms, optimize=True)).sum((0, 1))
    shares = np.divide(shares, whole, out=np.zeros_like(shares), where=whole > 0)
    return frequencies(p)[shares.argmax(0)], shares.max(0)
