"""A decomposition on its way: a folder beside the ledger-to-be with one file a finished block, and one a block that was begun.

.<ledger>.parts/
  key.json             what is decomposed (key.py); the folder of another decomposition is refused
  block-<i>            accounts of block i, complete
  block-<i>.begun      snapshot of its sweep between two segments

Every file is whole or not there. Several processes may work here: parts of one block are the same whoever makes them, the ledger is
written beside and renamed, which only one can do, and then the folder goes at once. Who comes later finds the ledger. At a URL, where
nothing can be renamed, it is copied, its marker last; several processes that do so write the same.
"""

import json
import re
import secrets
import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from explaind.errors import StoreError
from explaind.ledger.key import difference
from explaind.ledger.ledger import Ledger
from explaind.ledger.saving import save
from explaind.store import schema
from explaind.store.location import MARKER, Location, Where, absolute, hide, is_free, location_of, move, names_in, remove_tree
from explaind.store.sealed import read_sealed, write_sealed, write_whole

SECONDS = 60.0
"""A block is saved on its way at most this often …"""
PATIENCE = 20.0
"""… and saving takes at most one part in so many of the time."""

TRIES = 20
"""To remove what could not be written."""


class Parts:
    """The working folder of one decomposition."""

    def __init__(self, path: Location, key: Mapping[str, Any], blocks: int, overwrite: bool) -> None:
        """path: of the ledger-to-be; overwrite: clear the folder where it is of another decomposition."""
        self.path, self.blocks, self._overwrite = absolute(path), blocks, overwrite
        self.folder = _folder(path)
        self._last, self._took = time.monotonic(), 0.0
        try:
            self._enter(json.loads(json.dumps(key)))
        except OSError as error:
            raise schema.unwritable(self.folder, error) from error

    def _enter(self, key: dict[str, Any]) -> None:
        file = self.folder / "key.json"
        if self._overwrite and self._is_taken(file) and difference(key, _read_key(file)) is not None:
            remove_tree(self.folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        if not self._is_taken(file):
            write_whole(file, lambda f: f.write(json.dumps(key, indent=1).encode()))
        self.key = found = _read_key(file)
        name = difference(key, found)
        if name is not None:
            raise StoreError(
                "a decomposition with other arguments was begun here",
                where=self.folder,
                expected=_words(name, key),
                got=_words(name, found),
                do="finish that one with its own arguments, choose another name, or overwrite to begin anew",
            )

    def _is_taken(self, key: Location) -> bool:
        return key.exists() or any(name.startswith("block-") for name in names_in(self.folder))

    def read(self, block: int) -> dict[str, np.ndarray] | None:
        """The accounts of a block; None where they are not there, or damaged and therefore removed."""
        return self._read(self._file(block))

    def write(self, block: int, arrays: Mapping[str, np.ndarray]) -> None:
        """The accounts of a block are complete."""
        self._write(self._file(block), arrays)
        self._begun(block).unlink(missing_ok=True)
        self._last = time.monotonic()

    def read_begun(self, block: int) -> dict[str, np.ndarray] | None:
        """Where the sweep of a block stood; None where it is to begin."""
        return self._read(self._begun(block))

    def is_due(self) -> bool:
        """Whether it is time to save a block on its way."""
        return time.monotonic() - self._last >= max(SECONDS, PATIENCE * self._took)

    def write_begun(self, block: int, arrays: Mapping[str, np.ndarray]) -> None:
        """How far the sweep of a block is."""
        start = time.monotonic()
        self._write(self._begun(block), arrays)
        self._last = time.monotonic()
        self._took = self._last - start

    def missing(self) -> list[int]:
        """Blocks that have no accounts yet; none once the ledger is there."""
        return [] if self.is_over() else [block for block in range(self.blocks) if not self._file(block).exists()]

    def finish(self, ledger: Ledger) -> None:
        """Put the ledger in its place and remove the folder; where another process was faster, its ledger stays."""
        token = secrets.token_hex(4)
        beside, gone = (self.path.parent / f".{self.path.name}.{token}.{what}" for what in ("partial", "gone"))
        try:
            save(ledger, beside)
            if self._overwrite and self.path.exists():
                move(self.path, self.folder / f"older.{token}")
            move(beside, self.path)
            hide(self.folder, gone)
            self._clear()
        except OSError as error:
            if not self.is_over():
                raise schema.unwritable(self.path, error) from error
        except StoreError:
            if not self.is_over():
                raise
        finally:
            for _ in range(TRIES):  # where a write failed, zarr's others may go on for a moment, and make what was just removed
                remove_tree(beside, ignore_errors=True)
                if not beside.exists():
                    break
                time.sleep(0.05)

    def _clear(self) -> None:
        """Remove what this process, killed ones, and those that are too late have left beside the ledger."""
        left = re.compile(rf"\.{re.escape(self.path.name)}\.[0-9a-f]{{8}}\.(partial|gone)")
        for name in names_in(self.path.parent):
            if left.fullmatch(name):
                remove_tree(self.path.parent / name, ignore_errors=True)

    def is_over(self) -> bool:
        """Whether a process has put the ledger in its place: none was there at the beginning, unless it was to be replaced."""
        return (self.path / MARKER).exists() and not (self._overwrite and self.folder.exists())

    def _file(self, block: int) -> Location:
        return self.folder / f"block-{block}"

    def _begun(self, block: int) -> Location:
        return self.folder / f"block-{block}.begun"

    def _read(self, path: Location) -> dict[str, np.ndarray] | None:
        try:
            arrays = read_sealed(path)
        except FileNotFoundError:
            return None
        if arrays is None:
            path.unlink(missing_ok=True)
        return arrays

    def _write(self, path: Location, arrays: Mapping[str, np.ndarray]) -> None:
        try:
            write_sealed(path, arrays)
        except OSError as error:
            if not self.is_over():
                raise schema.unwritable(path, error) from error


def is_begun(save: Where) -> bool:
    """Whether there is work on the ledger to be saved there that is not finished."""
    return _folder(location_of(save)).exists()


def shards_left(save: Where, of: int) -> list[int]:
    """Which of so many shards still have blocks to do for the ledger to be saved there; none where it is there."""
    folder = _folder(location_of(save))
    blocks = len(_read_key(folder / "key.json").get("blocks", ()))
    return sorted({block % of for block in range(blocks) if not (folder / f"block-{block}").exists()})


def check_free(path: Location, overwrite: bool) -> None:
    """StoreError unless a ledger can be put here: there is nothing, or a ledger that may be replaced."""
    if overwrite and not is_free(path):
        schema.open_group(path, "ledger")
    elif not overwrite:
        schema.check_new(path)


def _folder(path: Location) -> Location:
    whole = absolute(path)
    return whole.parent / f".{whole.name}.parts"


def _read_key(file: Location) -> dict[str, Any]:
    try:
        return dict(json.loads(file.read_text()))
    except (FileNotFoundError, ValueError, TypeError):
        return {}


def _words(name: str, key: Mapping[str, Any]) -> str:
    """An entry of a key for people, who cannot tell hashes apart."""
    value = key.get(name, "nothing")
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return f"{name} {text[:60]}{' …' if len(text) > 60 else ''}"
