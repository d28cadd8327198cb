"""Which parts of a network can go: scores by credit and by three baselines, at the levels of ``components``, without retraining.

Source of the protocol: Ranjan et al., ExPLAIND (arXiv 2505.20076): scores Σ |data| by parameter, the output layer kept.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from explaind.analysis.components import components
from explaind.analysis.curves import evaluated
from explaind.analysis.similarity import score_vectors
from explaind.analysis.surgery import Bench, Theta
from explaind.analysis.table import Table, tabulated
from explaind.errors import RequestError
from explaind.ledger.ledger import Ledger
from explaind.store.manifest import Layer

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


def scores_of(scores: np.ndarray, of: np.ndarray) -> np.ndarray:
    """Scores of components, the sums of their parameters': [component]."""
    inside = of >= 0
    return np.bincount(of[inside], weights=scores[inside], minlength=int(of.max(initial=-1)) + 1)


def mask(scores: np.ndarray, of: np.ndarray, prunable: np.ndarray, kept: float) -> np.ndarray:
    """Which parameters stay: bool [param]. Components go lowest score per parameter first, ties by place, while what stays is ≥ `kept`.

    of        int [param], of ``components``; what is of no component stays
    prunable  bool [param]; a component of which any parameter is not prunable stays whole
    kept      share that is to stay of the prunable parameters that are of a component, in [0, 1]
    """
    if not 0 <= kept <= 1:
        raise RequestError("not a share", expected="kept in [0, 1]", got=kept, do="give for instance 0.1")
    sizes = scores_of(np.ones(len(of)), of).astype(np.int64)
    free = scores_of(prunable.astype(float), of) == sizes
    order = [c for c in np.argsort(scores_of(scores, of) / np.maximum(sizes, 1), kind="stable") if free[c]]
    most = (1 - kept) * sizes[free].sum() + 1e-9
    gone = np.zeros(len(sizes) + 1, dtype=bool)  # the last one is for what is of no component, −1
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
    sparsity  share of all prunable parameters that were set to zero; at level head, where `kept` is of the heads' alone, less than 1 − kept
    kl        mean KL(whole ‖ pruned) on validation, nats
    """
    layers = bench.run.manifest.layers
    theta = bench.run.theta(bench.run.steps if step is None else step)
    of = {level: components(layers, level, bench.model).of for level in levels}
    rows = list(_rows(bench, theta, scores, fractions, _prunable(layers, spare), of))
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


def ablation(
    bench: Bench,
    scores: Mapping[str, np.ndarray],
    levels: Sequence[str],
    spare: Sequence[str] = (),
    step: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Table:
    """What each component is for, beside its scores: one row a component, which alone is set to zero.

    scores    {method: [param]}, as in ``pruning_curve``; a component has the sums of its parameters'
    spare     layers that stay whole; components with a parameter of theirs are left out
    …_change  loss (nats) or accuracy on validation without the component less that of the whole network; kl as in ``pruning_curve``
    """
    theta = bench.run.theta(bench.run.steps if step is None else step)
    layers = bench.run.manifest.layers
    prunable, whole = _prunable(layers, spare), _seen(bench, theta)
    dealt = {level: components(layers, level, bench.model) for level in levels}
    free = {level: [c for c in range(len(d.names)) if prunable[d.of == c].all()] for level, d in dealt.items()}
    total, rows = sum(map(len, free.values())), list[dict[str, Any]]()
    for level, found in dealt.items():
        sums = {method: scores_of(values, found.of) for method, values in scores.items()}
        for c in free[level]:
            row = {"level": level, "component": found.names[c], "parameters": int((found.of == c).sum())}
            row |= {method: float(values[c]) for method, values in sums.items()}
            rows.append({**row, **_lost(whole, _seen(bench, pruned(theta, found.of != c)))})
            progress(len(rows), total)
    if not rows:
        raise RequestError("no component is left to take out", got=f"kept whole: {', '.join(spare)}", do="spare fewer layers")
    return Table(
        "ablation",
        "a component alone at zero; its scores: sums of its parameters'; …_change: on validation, less the whole network's, loss in nats; "
        f"kl = mean KL(whole ‖ ablated), nats; left out: components of {', '.join(spare) or 'none'}",
        SOURCE,
        {name: np.array([row[name] for row in rows]) for name in rows[0]},
    )


def ablation_ranks(table: Table) -> Table:
    """How well each score orders the components of an ``ablation`` by what their removal costs: one row a level and score.

    loss, accuracy, kl  Spearman's rank correlation with the rise of loss, the fall of accuracy and kl; NaN where all are equal
    """
    rows = []
    for level in dict.fromkeys(table["level"].tolist()):
        mine = table.where(level=level)
        costs = {"loss": mine["val_loss_change"], "accuracy": -mine["val_accuracy_change"], "kl": mine["kl"]}
        for method in (name for name in METHODS if name in table.columns):
            ranked = {name: spearman(mine[method], cost) for name, cost in costs.items()}
            rows.append({"level": level, "method": method, "components": len(mine), **ranked})
    return tabulated("ablation_ranks", "Spearman (1904)", "rank correlation of a component's score with what its removal costs", rows)


def spearman(one: np.ndarray, two: np.ndarray) -> float:
    """Spearman's rank correlation, equal values at the mean of their ranks; NaN where all values of a side are equal."""
    ranks = []
    for values in (one, two):
        _, place, count = np.unique(values, return_inverse=True, return_counts=True)
        ranks.append((np.cumsum(count) - (count - 1) / 2)[place])
    off = [r - r.mean() for r in ranks]
    scale = np.sqrt((off[0] ** 2).sum() * (off[1] ** 2).sum())
    return float((off[0] * off[1]).sum() / scale) if scale > 0 else np.nan


def _prunable(layers: Sequence[Layer], spare: Sequence[str]) -> np.ndarray:
    return np.concatenate([np.full(layer.size, layer.name not in spare) for layer in layers])


def _seen(bench: Bench, theta: Theta) -> tuple[float, float, torch.Tensor]:
    """Loss, accuracy and log-probabilities on validation."""
    with torch.no_grad():
        loss, accuracy = evaluated(bench.task, bench.put(theta), bench.batches["val"])
    return loss, accuracy, bench.log_probabilities(theta)


def _lost(whole: tuple[float, float, torch.Tensor], made: tuple[float, float, torch.Tensor]) -> dict[str, float]:
    one, two = whole[2], made[2]
    kl = float((one.exp() * (one - two)).sum(-1).mean())
    return {"val_loss_change": made[0] - whole[0], "val_accuracy_change": made[1] - whole[1], "kl": kl}
