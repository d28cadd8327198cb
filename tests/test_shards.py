"""Decompositions that are split between processes, and that are given less memory."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import explaind
from explaind.cli import main
from explaind.ledger import parts
from tests import cases
from tests.closeness import algebra, same
from tests.stopped import ONE_QUERY, nothing_but, recorded, same_ledger, save_at_every_segment, steps_swept


@pytest.fixture(autouse=True)
def saved_at_every_segment(monkeypatch):
    save_at_every_segment(monkeypatch)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return recorded(tmp_path_factory.mktemp("recorded"))


@pytest.fixture
def swept(monkeypatch):
    return steps_swept(monkeypatch)


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
        for row in blocks.rows:
            same(mine[row], blocks[row][index : index + 1], row)
        assert explaind.shards_left(path, 3) == sorted(order[place + 1 :])
    same_ledger(explaind.open_ledger(path), blocks)
    assert explaind.open_ledger(path).settings == blocks.settings
    for row in blocks.rows:  # one query a block and three make other matrix products of the same numbers
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
    for row in want.rows:
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
    for row in want.rows:
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


SMALL = Path(__file__).parent / "small.toml"


@pytest.fixture
def trained(tmp_path, capsys):
    """A run of the command line, with six queries to ask."""
    assert main(["record", str(SMALL), "--out", str(tmp_path / "run"), "--train.steps", "3"]) == 0
    capsys.readouterr()
    return tmp_path / "run"


def said(capsys, status, *arguments):
    assert main(["decompose", *map(str, arguments)]) == status
    printed = capsys.readouterr()
    return printed.err if status == 2 else printed.out


def test_shards_on_the_command_line(trained, capsys):
    ledger = trained / "ledgers" / "val.target_log_probability"
    assert said(capsys, 0, trained, "--shard", "1/4") == "shard 1 of 4 done; 3 left: 0, 2, 3\n"
    facts = json.loads(said(capsys, 0, trained, "--shard", "2/4", "--json"))
    assert facts == {"ledger": str(ledger), "shard": "2/4", "left": [0, 3]}
    assert main(["verify", str(trained)]) == main(["info", str(trained)]) == 0  # work that is not finished is no ledger
    assert ".parts" not in capsys.readouterr().out
    assert said(capsys, 0, trained, "--shard", "0/4") == "shard 0 of 4 done; 1 left: 3\n"
    assert "6 query" in said(capsys, 0, trained, "--shard", "3/4")
    assert explaind.open_ledger(ledger).verify().ok
    nothing_but(ledger)
    assert "something here already" in said(capsys, 2, trained, "--shard", "0/4")
    assert "7/7" in said(capsys, 2, trained, "--shard", "7/7")


def test_shards_that_run_at_the_same_time_make_one_ledger(trained):
    command = [sys.executable, "-m", "explaind.cli", "decompose", str(trained), "--name", "mine", "--overwrite", "--shard"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    running = [subprocess.Popen([*command, f"{i}/3"], env=environment, stdout=subprocess.PIPE, text=True) for i in range(3)]
    printed = [process.communicate()[0] for process in running]
    assert [process.returncode for process in running] == [0, 0, 0]
    assert any("6 query" in text for text in printed), printed
    assert explaind.open_ledger(trained / "ledgers" / "mine").verify().ok
    nothing_but(trained / "ledgers" / "mine")


def test_memory_on_the_command_line(trained, capsys):
    assert "6 query" in said(capsys, 0, trained, "--memory", "1.5MiB")
    assert explaind.open_ledger(trained / "ledgers" / "val.target_log_probability").settings["memory"] == 3 << 19
    assert "memory is too small to work in (one query); expected at least" in said(
        capsys, 2, trained, "--name", "other", "--memory", "1KiB"
    )
    line = said(capsys, 2, trained, "--name", "other", "--memory", "plenty")
    assert "not an amount of memory (decompose.memory); expected a number and one of B, kB, MB" in line
    assert "'plenty'" in line
    assert main(["run", str(SMALL), "--out", str(trained.parent / "no"), "--decompose.memory", "2 parsecs"]) == 2  # before the training
    assert not (trained.parent / "no").exists()
