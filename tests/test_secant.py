"""The secant linearisation: operation by operation, then whole models."""

import math
from functools import cache

import pytest
import torch
from torch import nn
from torch.func import functional_call, jacrev, jvp, vmap
from torch.nn import functional as F

from explaind.kernel.secant import NoSecant, Secant
from explaind.kernel.secant.rules import RULES
from explaind.replay.surroundings import differentiable
from tests.cases import normal
from tests.closeness import algebra, same

aten = torch.ops.aten
INF = float("inf")
IMAGE, WEIGHT, SPACE = (2, 3, 6, 6), (4, 3, 3, 3), (1, 2, 4, 4, 4)
MASK = torch.tensor([[True, False, False, True], [False] * 4, [False, True, False, False]])
INDEX = torch.tensor([[0, 2, 1], [3, 3, 0]])
PLACES, TWICE = torch.tensor([[0, 2, 1], [3, 2, 0], [1, 0, 3]]), torch.tensor([0, 0])
VECTOR, MATRIX = (4,), (3, 4)
GIVEN = normal(3, 4, seed=5)

# name: (function of one or more tensors that the parameters move, their shapes)
LINEAR = {
    "views": (lambda x: x.view(2, 6).reshape(3, 4).permute(1, 0).transpose(0, 1).unsqueeze(0).squeeze(0).flatten(), [MATRIX]),
    "slices": (lambda x: torch.cat([x[:2], x[None, 1], x.flip(0)[:, 1:3].repeat(1, 2)]), [MATRIX]),
    "sums": (lambda x: x.sum(0) + x.mean(1).sum() - x.cumsum(1)[-1], [MATRIX]),
    "concatenation with constants": (lambda x: torch.stack([x, torch.ones(3, 4)]), [MATRIX]),
    "lookup": (lambda w: F.embedding(INDEX, w), [(4, 3)]),
    "lookup with padding": (lambda w: F.embedding(INDEX, w, padding_idx=3), [(4, 3)]),
    "gather": (lambda x: x.gather(1, INDEX).sum() + x[[0, 2], 1:], [MATRIX]),
    "add and subtract": (lambda x, y: 3 - torch.add(x, y, alpha=2) + (y - 1) - x[0], [MATRIX, MATRIX]),
    "padding": (lambda x: F.pad(x, (1, 2), value=7.0), [MATRIX]),
    "masks": (lambda x: torch.where(MASK, x, 2.0) + x.masked_fill(MASK, 5.0) + torch.where(MASK, 1.0, x), [MATRIX]),
    "in place": (lambda x: x.clone().mul_(2).add_(1), [MATRIX]),
    "written into a tensor": (lambda x, y: torch.zeros(5, 4).index_add(0, torch.tensor([0, 2, 2]), x) + written(x, y), [MATRIX, VECTOR]),
    "average pools": (lambda x: F.avg_pool2d(x, 2).flatten(1) @ torch.ones(27, 1) + F.adaptive_avg_pool2d(x, 1).sum(), [IMAGE]),
    "interpolation": (lambda x: F.interpolate(x, scale_factor=2, mode="bilinear"), [IMAGE]),
}
MOVED = {
    "scattered": (
        lambda x, y: flat(
            *(x.scatter(1, PLACES, 2.0), x.scatter(1, PLACES[:, 1:], y), x.scatter_add(1, PLACES, y), x.index_add(0, TWICE, y[1:])),
            *(x.masked_scatter(MASK, y.exp()), x.diagonal_scatter(y[0, :3]), x.select_scatter(y[0], 0, 1), x.slice_scatter(y[:2], 0, 1)),
        ),
        [MATRIX, MATRIX],
    ),
    "picked": (
        lambda x: flat(
            *(x.roll(1, 0), x.tril(), x.triu(1), x.diagonal(), x.diag_embed(), x.unfold(1, 2, 1), x.index_select(0, TWICE)),
            *(
                x.take_along_dim(PLACES, 1),
                *x.unbind(),
                *x.split(2),
                *x.split([1, 2]),
                aten.alias(x),
                torch.native_dropout(x, 0.5, False)[0],
            ),
        ),
        [MATRIX],
    ),
    "copied": (
        lambda x: flat(
            *(torch.view_copy(x, [12]), torch.permute_copy(x, (1, 0)), torch.select_copy(x, 0, 1), torch.slice_copy(x, 0, 1)),
            *(torch.narrow_copy(x, 0, 0, 2), *torch.unbind_copy(x), *torch.split_copy(x, 2)),
        ),
        [MATRIX],
    ),
    "padded": (
        lambda x: flat(
            *(F.pad(v, w, mode=how) for how in ("reflect", "replicate") for v, w in ((x, (1, 2, 2, 1)), (x[0], (1, 2)))),
        ),
        [IMAGE],
    ),
    "pooled": (
        lambda x: flat(
            *(F.avg_pool3d(x, 2), F.adaptive_avg_pool3d(x, 2), F.adaptive_avg_pool3d(x, 3), F.adaptive_avg_pool2d(x[0], 3)),
            *(F.avg_pool1d(x[0, 0], 2), F.unfold(x[0], 2), F.fold(x[0].reshape(2, 16, 4)[:, :4], (3, 3), 2), F.pixel_unshuffle(x[0], 2)),
        ),
        [SPACE],
    ),
    "enlarged": (
        lambda x: flat(
            *(F.interpolate(x, scale_factor=2, mode=how) for how in ("bicubic", "nearest", "bilinear")),
            *(F.interpolate(x[0], scale_factor=2, mode=how) for how in ("linear", "nearest")),
        ),
        [IMAGE],
    ),
}
PRODUCTS = {
    "vectors": (
        lambda x, y: flat(
            torch.addmv(torch.ones(3), x, y), x @ y, torch.outer(y, y), torch.vdot(y, y), torch.baddbmm(x, x[None], x.T @ x[None])
        ),
        [MATRIX, VECTOR],
    ),
    "mul": (lambda x, y: x * y * 2.0, [MATRIX, VECTOR]),
    "with itself": (lambda x: x @ x.T, [MATRIX]),
    "matmul": (lambda x, y: x @ y.T, [MATRIX, MATRIX]),
    "matrix and vector": (lambda x, y: x @ y, [MATRIX, VECTOR]),
    "dot": (lambda x, y: torch.dot(x, y) * torch.outer(x, y), [VECTOR, VECTOR]),
    "batches": (lambda x, y: torch.einsum("bik,bjk->bij", x, y), [(2, 3, 4), (2, 5, 4)]),
    "linear": (lambda x, w, c: F.linear(x, w, c), [(2, 3, 4), (5, 4), (5,)]),
    "linear of constants": (lambda w, c: F.linear(torch.ones(2, 4), w, c) + F.linear(torch.ones(4), w), [(5, 4), (5,)]),
    "linear, constant weight": (lambda x, c: F.linear(x, torch.ones(5, 4), c), [(2, 4), (5,)]),
    "tied": (lambda w: F.linear(F.embedding(INDEX, w), w), [(4, 3)]),
    "weight of a matrix product": (lambda w, c: torch.addmm(c, torch.ones(2, 3), w, beta=0.5, alpha=2), [MATRIX, VECTOR]),
    "convolution": (lambda x, w, c: F.conv2d(x, w, c, stride=2, padding=1), [IMAGE, WEIGHT, (4,)]),
    "convolution of an image": (lambda w, c: F.conv2d(torch.ones(IMAGE), w, c), [WEIGHT, (4,)]),
    "grouped and transposed": (
        lambda x, w: F.conv_transpose2d(F.conv2d(x, w, groups=3), torch.ones(3, 2, 2, 2)),
        [IMAGE, (3, 1, 2, 2)],
    ),
    "convolution along a line": (lambda x, w: F.conv1d(x, w, dilation=2), [(2, 3, 9), (4, 3, 3)]),
}
CURVES = {
    "exp and log": lambda x: x.exp().log1p() + (x.square() + 1).log() + torch.log2(x * x + 2),
    "trigonometry": lambda x: x.sin() * x.cos() + x.atan() + x.sinh(),
    "sigmoids": lambda x: x.sigmoid() + x.tanh() + F.logsigmoid(x) + torch.erf(x) + x.expm1(),
    "gelu": lambda x: F.gelu(x) + F.gelu(x, approximate="tanh"),
    "silu": lambda x: F.silu(x) + F.mish(x) + F.softplus(x),
    "roots": lambda x: (x * x + 1).sqrt() + (x * x + 1).rsqrt() + 1 / (x * x + 1),
    "powers": lambda x: x**2 + x**3 + x**5 + (x * x + 1) ** 1.7 + (x * x + 1) ** -0.5 + 2.0**x,
    "hyperbolas": lambda x: x.cosh() + x.asinh() + torch.erfc(x) + torch.square(x),
    "quotients": lambda x: x / (x * x + 2) + 3 / (x.exp() + 1) + x / 2,
}
SHARP = {
    "sharp softplus": lambda x: F.softplus(x, beta=100) + F.softplus(x, beta=-30),
    "softplus that jumps": lambda x: F.softplus(x, beta=3, threshold=1.5),
    "sharp elus": lambda x: F.celu(x, 0.01) + aten.elu(x, 2.0, 1.5, 70.0),
    "steep powers": lambda x: x.cos() ** 60 + (x.cos() + 1.5) ** -40.5 + (x.cos() + 2) ** torch.tensor([30.0, 2.0, 0.3, -9.0]),
    "moving exponents": lambda x: torch.tensor([2.0, 0.1, 3.0, 1.0]) ** x + (x * x + 1) ** x,
}
"""Curves on a scale of their own."""
KINKED = {
    "relu": F.relu,
    "leaky relu": lambda x: F.leaky_relu(x, 0.2),
    "elu": lambda x: F.elu(x) + F.selu(x) + F.celu(x, 0.5),
    "abs": torch.abs,
    "clamp": lambda x: x.clamp(-0.5, 0.7) + x.clamp(min=0.1) + F.hardtanh(x) + F.relu6(x),
    "clamp between bounds that are crossed": lambda x: x.clamp(0.5, -0.25) + x * 2,
    "clamp by tensors": lambda x: x.clamp(torch.tensor(-0.5), torch.full((1,), 0.7)) + torch.clamp_max(x, torch.tensor(0.3)),
    "hard swish": lambda x: F.hardswish(4 * x),
    "hard sigmoid": lambda x: F.hardsigmoid(4 * x),
}
NORMALISED = {
    "softmax": (lambda x: x.softmax(-1) + x.softmax(0), [MATRIX]),
    "log-softmax": (lambda x: x.log_softmax(-1) + x.log_softmax(0), [MATRIX]),
    "logsumexp": (lambda x: x.logsumexp(-1, keepdim=True) + x.logsumexp((0, 1)) + x.logsumexp(0), [MATRIX]),
    "masked softmax": (lambda x: x.masked_fill(MASK, -INF).softmax(-1), [MATRIX]),
    "layer norm": (lambda x, w, c: F.layer_norm(x, (4,), w, c) + F.layer_norm(x, (3, 4)), [MATRIX, VECTOR, VECTOR]),
    "group norm": (lambda x, w, c: F.group_norm(x, 3, w, c), [(2, 6, 4), (6,), (6,)]),
    "rms norm": (lambda x, w: F.rms_norm(x, (4,), w), [MATRIX, VECTOR]),
    "batch norm": (
        lambda x, w, c: F.batch_norm(x, torch.ones(3), 2 * torch.ones(3), w, c),
        [IMAGE, (3,), (3,)],
    ),
    "norms of constants": (
        lambda w, c: (
            F.layer_norm(GIVEN, (4,), w, c) + F.group_norm(GIVEN, 2, w, c) + F.batch_norm(GIVEN, torch.ones(4), 2 * torch.ones(4), w, c)
        ),
        [VECTOR, VECTOR],
    ),
    "batch norm as torch calls it": (
        lambda x, w: (
            aten._native_batch_norm_legit.no_stats(x, w, None, True, 0.1, 1e-5)[0]
            + aten._native_batch_norm_legit_no_training(x, w, None, torch.ones(3), torch.ones(3), 0.1, 1e-5)[0]
        ),
        [IMAGE, (3,)],
    ),
    "instance norm": (lambda x, w, c: F.instance_norm(x, weight=w, bias=c) + F.instance_norm(x * x), [IMAGE, (3,), (3,)]),
    "norms of other orders": (lambda x: x.norm(1, dim=0) + x.norm(INF, dim=0) + torch.linalg.vector_norm(x, -INF), [MATRIX]),
    "spread and mean": (lambda x: sum(torch.std_mean(x, dim=0)) + sum(torch.var_mean(x)), [MATRIX]),
    "cosine similarity": (lambda x, y: F.cosine_similarity(x, y) + F.cosine_similarity(x, torch.ones(4), dim=-1), [MATRIX, MATRIX]),
    "bilinear": (lambda x, y, w, c: F.bilinear(x, y, w, c) + F.bilinear(x, y, w), [MATRIX, (3, 5), (2, 4, 5), (2,)]),
    "bags": (
        lambda w, f: (
            F.embedding_bag(INDEX, w)
            + F.embedding_bag(INDEX, w, mode="sum", per_sample_weights=f)
            + F.embedding_bag(INDEX, w, padding_idx=-1)
        ),
        [(4, 3), (2, 3)],
    ),
    "normalise": (lambda x: F.normalize(x, dim=-1) + x.norm(dim=0), [MATRIX]),
    "variance": (lambda x: x.var(0) + x.std(1).sum(), [MATRIX]),
    "cross-entropy": (lambda x: F.cross_entropy(x, torch.tensor([0, 3, 1]), reduction="none"), [MATRIX]),
    "binary cross-entropy": (lambda x: F.binary_cross_entropy_with_logits(x, MASK.double()), [MATRIX]),
    "squared error": (lambda x: F.mse_loss(x, torch.ones(3, 4)), [MATRIX]),
    "attention": (
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
        [(1, 2, 5, 4), (1, 2, 5, 4), (1, 2, 5, 4)],
    ),
}
SELECTED = {
    "max": (lambda x: x.max(-1).values + x.amax((0, 1)) + x.max(), [MATRIX]),
    "min": (lambda x: x.min(-1).values + x.amin(1) + x.min(), [MATRIX]),
    "of two": (lambda x, y: torch.maximum(x, y) * torch.minimum(x, y[0]) + torch.maximum(x, torch.zeros(4)), [MATRIX, MATRIX]),
    "max-pool": (lambda x: F.max_pool2d(x, 3, stride=2, padding=1), [IMAGE]),
    "adaptive max-pool": (lambda x: F.adaptive_max_pool2d(x, 2), [IMAGE]),
    "max-pool along a line": (lambda x: F.max_pool1d(x, 2), [(2, 3, 8)]),
    "max-pools in space": (lambda x: flat(F.max_pool3d(x, 2, stride=1), F.adaptive_max_pool3d(x, 2)), [SPACE]),
    "margin": (lambda x: x[:, 0] - x.masked_fill(F.one_hot(torch.tensor([0, 0, 0]), 4).bool(), -INF).amax(-1), [MATRIX]),
}
BRANCHING = {
    "leaky relu by hand": (lambda x: torch.where(x > 0, x, 0.1 * x), [MATRIX]),
    "a step": (lambda x: torch.where(x < 0.3, x, x + 2) + (x >= 0.1) * x.exp(), [MATRIX]),
    "of two that move": (lambda x, y: torch.where(x <= y, x * y, 3.0) + (x != y) * x + x.masked_fill(y > x, 2.0), [MATRIX, MATRIX]),
    "masks together": (lambda x, y: torch.where((x > 0) & MASK | ~(y > x), x, y) + ((x > 1) | (y > 0)) * x, [MATRIX, MATRIX]),
    "logical": (
        lambda x, y: torch.logical_and(x > 0, y < 1) * x + torch.logical_or(x > 1, torch.logical_not(y > 0)) * y + (x == y) * x,
        [MATRIX, MATRIX],
    ),
    "a mask made of numbers": (lambda x: (x > 0).to(x.dtype).sum(0) * x + torch.where(x < 0.2, 1.0, x), [MATRIX]),
    "infinity that is not chosen": (lambda x: torch.where(x > 0, x, (x > -INF) / (MASK * 1.0)).masked_fill(~MASK, 0.0), [MATRIX]),
}
ALL = LINEAR | MOVED | PRODUCTS | {k: (f, [MATRIX]) for k, f in (CURVES | SHARP | KINKED).items()} | NORMALISED | SELECTED | BRANCHING


