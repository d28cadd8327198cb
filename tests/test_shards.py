"""Decompositions that are stopped and go on, that are split between processes, and that are given less memory."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch

import explaind
from explaind.kernel.path import Adaptive
from explaind.kernel.sweep import Sweep
from explaind.ledger import parts
from explaind.ledger.ledger import ROWS, Checks
from explaind.store.sealed import read_sealed, write_sealed
from tests import cases
from tests.closeness import algebra, same

ONE_QUERY = 2 * 8 * (6 * 26 + 4 * 8)
"""Bytes that the plan allows a query of ``cases.mlp``: 2 outputs, 26 parameters in 4 layers, 8 examples, float64."""


@pytest.fixture(autouse=True)
def saved_at_every_segment(monkeypatch):
    """Seven steps in three segments; the sweep is saved between any two."""
    cases.shorten_blocks(monkeypatch)
    monkeypatch.setattr(parts, "SECONDS", 0.0)
    monkeypatch.setattr(parts, "PATIENCE", 0.0)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        cases.shorten_blocks(patch)
        return cases.recorded(tmp_path_factory.mktemp("shards") / "run", case=cases.optimizer_named("adamw"))


@pytest.fixture
def swept(monkeypatch):
    """The steps that were swept, in order."""
    steps, step = [], Sweep._step
    monkeypatch.setattr(Sweep, "_step", lambda self, item: steps.append(item.step.index) or step(self, item))
    return steps


class Killed(Exception):
    """Stands for the end of the process."""


def kill_at(last):
    def progress(done, total):
        if done >= last:
            raise Killed

    return progress


def same_ledger(got, want):
    for row in (*ROWS, "final"):
        same(got[row], want[row], row)
    for f in fields(Checks):
        if f.name in ("dims", "layers", "doubts"):
            assert getattr(got.checks, f.name) == getattr(want.checks, f.name)
        else:
            same(getattr(got.checks, f.name), getattr(want.checks, f.name), f.name)
    for axis, values in want.coords.items():
        assert got.coords[axis].tolist() == values.tolist()


def nothing_but(path):
    """The ledger stands alone in its folder."""
    assert [p.name for p in path.parent.iterdir()] == [path.name]


OPTIONS = {
    "seen": {},
    "applied": {"view": "applied", "windows": 2},
    "adaptive": {"rule": "auto", "tol": 1e-6},
    "corrected": {"rule": "gauss:1", "closure": "discrete-gradient"},
    "jvp": {"products": "jvp"},
    "float32": {"dtype": torch.float32, "memory": ONE_QUERY // 2},
    "one block": {"memory": None},
    "queries summed": {"memory": None, "keep": ("output", "example", "step")},
    "param": {"keep": ("query", "output", "example", "param")},
    "no examples": {"keep": ("query", "output", "layer")},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_decomposition_that_is_killed_and_asked_again_is_bitwise_the_uninterrupted_one(options, run, tmp_path):
    asked = {"memory": ONE_QUERY, **options}
    want = cases.decomposed(run, **asked)
    path = tmp_path / "ledgers" / "val"
    for kill in (2, 4) if asked["memory"] is None else (2, 4, 7, 12, 18):
        with pytest.raises(Killed):
            cases.decomposed(run, save=path, progress=kill_at(kill), **asked)
    cases.decomposed(run, save=path, **asked)
    same_ledger(explaind.open_ledger(path), want)
    assert explaind.open_ledger(path).settings == want.settings
    nothing_but(path)


def test_only_what_is_missing_is_swept_again(run, tmp_path, swept):
    path = tmp_path / "val"
    with pytest.raises(Killed):
        cases.decomposed(run, save=path, memory=ONE_QUERY, progress=kill_at(7 + 4))
    assert swept == [6, 5, 4, 3, 2, 1, 0, 6, 5, 4, 3]
    del swept[:]
    ticks = []
    cases.decomposed(run, save=path, memory=ONE_QUERY, progress=lambda done, total: ticks.append((done, total)))
    assert swept == [5, 4, 3, 2, 1, 0, 6, 5, 4, 3, 2, 1, 0]  # the segment of step 6 was whole
    assert ticks == [(done, 21) for done in (7, 8, *range(9, 22))]


def test_the_adaptive_rule_goes_on_where_it_was(run, tmp_path, monkeypatch):
    asked, given, restore = {"rule": "auto", "tol": 1e-10, "keep": ("query",)}, [], Adaptive.restore
    want = cases.decomposed(run, **asked)
    assert len(set(want.checks.nodes.tolist())) > 1
    with pytest.raises(Killed):
        cases.decomposed(run, save=tmp_path / "val", progress=kill_at(5), **asked)
    begun = read_sealed(tmp_path / ".val.parts" / "block-0.begun")
    monkeypatch.setattr(Adaptive, "restore", lambda self, state: given.append(state) or restore(self, state))
    same_ledger(cases.decomposed(run, save=tmp_path / "val", **asked), want)
    assert given == [begun["rule"].tolist()] != [Adaptive(1e-10).state()]


def test_momentum_from_before_the_recording_survives_a_kill(tmp_path):
    run = cases.recorded(tmp_path / "run", case=cases.optimizer_named("sgd momentum"), warm=True)
    want = cases.decomposed(run)
    with pytest.raises(Killed):
        cases.decomposed(run, save=tmp_path / "val", progress=kill_at(5))
    same_ledger(cases.decomposed(run, save=tmp_path / "val"), want)


SCRIPT = """
import os, signal, sys
from pathlib import Path
import explaind
from explaind.ledger import parts
from tests import cases

