"""Configurations: one TOML file a run, read into frozen dataclasses.

Defaults, file and command-line overrides meet in one plain mapping, which then takes one way through the same checks: unknown
keys and wrong types raise a ConfigError that names the place, the key and the nearest valid key.
"""

import difflib
import os
import re
import tomllib
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, Field, asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from explaind.errors import ConfigError

T = TypeVar("T")
UNITS = {"B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}
"""Of amounts of memory, in bytes."""


@dataclass(frozen=True)
class Named:
    """Something chosen by name, with options of its own: every key but `name`."""

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Train:
    """The training loop.

    steps      optimizer steps
    batch      examples per step, drawn without replacement epoch by epoch; 0: all of them at every step
    reduction  how the loss reduces a batch
    warmup     steps over which the learning rate rises linearly to its value; 0: none
    seed       of the initial model and of the batches
    threads    of torch; 0: torch's own choice
    device     where the model is trained
    codec      of the record, as in ``explaind.record``
    thin       steps between two stored states, or "sqrt" for the root of `steps`; 0: every state is stored
    gradients  of single examples: made when they are asked for, or stored while training; then in which dtype, and in how many bytes
    """

    steps: int
    batch: int = 0
    reduction: Literal["mean", "sum"] = "mean"
    warmup: int = 0
    seed: int = 0
    threads: int = 0
    device: str = "cpu"
    codec: Literal["bitdelta", "standard"] = "bitdelta"
    thin: int | Literal["sqrt"] = 0
    gradients: Literal["recompute", "store"] = "recompute"
    gradient_dtype: Literal["", "float16", "float32", "float64"] = ""
    gradient_budget: str | int = "8GiB"


@dataclass(frozen=True)
class Decompose:
    """What is asked of the run: the arguments of ``explaind.decompose``, with queries and measure by name.

    groups     of kept axes, whose members are told together: a table of names and members for each axis (patterns of layers, ids of
               examples, places of queries and outputs), "target" for the classes of examples and queries, "module" or "task" for layers
    queries    SPLIT, SPLIT:INDEX or SPLIT:START:STOP, such as val:0:16
    measure    one of the task's measures; "": its first
    budget     GiB that the result may take
    memory     to work in, such as 512MiB, 2GiB, 1.5GB or a number of bytes; "": 2GiB, or what a single query takes
    """

    queries: str = "val"
    measure: str = ""
    keep: tuple[str, ...] = ("query", "example", "layer")
    groups: Mapping[str, Any] = field(default_factory=dict)
    rule: str = "auto"
    tol: float = 1e-3
    dtype: Literal["float64", "float32"] = "float64"
    device: str = "cpu"
    tf32: bool = False
    view: Literal["seen", "applied"] = "seen"
    windows: int = 1
    products: Literal["auto", "materialise", "ghost", "jvp", "stored"] = "auto"
    closure: Literal["none", "discrete-gradient"] = "none"
    budget: float = 4.0
    memory: str | int = ""


@dataclass(frozen=True)
class Report:
    """Figures: how many predictions get their own, how many examples are named, and the resolution in dots per inch."""

    predictions: int = 3
    examples: int = 10
    dpi: int = 120


@dataclass(frozen=True)
class Config:
    """A complete run, table by table."""

    task: Named
    train: Train
    optimizer: Named
    decompose: Decompose = Decompose()
    report: Report = Report()
    gradient_filter: Named | None = None
    """Between the backward pass and the optimizer: GrokfastEMA or GrokfastMA, with its options."""

    def to_json(self) -> dict[str, Any]:
        """The resolved configuration, defaults included; ``resolved`` reads it back."""
        plain = asdict(self)
        for table in ("task", "optimizer", "gradient_filter"):
            if plain[table] is not None:
                plain[table] = {"name": plain[table]["name"], **plain[table]["options"]}
        return plain

    def of_training(self) -> dict[str, Any]:
        """The tables that make a training, without what is asked of it afterwards."""
        return {name: table for name, table in self.to_json().items() if name not in ("decompose", "report")}


class Text(typing.Protocol):
    """A file somewhere."""

    def read_text(self) -> str: ...


def read(path: str | os.PathLike[str] | Text, overrides: Sequence[str] = ()) -> Config:
    """A TOML file with overrides such as ("--train.steps", "500") put over it."""
    file: Text = Path(path) if isinstance(path, str | os.PathLike) else path
    try:
        table = tomllib.loads(file.read_text())
    except OSError as error:
        raise ConfigError("cannot read the configuration", where=path, got=error.strerror, do="check the path") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError("the configuration is not TOML", where=path, got=error, do="correct the line") from error
    overridden(table, overrides)
    return resolved(table, str(path))


def resolved(table: Mapping[str, Any], where: str) -> Config:
    """Check a whole configuration; `where` names the file or the run that it is from."""
    known = [f.name for f in fields(Config)]
    table = {name: value for name, value in table.items() if value is not None}
    for name, value in table.items():
        if name not in known:
            raise ConfigError("unknown table in the configuration", where=where, expected=nearest(name, known), got=f"[{name}]")
        if not isinstance(value, Mapping):
            raise ConfigError("a table is wanted here", where=f"{where}: {name}", expected=f"[{name}]", got=repr(value))
    for name in ("task", "train", "optimizer"):
        if name not in table:
            raise ConfigError("a table is missing from the configuration", where=where, expected=f"[{name}]", do="add it")
    return Config(
        named(table["task"], f"{where}: task"),
        checked(Train, table["train"], f"{where}: train"),
        named(table["optimizer"], f"{where}: optimizer"),
        checked(Decompose, table.get("decompose", {}), f"{where}: decompose"),
        checked(Report, table.get("report", {}), f"{where}: report"),
        named(table["gradient_filter"], f"{where}: gradient_filter") if "gradient_filter" in table else None,
    )


def named(table: Mapping[str, Any], where: str) -> Named:
    """{name, …options} as a Named; whoever knows the name checks the options."""
    name = table.get("name")
    if not isinstance(name, str):
        raise ConfigError("a name is wanted", where=where, expected="name = a string", got=repr(name))
    return Named(name, {key: value for key, value in table.items() if key != "name"})


def overridden(table: dict[str, Any], tokens: Sequence[str]) -> None:
    """Put command-line overrides ``--table.key value`` or ``--table.key=value`` into a configuration."""
    words = list(tokens)
    while words:
        option, equals, value = words.pop(0).partition("=")
        name, dot, key = option.removeprefix("--").partition(".")
        if not option.startswith("--") or not dot or not name or not key:
            known = ", ".join(f.name for f in fields(Config))
            raise ConfigError("unknown argument", expected=f"--table.key value, with a table out of {known}", got=repr(option))
        if not equals:
            if not words:
                raise ConfigError("an override lacks its value", expected=f"{option} VALUE", got="nothing after it")
            value = words.pop(0)
        inner = table.setdefault(name, {})
        if not isinstance(inner, dict):
            raise ConfigError("an override names something that is not a table", where=option, got=repr(inner))
        inner[key] = literal(value)


def literal(text: str) -> Any:
    """A value as TOML reads it, or else the text itself: 500, 1e-3, true, [0.9, 0.98], add."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def bytes_of(amount: str | int, where: str) -> int:
    """An amount of memory, as a number of bytes or with a unit."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", str(amount).strip())
    number, unit = found.groups() if found else ("0", "")
    size = float(number) * UNITS.get(unit or "B", 0)
    if size < 1:
        units = ", ".join(UNITS)
        raise ConfigError("not an amount of memory", where=where, expected=f"a number and one of {units}, such as 2GiB", got=repr(amount))
    return int(size)