NO_FORWARD = {"hard sigmoid", "bags"}
"""Torch's derivative has a float32 sixth, or there is none."""


def flat(*values):
    return torch.cat([v.reshape(-1) for v in values])


def written(x, y):
    out = torch.zeros(5, 4)
    out[1:4] = x
    out[0] = y
    return out


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)
    with differentiable():
        yield
    torch.set_default_dtype(torch.float32)


@cache
def case(name):
    """(function of (parameters, batch), a, direction, its secant)"""
    function, shapes = ALL[name]
    names = "xyzw"[: len(shapes)]
    parameters, way = (
        {n: normal(*shape, seed=seed + i) for i, (n, shape) in enumerate(zip(names, shapes, strict=True))} for seed in (1, 9)
    )

    def scaled(p, batch):
        return function(*(p[n] for n in names)) * batch

    return scaled, parameters, way, Secant(scaled, parameters, ONE)


ONE = torch.ones(())


@pytest.mark.parametrize("size", [2.0, 1e-2, 1e-7, 1e-12])
@pytest.mark.parametrize("name", ALL)
def test_the_change_between_the_ends_is_exact(name, size):
    function, a, way, secant = case(name)
    b = {n: a[n] + size * way[n] for n in a}
    pair = secant.pair(a, b, {n: b[n] - a[n] for n in a}, ONE)
    algebra(pair.a, function(a, ONE))
    algebra(pair.b, function(b, ONE))
    off = (pair.d - (function(b, ONE) - function(a, ONE))).abs().max()
    assert off <= 1e-14 * (1 + pair.a.abs().max() + pair.b.abs().max())


