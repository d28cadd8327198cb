"""A second copy of the metadata of a finished run: without them, a kilobyte of the whole, no chunk could be read."""

import json
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from explaind.store.checksums import text_checksum
from explaind.store.durable import sync
from explaind.store.location import MARKER, MIRROR, Location, inside, names_in, replace_file
from explaind.store.opening import passing
from explaind.store.schema import read_file

DESCRIPTION = "zarr.json"
NAMES = re.compile(rf"{re.escape(MARKER)}|((constant/)?[^/\\:]*[^/\\:.][^/\\:]*/)?zarr\.json")
"""Of the files that are in it."""
BACK = "explaind repair puts back what was recorded"
OTHERS = (MARKER, DESCRIPTION, MIRROR, "ledgers")
"""Names in the folder of a run that are no array's."""


def keep(path: Location) -> None:
    """Make the copy, of a run that nobody is going to change. OSError."""
    arrays = [name for name in names_in(path) if name not in OTHERS]
    arrays += [f"constant/{name}" for name in names_in(path / "constant")]
    names = [MARKER, DESCRIPTION, *(f"{name}/{DESCRIPTION}" for name in arrays)]
    texts = dict[str, str]()
    for name in names:
        with suppress(FileNotFoundError, NotADirectoryError):  # of what is no array
            texts[name] = read_file(path, name).decode()
    replace_file(path / MIRROR, json.dumps({"files": texts, "crc": text_checksum(texts)}))


def changed(path: Location) -> Mapping[str, str]:
    """What was written into those files that hold something else by now, or are gone, by name; nothing where there is no sound copy."""
    try:
        told = json.loads(read_file(path, MIRROR))
        texts = told["files"]
        if told["crc"] != text_checksum(texts) or not all(NAMES.fullmatch(name) and type(text) is str for name, text in texts.items()):
            return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}
    return {name: text for name, text in texts.items() if not _is(path, name, text)}


def _is(path: Location, name: str, text: str) -> bool:
    try:
        return read_file(path, name) == text.encode()
    except OSError as error:
        return passing(error)


def drop(path: Location) -> None:
    """Before a run is changed; on the disk itself, for an older copy would take the newer steps away. OSError."""
    (path / MIRROR).unlink(missing_ok=True)
    if isinstance(path, Path):
        sync([path])


def put_back(path: Location, texts: Mapping[str, str]) -> tuple[str, ...]:
    """Write those files again, as ``changed`` gave them; their names. OSError."""
    inside(path, but=["ledgers"])
    for name, text in texts.items():
        replace_file(path / name, text)
    return tuple(sorted(texts))
