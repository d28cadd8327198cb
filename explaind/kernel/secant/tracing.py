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
from torch.overrides import TorchFunctionMode

from explaind.kernel.secant.rules import NoSecant

Flat = Callable[..., Tensor]
"""(*tensors) -> Tensor."""

aten = torch.ops.aten
TURNS = (aten.t.default, aten.permute.default, aten.transpose.int)
"""What the transpose of a matrix may be written as."""
WHOLE = ("logsumexp", "_safe_softmax", "var", "leaky_relu", "silu", "softplus", "hardswish", "hardsigmoid", "mish", "selu", "celu")
"""Operations that have a secant of their own and are not taken apart."""


class _OneHot(TorchFunctionMode):
    """one_hot without its look at the values, which no graph can hold."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.one_hot:
            return _one_hot(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _one_hot(index: Tensor, num_classes: int = -1) -> Tensor:
    if num_classes < 0:
        raise NoSecant("one_hot without a number of classes depends on values", do="give num_classes")
    return (index.unsqueeze(-1) == torch.arange(num_classes, device=index.device)).long()


@contextmanager
def _taken_apart() -> Iterator[None]:
    """Without oneDNN, which would hold a whole LSTM as one operation."""
    before = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(False)
    try:
        yield
    finally:
        torch._C._set_mkldnn_enabled(before)


def traced(function: Flat, examples: Sequence[Tensor], parameters: int) -> fx.GraphModule:
    """The graph of function(*examples), without in-place operations; NoSecant where there is none. The first examples are parameters."""
    table = {op: how for op, how in core_aten_decompositions().items() if op._schema.name.removeprefix("aten::") not in WHOLE}
    try:
        with torch.no_grad(), _OneHot(), _taken_apart():
            graph = make_fx(function, decomposition_table=table)(*examples)
            graph = make_fx(functionalize(graph, remove="mutations"))(*examples)
    except NoSecant:
        raise
    except Exception as error:  # whatever stops the tracer (branches on values, mostly) stops this rule alone
        why = str(error).strip().splitlines()[0][:160]
        raise NoSecant(
            "the secant rule cannot trace the model",
            got=why,
            do="use rule='auto', which falls back to the adaptive rule, or rule='adaptive'",
        ) from error
    _restore_linear(graph.graph, parameters)
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return graph


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