ELSEWHERE = {"cudnn_batch_norm", "detach", "clamp_max", "transpose", "as_strided"}
"""Rules for another device, for older versions of torch, for the models below, and one that refuses."""


def test_every_rule_is_among_the_cases(monkeypatch):
    reached = set()

    def noting(kind, own):
        return lambda op, *args, **kwargs: (reached.add(kind), own(op, *args, **kwargs))[1]

    for kind, own in list(RULES.items()):
        monkeypatch.setitem(RULES, kind, noting(kind, own))
    for name in ALL:
        _, a, way, secant = case(name)
        secant(a, a, way, ONE)
    assert {str(kind).removeprefix("aten.") for kind in RULES.keys() - reached} == ELSEWHERE


@pytest.mark.parametrize("name", sorted(ALL.keys() - NO_FORWARD))
def test_where_the_ends_meet_it_is_the_derivative(name):
    function, a, way, secant = case(name)
    want = jvp(lambda p: function(p, ONE), (a,), (way,))[1]
    algebra(secant(a, a, way, ONE), want, scale=1.0)
    near = {n: a[n] + 1e-13 * way[n] for n in a}
    algebra(secant(a, near, way, ONE), want, scale=1.0)


@pytest.mark.parametrize("name", CURVES)
def test_a_slope_is_the_mean_derivative_at_every_distance(name):
    a = normal(40, seed=3)
    secant = Secant(lambda p, batch: CURVES[name](p["x"]) * batch, {"x": a}, ONE)
    for size in (1e-3, 0.015, 0.019, 0.021, 0.03, 0.3):  # around where the quotient takes over
        b = a + size
        nodes, weights = torch.tensor([(0.5 - 0.15**0.5, 5 / 18), (0.5, 8 / 18), (0.5 + 0.15**0.5, 5 / 18)]).T
        fine = sum(
            w / 8 * jvp(CURVES[name], (a + size * (j + t) / 8,), (torch.ones(40),))[1]
            for j in range(8)
            for t, w in zip(nodes, weights, strict=True)
        )
        algebra(secant({"x": a}, {"x": b}, {"x": torch.ones(40)}, ONE), fine, f"{name} {size}", scale=1.0)


