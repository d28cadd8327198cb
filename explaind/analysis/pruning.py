"""Which parts of a network can go: scores by credit and by three baselines, at four levels, without retraining.

Source of the protocol: Ranjan et al., ExPLAIND (arXiv 2505.20076): scores Σ |data| by parameter, the output layer kept.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from explaind.analysis.similarity import score_vectors
from explaind.analysis.surgery import Bench, Theta
from explaind.analysis.table import Table
from explaind.errors import RequestError
from explaind.ledger.ledger import Ledger
from explaind.store.manifest import Layer

LEVELS = ("param", "neuron", "module", "tensor")
METHODS = ("credit", "magnitude", "gradient", "random")
SOURCE = "Ranjan et al., ExPLAIND (arXiv 2505.20076); baselines: Han et al. (1506.02626), Molchanov et al. (1906.10771)"


def credit_scores(ledger: Ledger) -> np.ndarray:
    """Σ_step,query |data| of every parameter, summed over examples with their signs: float64 [param]. Keep query, param and step."""
    return np.abs(score_vectors(ledger)[1]).sum((0, 1))


def baseline_scores(bench: Bench, theta: Theta, method: str, seed: int = 0) -> np.ndarray:
    """Float64 [param]: |θ|, |θ · ∂(mean training loss)/∂θ| (the first-order effect of removal), or even draws."""
    flat = np.concatenate([values.reshape(-1) for values in theta.values()]).astype(np.float64)
    if method == "magnitude":
        return np.abs(flat)
    if method == "random":
        return np.random.default_rng(seed).uniform(size=len(flat))
    if method != "gradient":
        raise RequestError("unknown way to score parameters", expected=", ".join(METHODS[1:]), got=repr(method))
    model = bench.put(theta)
    parameters = [dict(model.named_parameters())[name] for name in theta]
    gradients = torch.autograd.grad(bench.task.losses(model, bench.batches["train"]).mean(), parameters, allow_unused=True)
    slopes = [np.zeros(p.numel()) if g is None else g.numpy().reshape(-1) for p, g in zip(parameters, gradients, strict=True)]
    return np.abs(flat * np.concatenate(slopes))


def components(layers: Sequence[Layer], level: str) -> np.ndarray:
    """The component that each parameter is part of, counted from 0 in the order of the layers: int [param].

    param   each alone
    neuron  an output row of a weight (an output channel of a convolution), with its entry of the bias of the same module
    module  all tensors of a module: an attention head where heads are modules
    tensor  each tensor
    """
    if level not in LEVELS:
        raise RequestError("unknown level of components", expected=", ".join(LEVELS), got=repr(level), do="name one of these")
    number: dict[Any, int] = {}
    found = []
    for layer in layers:
        module = layer.name.rpartition(".")[0] or layer.name
        rows = layer.shape[0] if layer.shape else 1
        if level == "param":
            keys: Sequence[Any] = [(layer.name, i) for i in range(layer.size)]
        elif level == "neuron":
            keys = [(module, i * rows // layer.size) for i in range(layer.size)]
        else:
            keys = [module if level == "module" else layer.name] * layer.size
        found += [number.setdefault(key, len(number)) for key in keys]
    return np.array(found, dtype=np.int64)


def scores_of(scores: np.ndarray, of: np.ndarray) -> np.ndarray:
    """Scores of components, the sums of their parameters': [component]."""
    return np.bincount(of, weights=scores, minlength=int(of.max(initial=-1)) + 1)


