"""Small named tables: what every analysis returns, and how it is kept."""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from explaind.errors import RequestError
from explaind.store import schema
from explaind.store.location import Location


@dataclass(frozen=True, eq=False)
class Table:
    """Columns of equal length, one row a measurement, with what is in them.

    name     of the analysis, which is also its file's
    formula  how the numbers are made, in words or symbols, with their unit
    source   where the quantity comes from (paper and equation), or "explaind"
    columns  {name: [row]}
    """

    name: str
    formula: str
    source: str
    columns: Mapping[str, np.ndarray]

    def __post_init__(self) -> None:
        lengths = {name: len(values) for name, values in self.columns.items()}
        if len(set(lengths.values())) > 1:
            raise RequestError("the columns of a table differ in length", where=self.name, got=lengths, do="give every row all columns")

    def __getitem__(self, column: str) -> np.ndarray:
        if column not in self.columns:
            raise RequestError(
                "no such column", where=self.name, expected=", ".join(self.columns), got=repr(column), do="name one of these"
            )
        return self.columns[column]

    def __len__(self) -> int:
        return len(next(iter(self.columns.values()), ()))

    def where(self, **equal: Any) -> "Table":
        """The rows in which these columns have these values."""
        chosen = np.ones(len(self), dtype=bool)
        for column, value in equal.items():
            chosen &= self[column] == value
        return Table(self.name, self.formula, self.source, {name: values[chosen] for name, values in self.columns.items()})

    def grid(self, rows: str, columns: str, values: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """One column as a matrix: (names of its rows, names of its columns, [row, column]); each pair must stand once."""
        names, places = zip(*(_places(self[axis]) for axis in (rows, columns)), strict=True)
        if len(self) != len(names[0]) * len(names[1]) or len(set(zip(*(p.tolist() for p in places), strict=True))) != len(self):
            raise RequestError(
                "the rows of a table do not make a grid", where=self.name, got=f"{rows} × {columns}", do="choose rows with where() first"
            )
        matrix = np.empty((len(names[0]), len(names[1])), dtype=self[values].dtype)
        matrix[places[0], places[1]] = self[values]
        return names[0], names[1], matrix

    def write(self, folder: Location) -> Location:
        """The columns as ``name.csv``; numbers keep all their digits. StoreError when it cannot be written."""
        path = folder / f"{self.name}.csv"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            file = io.StringIO(newline="")
            writer = csv.writer(file)
            writer.writerow(self.columns)
            writer.writerows(zip(*(values.tolist() for values in self.columns.values()), strict=True))
            path.write_bytes(file.getvalue().encode())
        except OSError as error:
            raise schema.unwritable(path, error) from error
        return path

    def about(self) -> dict[str, Any]:
        """What is in the table, for JSON."""
        return {"rows": len(self), "columns": list(self.columns), "formula": self.formula, "source": self.source}


def stacked(tables: Sequence[Table], **labels: Sequence[Any]) -> Table:
    """Tables of one kind below each other, with columns before theirs that tell them apart, such as seed=(0, 1, 2)."""
    first = tables[0]
    columns = {label: np.repeat(np.asarray(values), [len(t) for t in tables]) for label, values in labels.items()}
    columns |= {name: np.concatenate([t[name] for t in tables]) for name in first.columns}
    return Table(first.name, first.formula, first.source, columns)


def markdown(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table as Markdown, as the READMEs of the studies have them."""
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in (head, ["---"] * len(head), *rows))


def _places(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The distinct values in the order in which they first come, and where each value stands among them."""
    names, first, inverse = np.unique(values, return_index=True, return_inverse=True)
    order = np.argsort(first)
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    return names[order], rank[inverse]


def tabulated(name: str, source: str, formula: str, rows: Sequence[Mapping[str, Any]]) -> Table:
    """A table of rows that all have the same columns; RequestError where there is none."""
    if not rows:
        raise RequestError("nothing to tabulate", where=name, do="name at least one donor")
    return Table(name, formula, source, {column: np.array([row[column] for row in rows]) for column in rows[0]})