@pytest.mark.parametrize("name", sorted(SHARP.keys() - {"moving exponents"}))
def test_a_sharp_curve_is_exact_in_float32_at_every_distance(name):
    function, one = SHARP[name], ONE.float()
    a = torch.linspace(-1, 1, 2004, dtype=torch.float32).reshape(-1, 4)
    secant = Secant(lambda p, batch: function(p["x"]).float() * batch, {"x": a}, one)
    for size in (0.001, 0.01, 0.05, 0.2, 0.29):
        b = a + size
        off = secant({"x": a}, {"x": b}, {"x": b - a}, one) - (function(b) - function(a))
        assert (off.abs() <= 1e-5 * (1 + function(a).abs().amax(0))).all(), size


@pytest.mark.parametrize(("a", "b"), [(-1.0, 1.0), (0.0, 1.0), (-1.0, 0.0), (0.0, 0.0), (1e-300, -1e-300), (-3e-9, 1e-9)])
@pytest.mark.parametrize("name", KINKED)
def test_ends_on_and_across_a_kink(name, a, b):
    a, b = torch.tensor([a]), torch.tensor([b])
    secant = Secant(lambda p, batch: KINKED[name](p["x"]) * batch, {"x": a}, ONE)
    change = secant({"x": a}, {"x": b}, {"x": b - a}, ONE)
    assert torch.isfinite(secant({"x": a}, {"x": b}, {"x": ONE.reshape(1)}, ONE)).all()
    algebra(change, KINKED[name](b) - KINKED[name](a), scale=1e-5)