parts.SECONDS = parts.PATIENCE = 0.0
sync, count, (run, save, where, when) = os.fsync, 0, sys.argv[1:]

def die(*_):
    global count
    count += 1
    if count == int(when):
        os.kill(os.getpid(), signal.SIGKILL)

def fsync(file):
    die()
    sync(file)

if where == "writing":
    os.fsync = fsync
cases.decomposed(explaind.open(run), save=save, memory=int(os.environ["MEMORY"]), progress=die if where == "step" else None)
"""


@pytest.mark.parametrize(("where", "when", "left"), [("step", 12, 10), ("writing", 4, 17), ("writing", 6, 13)])
def test_a_killed_process_loses_at_most_what_came_after_the_last_save(where, when, left, run, tmp_path, swept):
    path = tmp_path / "val"
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads()), "MEMORY": str(ONE_QUERY)}
    command = [sys.executable, "-c", SCRIPT, str(run.path), str(path), where, str(when)]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not path.exists()
    got = cases.decomposed(run, save=path, memory=ONE_QUERY)
    assert len(swept) == left
    same_ledger(got, cases.decomposed(run, memory=ONE_QUERY))
    nothing_but(path)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_shards_make_the_ledger_of_the_whole(order, run, tmp_path):
    path = tmp_path / "val"
    whole, blocks = cases.decomposed(run), cases.decomposed(run, memory=ONE_QUERY)
    asked = {"save": path, "memory": ONE_QUERY}
    for place, index in enumerate(order):
        assert not path.exists()
        mine = cases.decomposed(run, shard=f"{index}/3", **asked)
        assert mine.coords["query"].tolist() == [index]
        assert mine.verify().ok
        for row in ROWS:
            same(mine[row], blocks[row][index : index + 1], row)
        assert explaind.shards_left(path, 3) == sorted(order[place + 1 :])
    same_ledger(explaind.open_ledger(path), blocks)
    assert explaind.open_ledger(path).settings == blocks.settings
    for row in ROWS:  # one query a block and three make other matrix products of the same numbers
        algebra(explaind.open_ledger(path)[row], whole[row], row, np.abs(whole["data"]).max())
    nothing_but(path)


def test_a_shard_that_is_done_is_not_swept_again(run, tmp_path, swept):
    first = cases.decomposed(run, save=tmp_path / "val", shard="1/2")
    assert len(swept) == run.steps
    same_ledger(cases.decomposed(run, save=tmp_path / "val", shard="1/2"), first)
    assert len(swept) == run.steps


@pytest.mark.parametrize("overwrite", [False, True])
def test_two_that_finish_at_the_same_time_leave_one_whole_ledger(overwrite, run, tmp_path, monkeypatch):
    path, save = tmp_path / "val", parts.save
    asked = {"save": path, "overwrite": overwrite}
    if overwrite:
        cases.decomposed(run, save=path, rule="gauss:1")
    cases.decomposed(run, shard="0/2", **asked)

    def slow(ledger, folder):
        monkeypatch.setattr(parts, "save", save)
        cases.decomposed(run, shard="1/2", **asked)  # the other one is through in the meantime
        save(ledger, folder)

    monkeypatch.setattr(parts, "save", slow)
    cases.decomposed(run, shard="1/2", **asked)
    want = cases.decomposed(run)
    for row in ROWS:
        algebra(explaind.open_ledger(path)[row], want[row], row, np.abs(want["data"]).max())
    nothing_but(path)


def test_a_shard_whose_work_was_done_by_another_process_ends_in_peace(run, tmp_path):
    path, started = tmp_path / "val", []

    def meanwhile(done, total):
        if not started:
            started.append(True)
            for index in (0, 1):
                cases.decomposed(run, save=path, shard=f"{index}/2")

    late = cases.decomposed(run, save=path, shard="1/2", progress=meanwhile)
    same(late["data"], explaind.open_ledger(path)["data"][late.coords["query"]])
    nothing_but(path)


@pytest.mark.parametrize("memory", [ONE_QUERY, 2 * ONE_QUERY, 1 << 20, 8 << 30])
def test_every_memory_gives_the_same_ledger(memory, run, swept):
    want = cases.decomposed(run)
    del swept[:]
    got = cases.decomposed(run, memory=memory)
    for row in ROWS:
        algebra(got[row], want[row], row, np.abs(want["data"]).max())
    assert got.settings["memory"] == memory
    assert len(swept) == run.steps * {ONE_QUERY: 3, 2 * ONE_QUERY: 2}.get(memory, 1)


def coupled(model, queries):
    values = cases.measure(model, queries)
    return values - values.mean(0)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"memory": ONE_QUERY - 1}, [f"at least 2.94 KiB ({ONE_QUERY} bytes)", "one query"]),
        ({"memory": 1}, ["memory is too small", "got 1 B"]),
        ({"memory": ONE_QUERY, "measure": coupled}, [f"({3 * ONE_QUERY} bytes)", "depend on each other"]),
        ({"shard": "0/4"}, ["more shards than queries", "at most 3"]),
        ({"shard": "0/2", "keep": ("output", "layer")}, ["cannot be split"]),
        ({"shard": "0/2", "measure": coupled}, ["cannot be split"]),
        ({"shard": "2/2"}, ["unknown shard", "'2/2'"]),
        ({"shard": "one"}, ["unknown shard", "0/4"]),
        ({"shard": "0/2", "save": None}, ["shard needs a place"]),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(options, words, run, tmp_path):
    with pytest.raises(explaind.ExplaindError) as refused:
        cases.decomposed(run, **{"save": tmp_path / "val", **options})
    line = str(refused.value)
    assert all(word in line for word in words), line
    assert "\n" not in line
    assert not list(tmp_path.iterdir())


OTHERS = {
    "tol": {"tol": 1e-5},
    "keep": {"keep": ("query", "example")},
    "rule": {"rule": "gauss:3"},
    "measure": {"measure": lambda model, queries: model(queries)},
    "losses": {"losses": lambda model, batch: 2 * cases.losses(model, batch)},
    "data": {"data": [(x, y) for x, y in zip(cases.DATA.tensors[0], 1 - cases.DATA.tensors[1], strict=True)]},
    "blocks": {"memory": 2 * ONE_QUERY},
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
    with pytest.raises(explaind.ExplaindError, match="other arguments was begun here.*queries"):
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


def test_a_damaged_part_of_another_shard_is_named_as_left(run, tmp_path):
    path = tmp_path / "val"
    cases.decomposed(run, save=path, shard="0/3")
    cases.decomposed(run, save=path, shard="1/3")
    part = tmp_path / ".val.parts" / "block-1"
    part.write_bytes(part.read_bytes()[:-3])
    cases.decomposed(run, save=path, shard="2/3")
    assert not path.exists()
    assert explaind.shards_left(path, 3) == [1]
    cases.decomposed(run, save=path, shard="1/3")
    assert explaind.open_ledger(path).verify().ok


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


def test_the_working_folder_is_json_and_numbers(run, tmp_path):
    with pytest.raises(Killed):
        cases.decomposed(run, save=tmp_path / "val", progress=kill_at(5))
    key = json.loads((tmp_path / ".val.parts" / "key.json").read_text())
    assert (key["rule"], key["blocks"], key["keep"]) == ("gauss:4", [[0, 3]], ["query", "output", "example", "layer", "step"])
    begun = read_sealed(tmp_path / ".val.parts" / "block-0.begun")
    assert {values.dtype.kind for values in begun.values()} <= {"f", "i"}
