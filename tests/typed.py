"""The checker of annotations at run time that the tests switch on for the kernel; see addopts in pyproject.toml."""

import inspect
from collections.abc import Callable
from typing import Any, get_args

import jaxtyping
from beartype import BeartypeConf, beartype

checked = beartype(conf=BeartypeConf(is_pep484_tower=True))  # an int is a float, as in static checking
of_shapes = jaxtyping.jaxtyped


def has_shapes(hint: Any) -> bool:
    return (inspect.isclass(hint) and issubclass(hint, jaxtyping.AbstractArray)) or any(map(has_shapes, get_args(hint)))


def jaxtyped(*, typechecker: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """jaxtyping's decorator, which costs every call, where a signature has shapes; elsewhere the types alone.

    Functions inside others have no shapes, and would be taken apart anew whenever they are defined.
    """

    def decorate(what: Any) -> Any:
        if not inspect.isfunction(what) or any(map(has_shapes, what.__annotations__.values())):
            return of_shapes(what, typechecker=typechecker)
        return what if "<locals>" in what.__qualname__ else typechecker(what)

    return decorate


jaxtyping.jaxtyped = jaxtyped  # which jaxtyping's hook writes above every function and class of the kernel