def test_the_winners_share_the_way_between_them():
    a, b = torch.tensor([2.0, 1.0, 0.0]), torch.tensor([1.0, 4.0, 0.0])  # 1 passes 0 at a quarter of the way
    secant = Secant(lambda p, batch: p["x"].amax() * batch, {"x": a}, ONE)
    found = torch.stack([secant({"x": a}, {"x": b}, {"x": e}, ONE) for e in torch.eye(3)])
    algebra(found, [0.25, 0.75, 0.0])


def test_a_softmax_weighs_a_shift_of_all_as_nothing_and_stays_exact_where_it_is_saturated():
    a, b = torch.tensor([-2.0, 300.0, -30.0]), torch.tensor([-3.0, 250.0, 10.0])
    secant = Secant(lambda p, batch: p["x"].log_softmax(-1) * batch, {"x": a}, ONE)
    algebra(secant({"x": a}, {"x": b}, {"x": torch.ones(3)}, ONE), torch.zeros(3), scale=1.0)
    whole = jacrev(lambda d: secant({"x": a.float()}, {"x": b.float()}, {"x": d}, ONE.float()))(torch.zeros(3, dtype=torch.float32))
    algebra(secant({"x": a}, {"x": b}, {"x": b - a}, ONE), b.log_softmax(-1) - a.log_softmax(-1))
    assert (whole.double() - jacrev(lambda d: secant({"x": a}, {"x": b}, {"x": d}, ONE))(a)).abs().max() < 1e-6


