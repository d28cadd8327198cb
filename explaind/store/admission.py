"""What may come into a run: names that it has, shapes that its manifest gives. Everything here is checked before anything is written."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import numpy as np

from explaind.axes import KEEPABLE, ROWS
from explaind.errors import RuleError
from explaind.store import layout, schema
from explaind.store.manifest import Manifest, is_count
from explaind.store.opening import LARGEST
from explaind.store.shelf import TEXT, Slab, Source, Spec, text_of, unfit
from explaind.store.tail import NAMES

COLUMNS = {
    *("theta", "batch", "part", "weight", "hyper", "age", "mode", "gap", "precision", "checksum_theta", "checksum_step", "scalar"),
    *("consumed", "random", "preconditioner", "momentum", "filtered", "state", "groups", "fingerprint"),
    *("gradient", "checksum_gradient"),
}
FILES = {"attributes.json", "commit.json"}
CHECKS = {"movement", "path", "arithmetic", "by_step", "replay_error", "recipes"}
"""Of a ledger, in its group "check"."""
OF_LEDGER = {*FILES, *ROWS, "final", *KEEPABLE, *(f"check/{name}" for name in CHECKS)}
WORD = re.compile(r"[^./\\:][^/\\:]{0,199}")


@dataclass(frozen=True)
class Admitted:
    """What is taken over of a run: its small files, and its arrays as they are to be."""

    manifest: Manifest
    steps: int
    complete: bool
    texts: Mapping[str, bytes]
    arrays: Mapping[str, tuple[Slab, Spec]]


def check_name(name: str, source: Source) -> str:
    """A path that a run has; StoreError for any other, such as one that leads out of it."""
    first, _, rest = name.partition("/")
    ledger, _, part = rest.partition("/")
    known = (
        name in {*FILES, *COLUMNS, *NAMES}
        or (first == "constant" and _is_word(rest))
        or (first == "ledgers" and _is_word(ledger) and part in OF_LEDGER)
    )
    if not known:
        raise unfit(source, repr(name[:80]), "no part of a run", expected="the names of the schema alone")
    return name


def _is_word(name: str) -> bool:
    """Whether it can be the name of one folder, and of nothing else."""
    return bool(WORD.fullmatch(name)) and name.isprintable() and name.lower() != "zarr.json" and not name.startswith("__")


def of_run(source: Source, names: Sequence[str]) -> Admitted:
    """The run without its ledgers."""
    texts = _texts(source, "", names)
    manifest, steps = _manifest(source, texts["attributes.json"]), _commit(source, texts["commit.json"])
    try:
        columns = layout.columns(manifest)
    except RuleError as error:
        raise unfit(source, "the manifest", "damaged", got=error) from error
    missing = sorted(columns.keys() - set(names) - set(layout.OPTIONAL))
    strange = sorted((COLUMNS - {"fingerprint"}) & set(names) - columns.keys())
    if missing or strange:
        raise unfit(source, (missing or strange)[0], "missing" if missing else "no part of a run with that manifest")
    anchors = _anchors(source, steps["steps"], manifest.block)
    arrays = {}
    for column in (columns[name] for name in columns if name in names):
        slab, rows = _slab(source, column.name), layout.rows(column, steps["steps"], anchors)
        if column.name == "gradient" and not steps["complete"] and slab.spec.shape[:1] > (rows,):
            rows = min(slab.spec.shape[0], rows + 2 * manifest.span)  # those of steps that only the log has are there already
        arrays[column.name] = slab, _column(source, slab.spec, column, manifest, rows)
    for name in (name for name in names if name == "fingerprint" or name.startswith("constant/")):
        slab = _slab(source, name)
        arrays[name] = slab, _finished(source, name, slab.spec, manifest)
    return Admitted(manifest, steps["steps"], steps["complete"], texts, arrays)


def of_ledger(source: Source, ledger: str, names: Sequence[str]) -> tuple[Mapping[str, bytes], Mapping[str, tuple[Slab, Spec]]]:
    """The small files and the arrays of one ledger, by their whole paths."""
    front = f"ledgers/{ledger}/"
    texts = _texts(source, front, names)
    attributes = _attributes(source, texts[f"{front}attributes.json"], "ledger")
    rows = attributes.get("rows")
    if not isinstance(rows, list) or not all(isinstance(row, str) and row in ROWS and front + row in names for row in rows):
        raise unfit(source, f"{front}attributes.json", "damaged", expected=f"rows out of {', '.join(ROWS)}", got=rows)
    arrays = {name: _slab(source, name) for name in names if name.startswith(front) and name not in texts}
    sizes = dict[str, int]()
    for name, slab in arrays.items():
        spec, part = slab.spec, name.removeprefix(front)
        if spec.dtype != TEXT and np.dtype(spec.dtype).kind not in "fiub":
            raise unfit(source, name, "no array of numbers or names", got=spec.dtype)
        if len(set(spec.dims)) != len(spec.dims) or (part in KEEPABLE and spec.dims != (part,)):
            raise unfit(source, name, "damaged", expected="axes of its own", got=spec.dims)
        for axis, size in zip(spec.dims, spec.shape, strict=True):
            if not part.startswith("check/") and (axis not in KEEPABLE or sizes.setdefault(axis, size) != size):
                raise unfit(source, name, "of another size than its ledger", expected=sizes.get(axis, "an axis of a ledger"), got=axis)
    return texts, {name: (slab, slab.spec) for name, slab in arrays.items()}


def ledgers(names: Sequence[str]) -> list[str]:
    """The ledgers that were written to their end."""
    return sorted({name.split("/")[1] for name in names if name.startswith("ledgers/") and name.endswith("/commit.json")})


def _texts(source: Source, front: str, names: Sequence[str]) -> dict[str, bytes]:
    for name in (front + file for file in sorted(FILES)):
        if name not in names:
            raise unfit(source, name, "missing")
    return {front + file: text_of(source, front + file) for file in sorted(FILES)}


def _attributes(source: Source, text: bytes, kind: str) -> dict[str, Any]:
    try:
        attributes = json.loads(text)
        mark = attributes["explaind"]
        found = mark["kind"], mark["schema"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise unfit(source, f"the attributes of the {kind}", "damaged", got=type(error).__name__) from error
    if found != (kind, schema.VERSIONS[kind]):
        raise unfit(source, f"the {kind}", "something else", expected=f"{kind}, schema {schema.VERSIONS[kind]}", got=found)
    return dict(attributes)


def _manifest(source: Source, text: bytes) -> Manifest:
    """The manifest; StoreError unless its numbers can be those of a run."""
    return Manifest.from_json(_attributes(source, text, "run").get("manifest", {}), source.where)


def _commit(source: Source, text: bytes) -> dict[str, Any]:
    try:
        commit = json.loads(text)
        fine = is_count(commit["steps"]) and type(commit["complete"]) is bool
        if not fine or not all(type(on) is bool for mode in commit["modes"] for on in mode):
            raise ValueError("steps, complete and modes")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise unfit(source, "commit.json", "damaged", got=repr(error)[:200]) from error
    return dict(commit)


def _anchors(source: Source, steps: int, block: int) -> int:
    """How many anchors the committed steps have."""
    slab = _slab(source, "gap")
    if slab.spec.dtype != "int64" or slab.spec.shape[1:] or not slab.spec.shape or slab.spec.shape[0] < steps:
        raise unfit(source, "gap", "of another shape", expected=f"int64 [{steps}]", got=f"{slab.spec.dtype} {list(slab.spec.shape)}")
    return len(layout.starts(slab.read((slice(0, steps),)), block))


def _column(source: Source, found: Spec, column: schema.Column, m: Manifest, rows: int) -> Spec:
    """How a column is to be: as it was found, cut to the committed steps; in the chunks that it had when it was recorded."""
    want = (rows, *column.shape)
    free = [1] if column.chunk else []
    fits = len(found.shape) == len(want) and found.shape[0] >= rows and all(found.shape[i] >= 1 for i in free)
    fits = fits and all(n == w for i, (n, w) in enumerate(zip(found.shape, want, strict=True)) if i not in [0, *free])
    if not fits or found.dtype != column.dtype or found.dims != column.dims:
        asked = ", ".join(f"{axis} {'…' if i in free else n}" for i, (axis, n) in enumerate(zip(column.dims, want, strict=True)))
        got = ", ".join(f"{axis} {n}" for axis, n in zip(found.dims, found.shape, strict=True))
        raise unfit(source, column.name, "of another shape", expected=f"{column.dtype} [{asked}]", got=f"{found.dtype} [{got}]")
    chunks = column.chunks(layout.rows_of_chunk(column, m))
    spec = replace(found, shape=(rows, *found.shape[1:]), chunks=chunks, fill=column.fill, tile=column.tile)
    _check_chunk(source, column.name, spec)
    return spec


def _finished(source: Source, name: str, found: Spec, m: Manifest) -> Spec:
    """A fingerprint or a constant, which stands in one chunk."""
    one = name.removeprefix("constant/")
    dims = ("example",) if name == "fingerprint" else tuple(f"{one}.{i}" for i in range(len(found.shape)))
    shape = (m.examples,) if name == "fingerprint" else found.shape
    kinds = "u" if name == "fingerprint" else "fiubc"
    if found.dims != dims or found.shape != shape or found.dtype == TEXT or np.dtype(found.dtype).kind not in kinds:
        raise unfit(source, name, "of another shape", expected=f"numbers {list(dims)}", got=f"{found.dtype} {list(found.shape)}")
    spec = replace(found, chunks=tuple(max(1, n) for n in found.shape))
    _check_chunk(source, name, spec)
    return spec


def _slab(source: Source, name: str) -> Slab:
    """An array whose chunks are not too large to be read."""
    slab = source.slab(name)
    _check_chunk(source, name, slab.spec)
    return slab


def _check_chunk(source: Source, name: str, spec: Spec) -> None:
    """A reader of zarr makes room for whole chunks, even at the rim of an array."""
    chunk = prod(spec.chunks) * spec.itemsize
    if chunk > LARGEST:
        raise unfit(source, name, "too large", expected=f"at most {LARGEST} bytes in a chunk", got=chunk)
