"""The kernel's annotations are checked while the tests run."""

import pytest
import torch
from beartype.roar import BeartypeCallHintParamViolation
from jaxtyping import TypeCheckError

from explaind.kernel.path import Segment
from explaind.kernel.whole import some_at_a_time, some_of


def test_a_shape_that_a_function_does_not_take_is_refused():
    with pytest.raises(TypeCheckError, match="some_at_a_time"):
        some_at_a_time(3, torch.zeros(2, 2), 1)


def test_shapes_of_a_dataclass_are_held_against_one_another():
    with pytest.raises(TypeCheckError, match="after"):
        Segment(torch.zeros(2), torch.zeros(3), torch.zeros(1), torch.zeros(1))


def test_a_type_that_a_function_without_shapes_does_not_take_is_refused():
    with pytest.raises(BeartypeCallHintParamViolation, match="some_of"):
        some_of("a part", slice(1))
