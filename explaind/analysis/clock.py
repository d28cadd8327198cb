"""Two ways to add on a circle, told apart from outside (Zhong et al., The Clock and the Pizza, arXiv 2306.17844)."""

import numpy as np
import torch
from torch import Tensor

from explaind.analysis.progress import Square
from explaind.analysis.table import Table
from explaind.store.reader import Run
from explaind.tasks.modular import ModularArithmetic


def distance_irrelevance(correct: np.ndarray) -> float:
    """How little the correct logit depends on a − b: mean_d std(L[i, i + d]) / std(L), for correct logits L [a, b] (their section 4.2).

    Near 1 for a clock, near 0 for a pizza; NaN where all logits are equal.
    """
    p, whole = len(correct), correct.std()
    if whole == 0:
        return float("nan")
    rows = np.arange(p)
    return float(np.mean([correct[rows, (rows + d) % p].std() for d in range(p)]) / whole)


def gradient_symmetricity(square: Square, triples: int, seed: int) -> float:
    """Mean cosine of ∂logit_c/∂E_a and ∂logit_c/∂E_b over random triples (a, b, c), E the inputs to the network (their section 4.1).

    Near 1 for a pizza, which depends on E_a + E_b; below for a clock.
    """
    generator = torch.Generator().manual_seed(seed)
    pairs = torch.randint(len(square.tokens), (triples,), generator=generator)
    classes = torch.randint(square.p, (triples,), generator=generator)
    found: list[Tensor] = []

    def noted(module: torch.nn.Module, given: tuple[Tensor, ...], embedded: Tensor) -> Tensor:
        found.append(embedded.detach().requires_grad_())
        return found[0]

    handle = square.model.get_submodule("embedding").register_forward_hook(noted)
    try:
        logits = square.model(square.tokens[pairs])
    finally:
        handle.remove()
    (gradients,) = torch.autograd.grad(logits[torch.arange(triples), classes].sum(), found[0])
    first, second = gradients[:, 0].double(), gradients[:, -2].double()
    return float(torch.nn.functional.cosine_similarity(first, second, dim=-1).mean())


def clock_or_pizza(run: Run, task: ModularArithmetic, step: int | None = None, triples: int = 1000, seed: int = 0) -> Table:
    """Both measures at a step, by default at the end: one row."""
    square = Square(run, task)
    at = run.steps if step is None else step
    square.at(at)
    correct = square.logits()[torch.arange(len(square.answers)), square.answers].reshape(square.p, square.p).numpy()
    return Table(
        "clock_or_pizza",
        "distance_irrelevance = mean_d std_i L[i, i + d] / std L, L the correct logits; gradient_symmetricity = mean cosine of the logit's "
        "gradients at the embeddings of a and b",
        "Zhong et al. (arXiv 2306.17844), section 4",
        {
            "step": np.array([at]),
            "distance_irrelevance": np.array([distance_irrelevance(correct)]),
            "gradient_symmetricity": np.array([gradient_symmetricity(square, triples, seed)]),
        },
    )
