"""Tasks: what can be trained and asked, by name."""

import dataclasses
import importlib
import typing
from collections.abc import Mapping

from explaind.config import checked, nearest
from explaind.errors import ConfigError
from explaind.tasks.digits import Digits
from explaind.tasks.measures import classification
from explaind.tasks.modular import ModularArithmetic
from explaind.tasks.pairs import Pairs
from explaind.tasks.task import Batch, Measure, Split, Task

__all__ = ["TASKS", "Batch", "Digits", "Measure", "ModularArithmetic", "Pairs", "Split", "Task", "classification", "load"]

TASKS: dict[str, type[Task]] = {"modular": ModularArithmetic, "digits": Digits, "pairs": Pairs}
"""The built-in tasks; any other is named ``package.module:Name``."""


def load(name: str, options: Mapping[str, object]) -> Task:
    """The task of that name with these options, or a ConfigError that says what to change."""
    kind = TASKS[name] if name in TASKS else _imported(name)
    if not (isinstance(kind, type) and dataclasses.is_dataclass(kind)):
        raise ConfigError("not a task", where=f"task {name}", expected="a frozen dataclass", got=repr(kind))
    lacking = [method for method in METHODS if not callable(getattr(kind, method, None))]
    if lacking:
        raise ConfigError("not a task", where=f"task {name}", expected=f"methods {', '.join(METHODS)}", got=f"none called {lacking[0]}")
    return typing.cast(Task, checked(kind, options, f"task {name}"))


METHODS = ("model", "data", "losses", "measures", "predict", "target", "describe", "outputs")
"""What the Task protocol asks for."""


def _imported(name: str) -> object:
    """What ``package.module:Name`` names."""
    path, colon, attribute = name.partition(":")
    if not (path and colon and attribute):
        raise ConfigError("unknown task", where="task name", expected=f"{nearest(name, TASKS)}, or package.module:Name", got=repr(name))
    try:
        module = importlib.import_module(path)
    except Exception as error:  # whatever a user's module raises while it is imported
        do = "check the spelling, and that its folder is on PYTHONPATH"
        raise ConfigError(
            "the task's module cannot be imported", where=f"task {name}", got=f"{type(error).__name__}: {error}", do=do
        ) from error
    if not hasattr(module, attribute):
        raise ConfigError(
            "the module has no such task", where=f"task {name}", expected=nearest(attribute, vars(module)), got=repr(attribute)
        )
    return getattr(module, attribute)
