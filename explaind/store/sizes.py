"""How large a run will be on disk, from a short recording of the same training."""

from explaind.store.layout import columns, rows
from explaind.store.location import size_of
from explaind.store.reader import Run
from explaind.store.schema import Column


def foretold(run: Run, steps: int, block: int) -> int:
    """Bytes of the files of a run of so many steps with an anchor every `block` of them; its ledgers are not counted.

    run  the first steps of such a training, with at least two anchors where those differ: the first one's optimizer has no state yet
    """
    growing, known = 0.0, 0
    for name, column in columns(run.manifest).items():
        if (run.path / name).exists():
            known += size_of(run.path / name)
            described = size_of(run.path / name) - size_of(run.path / name / "c")
            growing += described + _row(run, column) * rows(column, steps, -(-steps // block))
    return int(size_of(run.path) - known - size_of(run.path / "ledgers") + growing)


def _row(run: Run, column: Column) -> float:
    """Bytes of a row, of many in the mean; of rows that stand alone the last."""
    have, chunks = rows(column, run.steps, len(run.starts)), run.path / column.name / "c"
    return float(size_of(chunks / f"{have - 1}")) if column.dims[0] in ("anchor", "stored") else size_of(chunks) / max(1, have)