def test_a_row_that_is_masked_everywhere_harms_no_other():
    x = normal(3, 4, seed=4)
    mask = torch.tensor([[True] * 4, [False] * 4, [True, False, True, False]])

    def attention(p, batch):
        scores = p["x"].masked_fill(mask, -INF)
        return torch.where(mask.all(-1, keepdim=True), 0.0, scores.softmax(-1)) * batch

    secant = Secant(attention, {"x": x}, ONE)
    slopes = jacrev(lambda d: secant({"x": x}, {"x": 2 * x}, {"x": d}, ONE))(x)
    assert torch.isfinite(slopes).all()
    algebra(secant({"x": x}, {"x": 2 * x}, {"x": x}, ONE), attention({"x": 2 * x}, ONE) - attention({"x": x}, ONE))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm, self.gru, self.out = nn.LSTM(3, 4, batch_first=True), nn.GRU(4, 4, batch_first=True), nn.Linear(4, 2)

    def forward(self, x):
        return self.out(self.gru(self.lstm(x)[0])[0][:, -1])


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.out = nn.Embedding(6, 8), nn.Linear(8, 3)
        self.encoder = nn.TransformerEncoderLayer(8, 2, 16, activation="gelu", batch_first=True, norm_first=True)

    def forward(self, x):
        return self.out(self.encoder(self.table(x)).mean(1))