def checked(kind: type[T], table: Mapping[str, Any], where: str) -> T:
    """Build a dataclass from a table; ConfigError for unknown keys, wrong types and missing keys."""
    if not is_dataclass(kind):
        raise ConfigError("not a table", where=where, expected="a frozen dataclass", got=repr(kind))
    known = {f.name: f for f in fields(kind) if f.init}
    hints = typing.get_type_hints(kind)
    values = {}
    for key, value in table.items():
        if key not in known:
            raise ConfigError("unknown key", where=where, expected=nearest(key, known), got=repr(key), do="correct the spelling or drop it")
        values[key] = _converted(value, hints[key])
        if not _fits(values[key], hints[key]):
            raise ConfigError("wrong type or value", where=f"{where}.{key}", expected=_words(hints[key]), got=repr(value))
    missing = [f.name for f in known.values() if _required(f) and f.name not in table]
    if missing:
        raise ConfigError("missing key", where=where, expected=", ".join(missing), do="set it")
    return kind(**values)


def nearest(word: str, known: Iterable[str]) -> str:
    """The closest known word, or else all of them that are public."""
    public = [name for name in known if not name.startswith("_")]
    close = difflib.get_close_matches(word, public, n=1)
    return close[0] if close else "one of " + ", ".join(public)


def _required(f: "Field[Any]") -> bool:
    return f.default is MISSING and f.default_factory is MISSING


def _converted(value: Any, kind: object) -> Any:
    """TOML's lists become tuples where tuples are written; on a command line their parts are separated by commas."""
    if typing.get_origin(kind) is not tuple:
        return value
    if isinstance(value, str):
        return tuple(part.strip() for part in value.split(",") if part.strip())
    return tuple(value) if isinstance(value, list) else value


def _fits(value: object, kind: object) -> bool:
    """Whether a value may stand where `kind` is written; True is no number, an int will do for a float."""
    if typing.get_origin(kind) is Literal:
        return any(value == choice and type(value) is type(choice) for choice in typing.get_args(kind))
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return any(_fits(value, choice) for choice in typing.get_args(kind))
    if typing.get_origin(kind) is tuple:
        return isinstance(value, tuple) and all(_fits(item, typing.get_args(kind)[0]) for item in value)
    if isinstance(value, bool):
        return kind in (bool, object, Any)
    if kind is float:
        return isinstance(value, int | float)
    plain = typing.get_origin(kind) or kind
    return plain is Any or (isinstance(plain, type) and isinstance(value, plain))


def _words(kind: object) -> str:
    """A type as a reader would say it: "relu | gelu", "int | None", "list of str"."""
    choices = typing.get_args(kind)
    if typing.get_origin(kind) is Literal:
        return " | ".join(map(str, choices))
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return " | ".join(map(_words, choices))
    if typing.get_origin(kind) is tuple:
        return f"list of {_words(choices[0])}"
    return "None" if kind is type(None) else getattr(kind, "__name__", str(kind))