def mask(scores: np.ndarray, of: np.ndarray, prunable: np.ndarray, kept: float) -> np.ndarray:
    """Which parameters stay: bool [param]. Components go lowest score per parameter first, ties by place, while what stays is ≥ `kept`.

    prunable  bool [param]; a component of which any parameter is not prunable stays whole
    kept      share of the prunable parameters that is to stay, in [0, 1]
    """
    if not 0 <= kept <= 1:
        raise RequestError("not a share", expected="kept in [0, 1]", got=kept, do="give for instance 0.1")
    count = int(of.max(initial=-1)) + 1
    sizes = np.bincount(of, minlength=count)
    free = np.bincount(of, weights=prunable, minlength=count) == sizes
    order = [c for c in np.argsort(scores_of(scores, of) / np.maximum(sizes, 1), kind="stable") if free[c]]
    most = (1 - kept) * sizes[free].sum() + 1e-9
    gone = np.zeros(count, dtype=bool)
    gone[np.array(order, dtype=np.int64)[np.cumsum(sizes[order]) <= most] if order else []] = True
    return ~gone[of]


def pruned(theta: Theta, stays: np.ndarray) -> dict[str, np.ndarray]:
    """The parameters with those that do not stay at zero; copies."""
    found, start = {}, 0
    for name, values in theta.items():
        found[name] = np.where(stays[start : start + values.size].reshape(values.shape), values, np.zeros((), values.dtype))
        start += values.size
    return found


def pruning_curve(
    bench: Bench,
    scores: Mapping[str, np.ndarray],
    fractions: Sequence[float],
    spare: Sequence[str] = (),
    levels: Sequence[str] = ("param",),
    step: int | None = None,
) -> Table:
    """What is left of a network at each kept fraction, without retraining: one row a method, level and fraction.

    scores  {method: [param]}: of ``credit_scores`` and ``baseline_scores``
    spare   layers that stay whole, such as the output layer
    sparsity  share of all prunable parameters that are zero; kl = mean KL(whole ‖ pruned) on validation, nats
    """
    layers = bench.run.manifest.layers
    theta = bench.run.theta(bench.run.steps if step is None else step)
    prunable = np.concatenate([np.full(layer.size, layer.name not in spare) for layer in layers])
    rows = list(_rows(bench, theta, scores, fractions, prunable, {level: components(layers, level) for level in levels}))
    return Table(
        "pruning",
        "components of least score per parameter set to zero until the share `kept` of prunable parameters is left; kl = mean KL(whole ‖ "
        f"pruned) on validation, nats; kept whole: {', '.join(spare) or 'none'}",
        SOURCE,
        {name: np.array([row[name] for row in rows]) for name in rows[0]},
    )


def _rows(
    bench: Bench,
    theta: Theta,
    scores: Mapping[str, np.ndarray],
    fractions: Sequence[float],
    prunable: np.ndarray,
    levels: Mapping[str, np.ndarray],
) -> Iterator[dict[str, Any]]:
    for method, values in scores.items():
        for level, of in levels.items():
            for kept in fractions:
                stays = mask(values, of, prunable, kept)
                made = pruned(theta, stays)
                yield {
                    "method": method,
                    "level": level,
                    "kept": kept,
                    "sparsity": float(1 - stays[prunable].mean()),
                    **bench.measured(made),
                    "kl": bench.divergence(theta, made),
                }


def ablation(bench: Bench, groups: Mapping[str, Sequence[str]], step: int | None = None) -> Table:
    """What is lost when each group of layers is set to zero: one row a group, by name of its tensors.

    …_change  accuracy or loss without the group less that of the whole network; kl as in ``pruning_curve``
    """
    theta = bench.run.theta(bench.run.steps if step is None else step)
    whole, rows = bench.measured(theta), []
    for group, names in groups.items():
        made = {name: np.zeros_like(values) if name in names else values for name, values in theta.items()}
        found = bench.measured(made)
        rows.append(
            {"group": group, **{f"{name}_change": found[name] - whole[name] for name in whole}, "kl": bench.divergence(theta, made)}
        )
    return Table(
        "ablation",
        "measures with a group's tensors at zero less those of the whole network; kl = mean KL(whole ‖ ablated) on validation, nats",
        "explaind",
        {name: np.array([row[name] for row in rows]) for name in rows[0]},
    )
