"""Tasks: what can be trained and asked, by name."""

import dataclasses
import difflib
import importlib
import types
import typing
from collections.abc import Iterable, Mapping

from explaind.errors import ConfigError
from explaind.tasks.digits import Digits
from explaind.tasks.measures import classification
from explaind.tasks.modular import ModularArithmetic
from explaind.tasks.task import Batch, Measure, Split, Task

__all__ = ["TASKS", "Batch", "Digits", "Measure", "ModularArithmetic", "Split", "Task", "classification", "load"]

TASKS: dict[str, type[Task]] = {"modular": ModularArithmetic, "digits": Digits}
"""The built-in tasks; any other is named ``package.module:Name``."""


def load(name: str, options: Mapping[str, object]) -> Task:
    """The task of that name with these options, or a ConfigError that says what to change."""
    kind = TASKS[name] if name in TASKS else _imported(name)
    if not (isinstance(kind, type) and dataclasses.is_dataclass(kind)):
        raise ConfigError("not a task", where=f"task {name}", expected="a frozen dataclass", got=repr(kind))
    fields = {field.name: field for field in dataclasses.fields(kind) if field.init}
    types_of = typing.get_type_hints(kind)
    for option, value in options.items():
        if option not in fields:
            raise ConfigError("unknown option", where=f"task {name}", expected=_nearest(option, fields), got=repr(option))
        if not _fits(value, types_of[option]):
            raise ConfigError("wrong type or value", where=f"{name}.{option}", expected=_words(types_of[option]), got=repr(value))
    missing = [field.name for field in fields.values() if _is_required(field) and field.name not in options]
    if missing:
        raise ConfigError("missing option", where=f"task {name}", expected=", ".join(missing), do="set it in the [task] table")
    return typing.cast(Task, kind(**options))


def _imported(name: str) -> object:
    """What ``package.module:Name`` names."""
    path, colon, attribute = name.partition(":")
    if not (path and colon and attribute):
        raise ConfigError("unknown task", where="task name", expected=f"{_nearest(name, TASKS)}, or package.module:Name", got=repr(name))
    try:
        module = importlib.import_module(path)
    except (ImportError, ValueError) as error:
        do = "check the spelling, and that its folder is on PYTHONPATH"
        raise ConfigError("the task's module cannot be imported", where=f"task {name}", got=str(error), do=do) from error
    if not hasattr(module, attribute):
        raise ConfigError(
            "the module has no such task", where=f"task {name}", expected=_nearest(attribute, vars(module)), got=repr(attribute)
        )
    return getattr(module, attribute)


def _nearest(word: str, known: Iterable[str]) -> str:
    """The closest known word, or else all of them that are public."""
    public = [name for name in known if not name.startswith("_")]
    close = difflib.get_close_matches(word, public, n=1)
    return close[0] if close else "one of " + ", ".join(public)


def _is_required(field: dataclasses.Field) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _fits(value: object, kind: object) -> bool:
    """Whether a value read from a file may stand where ``kind`` is written; True is no number, an int will do for a float."""
    if typing.get_origin(kind) is typing.Literal:
        return any(value == choice and type(value) is type(choice) for choice in typing.get_args(kind))
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return any(_fits(value, choice) for choice in typing.get_args(kind))
    if isinstance(value, bool):
        return kind in (bool, object, typing.Any)
    if kind is float:
        return isinstance(value, int | float)
    plain = typing.get_origin(kind) or kind
    return plain is typing.Any or (isinstance(plain, type) and isinstance(value, plain))


def _words(kind: object) -> str:
    """A type as a reader would say it: "relu | gelu", "int | None"."""
    choices = typing.get_args(kind)
    if typing.get_origin(kind) is typing.Literal:
        return " | ".join(map(str, choices))
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return " | ".join(map(_words, choices))
    return "None" if kind is type(None) else getattr(kind, "__name__", str(kind))
