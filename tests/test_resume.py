"""A decomposition that is stopped goes on when it is asked for again, and is bitwise the one that was not."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import explaind
from explaind.kernel.machine import Machine
from explaind.kernel.path import Adaptive
from explaind.kernel.products import Products
from explaind.store.sealed import read_sealed
from tests import cases
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
    asked, given, restore = {"rule": "adaptive", "tol": 1e-10, "keep": ("query",)}, [], Adaptive.restore
    want = cases.decomposed(run, **asked)
    assert len(set(want.checks.recipes[:, 0].tolist())) > 1
    with pytest.raises(Killed):
        cases.decomposed(run, save=tmp_path / "val", progress=kill_at(5), **asked)
    begun = read_sealed(tmp_path / ".val.parts" / "block-0.begun")
    monkeypatch.setattr(Adaptive, "restore", lambda self, state: given.append(state) or restore(self, state))
    same_ledger(cases.decomposed(run, save=tmp_path / "val", **asked), want)
    assert given == [begun["rule"].tolist()] != [Adaptive(1e-10).state()]


def test_the_rule_that_chooses_goes_on_where_it_was(run, tmp_path):
    asked = {"rule": "auto", "tol": 1e-8, "keep": ("query", "step")}
    want = cases.decomposed(run, **asked)
    for step in (2, 5):
        with pytest.raises(Killed):
            cases.decomposed(run, save=tmp_path / "val", progress=kill_at(step), **asked)
    same_ledger(cases.decomposed(run, save=tmp_path / "val", **asked), want)


def test_whoever_goes_on_judges_by_the_machine_of_the_process_that_began(run, tmp_path, monkeypatch):
    def measured(flops):
        monkeypatch.setattr("explaind.ledger.decompose.machine", lambda device, dtype: Machine(flops, 1.0, 0.0))

    used, call = [], Products.__call__
    monkeypatch.setattr(Products, "__call__", lambda self, *asked: used.append(self.machine.flops) or call(self, *asked))
    measured(1e-9)  # so slow that the fewest operations are best
    want = cases.decomposed(run, memory=ONE_QUERY)
    with pytest.raises(Killed):
        cases.decomposed(run, memory=ONE_QUERY, save=tmp_path / "val", progress=kill_at(5))
    measured(1e20)
    same_ledger(cases.decomposed(run, memory=ONE_QUERY, save=tmp_path / "val"), want)
    assert set(used) == {1e-9}


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


@pytest.mark.parametrize(("where", "when", "left"), [("step", 12, 10), ("writing", 4, 17), ("writing", 6, 13), ("writing", 11, 0)])
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
