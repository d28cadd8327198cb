"""The secant linearisation of a function of the parameters between two ends of a step.

The function is traced to primitive operations, and each operation's secant rule is put in its place. What comes out is linear in the
change of the parameters and, for the change b − a itself, equals h(b) − h(a) exactly, by induction over the operations. torch's own
reverse pass through it is the transpose: the gradient ḡ of the secant path rule (theory.md section 2).
"""

import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg
from torch.utils._pytree import tree_flatten

from explaind.kernel.gradients import alike
from explaind.kernel.points import Function
from explaind.kernel.secant import branching, elementwise, moving, normalising, products, selecting
from explaind.kernel.secant.checking import Checked, made_up
from explaind.kernel.secant.pair import Pair, at, has_pair
from explaind.kernel.secant.rules import RULES, refuse
from explaind.kernel.secant.tracing import last_uses, traced

Parameters = Mapping[str, Tensor]
ROOMS = (branching, elementwise, moving, normalising, products, selecting)
"""Importing them is what fills RULES."""

COMPARES = {getattr(torch.ops.aten, name) for name in ("eq", "ne", "gt", "lt", "ge", "le")}
SHAPED = {getattr(torch.ops.aten, name) for name in ("full_like", "zeros_like", "ones_like", "new_zeros", "new_full", "new_ones")}
"""Operations that take only the shape of what they are given."""
VIEWS: Mapping[Any, Any] = dict.fromkeys((torch.ops.aten.view.default, torch.ops.aten._unsafe_view.default), torch.ops.aten.reshape.default)
"""The rules may lay numbers out in another way than the operations that they stand for."""
MASKS = {torch.ops.aten.isinf, torch.ops.aten.isnan, torch.ops.aten.isfinite}


def _is_mask(op: Any, args: Any) -> bool:
    """Whether an operation only asks where the masks are: a comparison with infinity, which no finite step of the parameters changes."""
    kind = getattr(op, "overloadpacket", None)
    return kind in MASKS or (kind in COMPARES and isinstance(args[1], float) and args[1] in (float("inf"), float("-inf")))


def _result(value: Any) -> Pair:
    """What the graph returns; a value that no parameter moves stands still."""
    (value,) = value if isinstance(value, (list, tuple)) else (value,)
    return value if isinstance(value, Pair) else Pair(value, value, torch.zeros_like(value))


class Secant:
    """The secant of one function, for batches of the shapes of the one that it was traced with."""

    def __init__(self, function: Function, parameters: Parameters, batch: Any) -> None:
        """Raises NoSecant for an operation without a rule, naming it."""
        self.names = tuple(parameters)
        leaves, self._spec = tree_flatten(batch)
        self._tensors = tuple(i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor))

        def flat(*tensors: Tensor) -> Tensor:
            own = list(leaves)
            for i, tensor in zip(self._tensors, tensors[len(self.names) :], strict=True):
                own[i] = tensor
            return function(dict(zip(self.names, tensors, strict=False)), self._spec.unflatten(own))

        start = {name: parameters[name].detach() for name in self.names}
        self._graph: GraphModule = traced(flat, [*start.values(), *(leaves[i] for i in self._tensors)], len(start))
        self._frees = last_uses(self._graph.graph)
        with torch.no_grad():
            self._check(function, start, batch)

    def _check(self, function: Function, start: Parameters, batch: Any) -> None:
        end = made_up(start)
        pair = self._run(Checked(self._value), start, end, {n: end[n] - start[n] for n in start}, batch)
        for value, whole in ((pair.a, function(start, batch)), (pair.b, function(end, batch))):
            if whole.isfinite().all() and not (value.shape == whole.shape and alike(value, whole)):
                raise refuse("the traced function", "its graph gives other values than the function itself")

    def pair(self, start: Parameters, end: Parameters, change: Parameters, batch: Any) -> Pair:
        """h at both ends, and its change for any change of the parameters."""
        return self._run(self._value, start, end, change, batch)

    def _run(self, value: Callable[..., Any], start: Parameters, end: Parameters, change: Parameters, batch: Any) -> Pair:
        leaves = tree_flatten(batch)[0]
        given = [Pair(start[n], end[n], change[n]) for n in self.names] + [leaves[i] for i in self._tensors]
        values: dict[Node, Any] = {}
        for node in self._graph.graph.nodes:
            if node.op == "placeholder":
                values[node] = given.pop(0)
            elif node.op == "get_attr":
                values[node] = getattr(self._graph, node.target)
            else:
                args, kwargs = (map_arg(v, values.__getitem__) for v in (node.args, node.kwargs))
                if node.op == "output":
                    return _result(args[0])
                values[node] = value(node, args, kwargs)
            for done in self._frees.get(node, ()):
                del values[done]
        raise AssertionError("a graph ends with its output")

    def _value(self, node: Node, args: Any, kwargs: Any) -> Any:
        op: Any = VIEWS.get(node.target, node.target)
        if op is operator.getitem:
            value = args[0][args[1]]
            if value is None:
                raise refuse(node.args[0], "it has several outputs, and one without a secant rule is used")
            return value
        kind = getattr(op, "overloadpacket", op)
        if kind in SHAPED or _is_mask(op, args):
            args = at(args, "a")
        if not has_pair(args):
            return op(*args, **kwargs)
        if kind not in RULES:
            raise refuse(op)
        return RULES[kind](op, *args, **kwargs)

    def __call__(self, start: Parameters, end: Parameters, change: Parameters, batch: Any) -> Tensor:
        """The change of h that the secant linearisation between `start` and `end` makes of a change of the parameters."""
        return self.pair(start, end, change, batch).d
