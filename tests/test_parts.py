"""The working folder: whose work it is, what is damaged, what is replaced."""

import json

import numpy as np
import pytest

import explaind
from explaind.store.sealed import read_sealed, write_sealed
from tests import cases
from tests.closeness import same
from tests.stopped import ONE_QUERY, Killed, kill_at, nothing_but, recorded, same_ledger, save_at_every_segment, steps_swept


@pytest.fixture(autouse=True)
def saved_at_every_segment(monkeypatch):
    save_at_every_segment(monkeypatch)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return recorded(tmp_path_factory.mktemp("recorded"))


@pytest.fixture
def swept(monkeypatch):
    return steps_swept(monkeypatch)


OTHERS = {
    "tol": {"tol": 1e-5},
    "keep": {"keep": ("query", "example")},
    "rule": {"rule": "gauss:3"},
    "measure": {"measure": lambda model, queries: model(queries)},
    "losses": {"losses": lambda model, batch: 2 * cases.losses(model, batch)},
    "data": {"data": [(x, y) for x, y in zip(cases.DATA.tensors[0], 1 - cases.DATA.tensors[1], strict=True)]},
    "memory": {"memory": 2 * ONE_QUERY},
}


@pytest.mark.parametrize("name", OTHERS)
def test_the_work_of_another_decomposition_is_refused_or_cleared(name, run, tmp_path, swept):
    path = tmp_path / "val"
    with pytest.raises(Killed):
        cases.decomposed(run, save=path, memory=ONE_QUERY, progress=kill_at(8))
    with pytest.raises(explaind.ExplaindError, match=f"other arguments was begun here.*{name}.*overwrite"):
        cases.decomposed(run, **{"save": path, "memory": ONE_QUERY, **OTHERS[name]})
    want = cases.decomposed(run, **{"memory": ONE_QUERY, **OTHERS[name]})
    same_ledger(cases.decomposed(run, **{"save": path, "overwrite": True, "memory": ONE_QUERY, **OTHERS[name]}), want)
    nothing_but(path)


def test_other_queries_are_another_decomposition(run, tmp_path, monkeypatch):
    with pytest.raises(Killed):
        cases.decomposed(run, save=tmp_path / "val", progress=kill_at(5))
    monkeypatch.setattr(cases, "QUERIES", cases.QUERIES.flip(0))
    with pytest.raises(explaind.ExplaindError, match=r"other arguments was begun here.*queries"):
        cases.decomposed(run, save=tmp_path / "val")


def test_overwrite_keeps_the_work_of_the_same_decomposition_and_the_old_ledger_until_the_end(run, tmp_path, swept):
    path = tmp_path / "val"
    old = cases.decomposed(run, save=path, rule="gauss:1")
    with pytest.raises(explaind.ExplaindError, match="something here already"):
        cases.decomposed(run, save=path)
    with pytest.raises(Killed):
        cases.decomposed(run, save=path, overwrite=True, memory=ONE_QUERY, progress=kill_at(8))
    same_ledger(explaind.open_ledger(path), old)
    del swept[:]
    same_ledger(cases.decomposed(run, save=path, overwrite=True, memory=ONE_QUERY), explaind.open_ledger(path))
    assert len(swept) == 2 * run.steps
    nothing_but(path)


def test_overwrite_only_ever_replaces_a_ledger(run, tmp_path):
    (tmp_path / "val").mkdir()
    (tmp_path / "val" / "thesis.txt").write_text("years of work")
    with pytest.raises(explaind.ExplaindError, match="not a ledger"):
        cases.decomposed(run, save=tmp_path / "val", overwrite=True)


@pytest.mark.parametrize("damage", ["flipped", "short", "empty", "no key"])
def test_a_damaged_part_is_noticed_and_made_again(damage, run, tmp_path, swept):
    path = tmp_path / "val"
    with pytest.raises(Killed):
        cases.decomposed(run, save=path, memory=ONE_QUERY, progress=kill_at(18))
    folder = tmp_path / ".val.parts"
    assert {p.name for p in folder.iterdir()} == {"key.json", "block-0", "block-1", "block-2.begun"}
    for file in (folder / "block-1", folder / "block-2.begun"):
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes({"flipped": content, "short": content[:-1], "empty": b"", "no key": file.read_bytes()}[damage])
    if damage == "no key":
        (folder / "key.json").unlink()
        with pytest.raises(explaind.ExplaindError, match="other arguments was begun here"):
            cases.decomposed(run, save=path, memory=ONE_QUERY)
        return
    del swept[:]
    same_ledger(cases.decomposed(run, save=path, memory=ONE_QUERY), cases.decomposed(run, memory=ONE_QUERY))
    assert len(swept) == (2 + 3) * run.steps


def test_a_sealed_file_shows_every_changed_byte(tmp_path):
    arrays = {"a": np.arange(3.0), "empty": np.zeros((0, 2)), "scalar": np.array(3)}
    write_sealed(tmp_path / "file", arrays)
    found = read_sealed(tmp_path / "file")
    assert list(found) == list(arrays)
    for name, values in arrays.items():
        same(found[name], values, name)
    content = (tmp_path / "file").read_bytes()
    for place in range(len(content)):
        changed = bytearray(content)
        changed[place] ^= 0x10
        (tmp_path / "other").write_bytes(changed)
        assert read_sealed(tmp_path / "other") is None, place
    assert {p.name for p in tmp_path.iterdir()} == {"file", "other"}


def test_the_working_folder_is_json_and_plain_arrays(run, tmp_path):
    with pytest.raises(Killed):
        cases.decomposed(run, save=tmp_path / "val", progress=kill_at(5))
    key = json.loads((tmp_path / ".val.parts" / "key.json").read_text())
    assert (key["rule"], key["blocks"], key["keep"]) == ("gauss:4", [[0, 3]], ["query", "output", "example", "layer", "step"])
    begun = read_sealed(tmp_path / ".val.parts" / "block-0.begun")
    assert {values.dtype.kind for values in begun.values()} <= set("fiU")
