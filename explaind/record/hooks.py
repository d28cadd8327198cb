"""What is hung on a model while it is recorded must not get in the way of who copies or saves the model."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any


class Hook:
    """A function that torch calls. Its copy, in a model that is copied or pickled, does nothing; to be read it needs Python alone."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._function(*args, **kwargs)

    def __reduce_ex__(self, protocol: object) -> tuple[Any, ...]:
        return getattr, (nullcontext(), "__exit__")  # which takes anything and returns None
