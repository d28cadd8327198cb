"""A function of parameters and a batch, written down as a graph of ATen operations."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx
from torch._decomp import core_aten_decompositions
from torch.func import functionalize
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F
from torch.nn.modules import transformer
from torch.overrides import TorchFunctionMode

from explaind.kernel.secant.rules import NoSecant, refuse

Flat = Callable[..., Tensor]
"""(*tensors) -> Tensor."""

aten = torch.ops.aten
TURNS = (aten.t.default, aten.permute.default, aten.transpose.int)
"""What the transpose of a matrix may be written as."""
WHOLE = ("logsumexp", "_safe_softmax", "var", "leaky_relu", "silu", "softplus", "hardswish", "hardsigmoid", "mish", "selu", "celu")
"""Operations that have a secant of their own and are not taken apart."""


class _WrittenOut(TorchFunctionMode):
    """Functions that look at values, or hold their result in a way that no rule is for, by others that give the same."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return WRITTEN.get(func, func)(*args, **(kwargs or {}))


def _one_hot(index: Tensor, num_classes: int = -1) -> Tensor:
    if num_classes < 0:
        raise NoSecant("one_hot without a number of classes depends on values", do="give num_classes")
    return (index.unsqueeze(-1) == torch.arange(num_classes, device=index.device)).long()


def _bilinear(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    whole = torch.einsum("...i,oij,...j->...o", x, weight, y)
    return whole if bias is None else whole + bias


def _embedding_bag(index: Tensor, weight: Tensor, offsets: Any = None, max_norm: Any = None, *args: Any, **kwargs: Any) -> Tensor:
    """Bags as rows of the index, whose embeddings are summed or averaged."""
    names = ("norm_type", "scale_grad_by_freq", "mode", "sparse", "per_sample_weights", "include_last_offset", "padding_idx")
    given = dict(zip(names, args, strict=False)) | kwargs
    mode, factors, padding = given.get("mode", "mean"), given.get("per_sample_weights"), given.get("padding_idx")
    if index.ndim != 2 or max_norm is not None or mode == "max":
        raise refuse("embedding_bag", "it has a rule for bags of two dimensions, summed or averaged, without max_norm")
    rows = F.embedding(index, weight) if factors is None else F.embedding(index, weight) * factors.unsqueeze(-1)
    if padding is None:
        return rows.sum(1) if mode == "sum" else rows.mean(1)
    held = (index != padding % len(weight)).to(rows.dtype).unsqueeze(-1)
    whole = (rows * held).sum(1)
    return whole if mode == "sum" else whole / held.sum(1).clamp(min=1.0)


WRITTEN: dict[Any, Any] = {F.one_hot: _one_hot, F.bilinear: _bilinear, F.embedding_bag: _embedding_bag}


@contextmanager
def _taken_apart() -> Iterator[None]:
    """Without oneDNN, which would hold a whole LSTM as one operation, and without a look at whether an attention mask is causal.

    A causal mask is then applied as any other.
    """
    before, detect = torch._C._get_mkldnn_enabled(), transformer._detect_is_causal_mask
    torch._C._set_mkldnn_enabled(False)
    transformer._detect_is_causal_mask = lambda mask, is_causal=None, size=None: bool(is_causal)
    try:
        yield
    finally:
        transformer._detect_is_causal_mask = detect
        torch._C._set_mkldnn_enabled(before)


def traced(function: Flat, examples: Sequence[Tensor], parameters: int) -> fx.GraphModule:
    """The graph of function(*examples), without in-place operations; NoSecant where there is none. The first examples are parameters."""
    table = {op: how for op, how in core_aten_decompositions().items() if op._schema.name.removeprefix("aten::") not in WHOLE}
    try:
        with torch.no_grad(), _WrittenOut(), _taken_apart():
            graph = make_fx(function, decomposition_table=table)(*examples)
            constants = _taken_out(graph)
            graph = make_fx(functionalize(graph, remove="mutations"))(*examples, *constants)
    except NoSecant:
        raise
    except Exception as error:  # whatever stops the tracer (branches on values, mostly) stops this rule alone
        why = str(error).strip().splitlines()[0][:160]
        raise NoSecant(
            "the secant rule cannot trace the model",
            got=why,
            do="use rule='auto', which falls back to the adaptive rule, or rule='adaptive'",
        ) from error
    _put_back(graph, constants)
    _restore_linear(graph.graph, parameters)
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return graph


def _taken_out(graph: fx.GraphModule) -> list[Tensor]:
    """The graph's constants, which become its last inputs: functionalize follows what is written into its inputs alone."""
    nodes = graph.graph.nodes
    found: dict[str, fx.Node] = {}
    for node in [n for n in nodes if n.op == "get_attr" and isinstance(getattr(graph, n.target), Tensor)]:
        if node.target not in found:
            with graph.graph.inserting_after([n for n in nodes if n.op == "placeholder"][-1]):
                found[node.target] = graph.graph.placeholder(node.target.strip("_"))
        node.replace_all_uses_with(found[node.target])
        graph.graph.erase_node(node)
    graph.recompile()
    return [getattr(graph, name) for name in found]


def _put_back(graph: fx.GraphModule, constants: Sequence[Tensor]) -> None:
    """The last inputs become constants again, which no run of the graph writes to."""
    inputs = [n for n in graph.graph.nodes if n.op == "placeholder"]
    for i, (node, constant) in enumerate(zip(inputs[len(inputs) - len(constants) :], constants, strict=True)):
        for written in [n for n in node.users if n.target is aten.copy_.default and n.args[0] is node]:
            graph.graph.erase_node(written)
        graph.register_buffer(f"constant_{i}", constant)
        with graph.graph.inserting_before(node):
            node.replace_all_uses_with(graph.graph.get_attr(f"constant_{i}"))
        graph.graph.erase_node(node)


def _restore_linear(graph: fx.Graph, parameters: int) -> None:
    """x @ Wᵀ (+ c) with W a parameter becomes one call of ``F.linear`` again, as the user wrote it."""
    weights = [node for node in graph.nodes if node.op == "placeholder"][:parameters]
    for node in graph.nodes:
        if node.op != "call_function" or node.target not in (aten.mm.default, aten.addmm.default) or node.kwargs:
            continue
        turned = node.args[-1]
        if turned.target in TURNS and turned.args[0] in weights:
            node.args = (node.args[-2], turned.args[0], *node.args[:-2])
            node.target = F.linear


def last_uses(graph: fx.Graph) -> Mapping[fx.Node, list[fx.Node]]:
    """Which values are done with after a node."""
    gone: dict[fx.Node, list[fx.Node]] = {}
    seen: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        for used in node.all_input_nodes:
            if used not in seen:
                seen.add(used)
                gone.setdefault(node, []).append(used)
    return gone
