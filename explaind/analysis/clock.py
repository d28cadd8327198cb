"""Two ways to add on a circle, told apart from outside (Zhong et al., The Clock and the Pizza, arXiv 2306.17844).

Subtraction is read as the addition of a and −b. Neither measure has a meaning where a and b are multiplied or squared first.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from explaind.analysis.progress import SIGN, Square
from explaind.analysis.table import Table
from explaind.store.reader import Run
from explaind.tasks.modular import ModularArithmetic

STATES = 20
"""About how many states of a run are looked at."""


def distance_irrelevance(correct: np.ndarray, sign: int = 1) -> float:
    """How little the correct logit depends on the distance of what is added (their section 4.2), for correct logits L [a, b].

    mean_d std_a L[a, sign · (a + d)] / std L, all mod p: the answer is a + sign · b, the distance d = sign · b − a.
    Near 1 for a clock, near 0 for a pizza; NaN where all logits are equal.
    """
    p, whole = len(correct), correct.std()
    if whole == 0:
        return float("nan")
    rows = np.arange(p)
    return float(np.mean([correct[rows, sign * (rows + d) % p].std() for d in range(p)]) / whole)


def gradient_symmetricity(square: Square, triples: int, seed: int) -> float:
    """Mean cosine of ∂logit_c/∂E_a and ∂logit_c/∂E_b over random triples (a, b, c), E the inputs to the network (their section 4.1).

    Near 1 for a pizza, which depends on E_a + E_b; below for a clock. Where b is subtracted, the network has to make its negative first,
    as −E_b or as the ``mirror`` image E_−b: the gradient at b is turned in the same way, the larger mean counts.
    """
    generator = torch.Generator().manual_seed(seed)
    pairs = torch.randint(len(square.tokens), (triples,), generator=generator)
    classes = torch.randint(square.p, (triples,), generator=generator)
    found: list[Tensor] = []

    def noted(module: torch.nn.Module, given: tuple[Tensor, ...], embedded: Tensor) -> Tensor:
        found.append(embedded.detach().requires_grad_())
        return found[0]

    embedding = square.model.get_submodule("embedding")
    handle = embedding.register_forward_hook(noted)
    try:
        logits = square.model(square.tokens[pairs])
    finally:
        handle.remove()
    (gradients,) = torch.autograd.grad(logits[torch.arange(triples), classes].sum(), found[0])
    first, second = gradients[:, 0].double(), gradients[:, -2].double()
    table = next(embedding.parameters()).detach().double()[: square.p]
    turned = [second] if SIGN[square.task.operation] > 0 else [-second, second @ mirror(table)]
    return max(float(cosine_similarity(first, other, dim=-1).mean()) for other in turned)


def mirror(table: Tensor) -> Tensor:
    """The symmetric orthogonal map that takes every row E_n of a table [p, width] nearest to E_−n: [width, width].

    It keeps the cosines in n and turns the sines round (orthogonal Procrustes problem); what is neither stays.
    """
    negative = -torch.arange(len(table)) % len(table)
    values, vectors = torch.linalg.eigh(table.T @ table[negative])  # cosines have positive eigenvalues, sines negative ones
    rounding = len(table) * torch.finfo(values.dtype).eps * values.abs().max()
    return (vectors * torch.where(values < -rounding, -1.0, 1.0).to(vectors)) @ vectors.T


def clock_or_pizza(run: Run, task: ModularArithmetic, steps: Sequence[int] | None = None, triples: int = 1000, seed: int = 0) -> Table:
    """Both measures at these steps, by default at about ``STATES`` of them: one row a step."""
    square, sign = Square(run, task), SIGN[task.operation]
    looks = run.some_states(STATES) if steps is None else list(steps)
    rows = []
    for step in looks:
        square.at(step)
        correct = square.logits()[torch.arange(len(square.answers)), square.answers].reshape(square.p, square.p).numpy()
        rows.append((distance_irrelevance(correct, sign), gradient_symmetricity(square, triples, seed)))
    irrelevance, symmetricity = np.array(rows).T
    negative = "" if sign > 0 else ", that at b turned as the network turns b: the larger of −1 and the mirror image E_n → E_−n"
    return Table(
        "clock_or_pizza",
        f"distance_irrelevance = mean_d std_a L[a, {'' if sign > 0 else '−'}(a + d)] / std L, L the correct logits; "
        f"gradient_symmetricity = mean cosine of the logit's gradients at the embeddings of a and b{negative}",
        "Zhong et al. (arXiv 2306.17844), section 4" + ("" if sign > 0 else "; subtraction as addition of −b: explaind"),
        {"step": np.array(looks), "distance_irrelevance": irrelevance, "gradient_symmetricity": symmetricity},
    )
