"""What the package must know of an optimizer class; one file and one registry line each."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

from torch import Tensor
from torch.optim import Optimizer

from explaind.errors import RuleError
from explaind.rules.filter import Filter


class Moment(NamedTuple):
    """One update of one parameter tensor, as the optimizer has just made it."""

    kept: Tensor | None
    """The parameter before the update, where ``Rule.reads_theta`` asks for it."""
    gradient: Tensor
    """As the optimizer consumed it: before its own sign and coupled decay."""
    before: Mapping[str, Tensor]
    """Copies of the state that ``Rule.remembers`` names, from before the update; without what was not there yet."""
    state: Mapping[str, Any]
    """After the update."""
    group: Mapping[str, Any]

    @property
    def theta(self) -> Tensor:
        """The parameter before the update; RuleError where it was not kept."""
        if self.kept is None:
            raise RuleError("the rule reads the parameters before an update, but says that it does not", do="set reads_theta = True")
        return self.kept


@dataclass(frozen=True)
class Facts:
    """What was recorded of one update of one parameter tensor."""

    options: Mapping[str, float]
    """The numbers of ``Rule.read``."""
    age: int = 0
    """Updates that the parameter had before."""
    scalars: Mapping[str, float] = field(default_factory=dict)
    """The numbers of ``Rule.facts``."""
    frozen: Tensor | None = None
    """The tensor of ``Rule.frozen``, in the shape of the parameter."""

    @property
    def tensor(self) -> Tensor:
        """The frozen tensor; RuleError where none was recorded."""
        if self.frozen is None:
            raise RuleError("the rule needs its second moment to rebuild a step", expected="a recorded preconditioner", got="none")
        return self.frozen

    @property
    def sign(self) -> float:
        """−1 where the optimizer maximizes."""
        return -1.0 if self.options.get("maximize") else 1.0


class Rule(ABC):
    """How one optimizer class steps, as a filter of gradients (``Filter``): subclass, and give an instance to ``register``."""

    optimizer: type[Optimizer]
    """The class whose ``step`` the rule describes; subclasses that keep that ``step`` are covered."""
    options: ClassVar[tuple[str, ...]]
    """Names of the numbers that ``read`` returns, stored per step and parameter group."""
    momentum: ClassVar[str | None] = None
    """Key of z in the optimizer's state of a parameter; None where the optimizer has none."""
    frozen_state: ClassVar[str | None] = None
    """What ``frozen`` is, in words; None where no tensor need be stored."""
    scalars: ClassVar[tuple[str, ...]] = ()
    """Names of the numbers that ``facts`` returns, stored per step and parameter tensor."""
    rounding: ClassVar[float] = 0.0
    """How far, relative to an update, the optimizer's own arithmetic may be from the filter, where that is coarser than float32."""
    remembers: ClassVar[tuple[str, ...]] = ()
    """Keys of the state that is copied before every step, for ``frozen`` and ``facts``."""

    reads_theta: ClassVar[bool] = True
    """Whether ``frozen`` or ``facts`` look at ``Moment.theta``: a copy of the parameters is kept for that."""

    def read(self, group: Mapping[str, Any]) -> tuple[float, ...]:
        """The options of a parameter group, as they stand at this step; RuleError for one that has no rule."""
        return numbers(group, self.options)

    def age(self, state: Mapping[str, Any]) -> int:
        """How many updates this parameter had before this step, from the optimizer's state before the step."""
        return int(state["step"]) if "step" in state else 0

    def frozen(self, moment: Moment) -> Tensor | None:
        """The tensor to store of an update, in the shape of the parameter: its preconditioner, or what that is made of."""
        return None

    def facts(self, moment: Moment) -> tuple[float, ...]:
        """The numbers to store of an update."""
        return ()

    @abstractmethod
    def filter(self, facts: Facts) -> Filter:
        """The coefficients of an update, from what was recorded of it."""


def numbers(group: Mapping[str, Any], keys: Iterable[str]) -> tuple[float, ...]:
    """Values of a parameter group as plain floats (learning rates may be tensors, flags become 0 or 1)."""
    return tuple(float(group[key]) for key in keys)