class Masked(nn.Module):
    """Masks that are constants: a buffer, one that is made in the forward pass, and one that is not said to be causal."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 1, enable_nested_tensor=False)
        self.register_buffer("later", torch.ones(5, 5).triu(1).bool())

    def forward(self, x):
        padding = torch.tensor([[False, False, False, True, True]]).expand(len(x), 5)
        x = self.attention(x, x, x, attn_mask=self.later, key_padding_mask=padding)[0]
        x = self.attention(x, x, x, attn_mask=self.later, need_weights=False)[0]
        x = self.encoder(x, src_key_padding_mask=padding)
        return self.encoder(x, mask=nn.Transformer.generate_square_subsequent_mask(5)).sum(1)


MODELS = {
    "masked": (Masked, normal(3, 5, 8, seed=2)),
    "recurrent": (Recurrent, normal(3, 5, 3, seed=2)),
    "transformer": (Block, torch.arange(15).reshape(3, 5) % 6),
    "convolutional": (
        lambda: nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Dropout(0.3), nn.Linear(36, 3)
        ),
        normal(3, 1, 8, 8, seed=2),
    ),
    "perceptron": (lambda: nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)), normal(3, 4, seed=2)),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_model_for_every_row_of_a_batch_alone_and_transposed(name):
    make, x = MODELS[name]
    torch.manual_seed(0)
    model = make().eval().requires_grad_(False)
    a = dict(model.named_parameters())
    b = {n: p + 0.2 * torch.randn_like(p) for n, p in a.items()}
    change = {n: b[n] - a[n] for n in a}

    def single(p, row):
        return functional_call(model, dict(p), (row.unsqueeze(0),))[0]

    secant = Secant(single, a, x[0])
    want = model(x)
    algebra(vmap(lambda row: secant.pair(a, b, change, row).a)(x), want)
    want = functional_call(model, b, (x,)) - want
    algebra(vmap(lambda row: secant(a, b, change, row))(x), want, scale=1.0)
    gradients = vmap(jacrev(lambda d, row: secant(a, b, d, row)), (None, 0))(change, x)
    algebra(sum((gradients[n] * change[n]).flatten(2).sum(-1) for n in a), want, scale=1.0)


@pytest.mark.parametrize(
    ("function", "word"),
    [
        (lambda x: x.cumprod(0), "cumprod"),
        (lambda x: x[x > 0].sum() * x, "trace|index"),
        (lambda x: torch.where(x > 0, x, -INF).softmax(-1), "condition moves.*where"),
        (lambda x: x.masked_fill(x > 0, -INF).softmax(-1), "condition moves.*where"),
        (lambda x: x if x.sum() > 0 else -x, "trace"),
        (lambda x: x.topk(2).values, "topk"),
        (lambda x: torch.scatter(x, 1, torch.tensor([[0], [1]]), 2.0, reduce="add"), "reduce='add'.*scatter"),
        (lambda x: torch.scatter(x, 0, torch.tensor([[1, 0, 2, 3]]), 2.0, reduce="multiply"), "reduce='multiply'.*scatter"),
        (lambda x: x.t().contiguous().as_strided((4,), (1,)), "memory.*as_strided"),
        (lambda x: torch.div(x, 0.3, rounding_mode="floor"), "rounding_mode.*aten.div"),
        (lambda x: F.dropout(x, 0.5, training=True), "other values"),
        (lambda x: F.batch_norm(x, torch.zeros(4), torch.ones(4), training=True), "train mode"),
        (lambda x: F.embedding_bag(INDEX, x, mode="max"), "summed or averaged.*embedding_bag"),
        (lambda x: x.norm(3), "order 3.*linalg_vector_norm"),
        (lambda x: torch.linalg.inv(x[:3, :3]), "inv|lu|solve"),
    ],
)
def test_what_has_no_secant_is_refused_by_name(function, word):
    with pytest.raises(NoSecant, match=f"secant rule.*({word}).*rule='adaptive'"):
        Secant(lambda p, batch: function(p["x"]) * batch, {"x": normal(5, 4, seed=1)}, ONE)


def test_a_rule_that_is_wrong_about_its_arguments_is_refused_by_name(monkeypatch):
    def blind(op, x):  # right where the ends meet
        return x.elementwise(torch.sin, x.a.cos())

    monkeypatch.setitem(RULES, aten.sin, blind)
    with pytest.raises(NoSecant, match=r"not the difference between its ends.*aten.sin"):
        Secant(lambda p, batch: p["x"].exp().sin().cos() * batch, {"x": normal(5, 4, seed=1)}, ONE)


def test_operations_on_the_batch_alone_need_no_rule():
    x = normal(3, 4, seed=1)
    secant = Secant(lambda p, batch: p["x"] * batch.cumprod(0).sort(0).values, {"x": x}, x)
    algebra(secant({"x": x}, {"x": 2 * x}, {"x": x}, x), x * x.cumprod(0).sort(0).values)


def test_a_function_that_no_parameter_moves_stands_still():
    x = normal(3, seed=1)
    same(Secant(lambda p, batch: batch, {"x": x}, x)({"x": x}, {"x": 2 * x}, {"x": x}, x), torch.zeros(3))


def test_in_float32_as_in_float64():
    function, a, way, secant = case("layer norm")
    b = {n: a[n] + 0.01 * way[n] for n in a}
    exact = secant(a, b, way, ONE)
    low = [{n: t.float() for n, t in p.items()} for p in (a, b, way)]
    with torch.no_grad():
        found = Secant(function, low[0], ONE.float())(*low, ONE.float())
    assert found.dtype == torch.float32
    assert (found - exact).abs().max() <= 1e-4 * exact.abs().max()
    assert math.isfinite(float(found.sum()))
