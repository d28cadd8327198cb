"""A recording that was interrupted goes on, and is the one that was not."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr

import explaind
from explaind.cli import main
from explaind.errors import RecordError, StoreError
from explaind.store import schema
from explaind.store.logs import following
from explaind.store.repair import Repair, repair
from explaind.store.row import StepRow
from explaind.store.tail import NAMES, Log, Record, records
from tests import cases
from tests.closeness import same

LENGTH = 11


@pytest.fixture(autouse=True)
def short_blocks(monkeypatch):
    cases.shorten_blocks(monkeypatch)


class Loop:
    """A training whose steps depend on their number alone, with a checkpoint after every one."""

    def __init__(self, path, name="adamw", network=cases.mlp):
        self.path, self.model = path, cases.Problem("loop", network).model()
        torch.manual_seed(0)  # which a run keeps
        self.optimizer = cases.optimizer_named(name).make(list(self.model.parameters()))

    def record(self, until, **options):
        with explaind.record(self.optimizer, self.model, self.path, data=cases.DATA, **options) as recorder:
            while recorder.steps < until:
                self.step(recorder)
        return explaind.open(self.path)

    def step(self, recorder):
        step = recorder.steps
        ids = torch.arange(step, step + 2 + step % 3) % 8
        torch.manual_seed(step)
        recorder.examples(ids)
        self.optimizer.zero_grad()
        x, y = cases.DATA[ids]
        cases.losses(self.model, (x, y)).mean().backward()
        self.optimizer.step()
        torch.save(
            {"step": recorder.steps, "model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}, self.file(recorder.steps)
        )

    def file(self, step):
        return f"{self.path}.{step}.pt"

    def load(self, step):
        found = torch.load(self.file(step))
        self.model.load_state_dict(found["model"])
        self.optimizer.load_state_dict(found["optimizer"])
        return self


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The uninterrupted recording with an optimizer, made once."""

    @cache
    def made(name="adamw"):
        with pytest.MonkeyPatch.context() as patch:
            cases.shorten_blocks(patch)
            return Loop(tmp_path_factory.mktemp("whole") / "run", name).record(LENGTH)

    return made


@cache
def ledger_of(path):
    return cases.decomposed(explaind.open(path), cases.Problem("loop"))


def check_same(got, want):
    assert (got.steps, got.complete, got.damage()) == (want.steps, want.complete, [])
    assert got.identity == want.identity
    same(got.states(0, got.steps + 1), want.states(0, want.steps + 1))
    one, two = (run.block(0, run.steps) for run in (got, want))
    for mine, theirs in zip(one.rows, two.rows, strict=True):
        for name in ("batch", "part", "weight", "hyper", "age", "preconditioner"):
            if getattr(theirs, name) is not None:
                same(getattr(mine, name), getattr(theirs, name), name)
    ledger, wanted = cases.decomposed(got, cases.Problem("loop")), ledger_of(want.path)
    for row in wanted.rows:
        same(ledger[row], wanted[row], row)


@pytest.mark.parametrize("name", ["adamw", "sgd momentum", "sgd", "adagrad"])
@pytest.mark.parametrize("at", range(1, LENGTH, 2))
def test_a_recording_goes_on_where_it_was_closed(at, name, tmp_path, whole):
    Loop(tmp_path / "run", name).record(at)
    check_same(Loop(tmp_path / "run", name).load(at).record(LENGTH, resume=True), whole(name))


@pytest.mark.parametrize(("reached", "at"), [(10, 4), (10, 3), (9, 9), (8, 1), (5, 2)])
def test_a_checkpoint_older_than_the_record_forgets_the_steps_behind_it(reached, at, tmp_path, whole):
    Loop(tmp_path / "run").record(reached)
    loop = Loop(tmp_path / "run").load(at)
    with explaind.record(loop.optimizer, loop.model, loop.path, data=cases.DATA, resume=True) as recorder:
        assert recorder.steps == at
        assert explaind.open(loop.path).steps == at
        while recorder.steps < LENGTH:
            loop.step(recorder)
    check_same(explaind.open(loop.path), whole())


def test_resuming_a_run_that_is_not_there_begins_it(tmp_path, whole):
    check_same(Loop(tmp_path / "run").record(LENGTH, resume=True), whole())


NURSERY = """
import json, os, sys, time, pytest
from tests import cases, test_resumed_recording as t
from pathlib import Path
cases.shorten_blocks(pytest.MonkeyPatch())
for line in sys.stdin:
    path, out, until, options = line.split(" ", 3)
    if (child := os.fork()) == 0:
        os.dup2(os.open(out, os.O_WRONLY), 1)
        loop = t.Loop(Path(path))
        def step(recorder, plain=loop.step):
            plain(recorder)
            print(recorder.steps, flush=True)
            while recorder.steps == 40 and os.path.exists(path + ".wait"):
                time.sleep(0.001)
        loop.step = step
        try:
            loop.record(int(until), **json.loads(options))
            print("recorded", flush=True)
        except Exception as error:
            print(type(error).__name__, error, flush=True)
        os._exit(0)
    print(child, flush=True)
"""


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """path, steps, options -> a process that records there, and a file with what it says; all come from one that has imported torch."""
    folder, root = tmp_path_factory.mktemp("said"), Path(__file__).parents[1]
    command = [sys.executable, "-c", NURSERY]
    with subprocess.Popen(command, cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as nursery:

        def started(path, until, **options):
            out = folder / f"{len(list(folder.iterdir()))}"
            os.mkfifo(out)
            print(path, out, until, json.dumps(options), file=nursery.stdin, flush=True)
            return int(nursery.stdout.readline()), out.open()

        yield started
        nursery.stdin.close()


@pytest.fixture(scope="module")
def killed(start, tmp_path_factory):
    """A copy of a recording that was killed when it had said that so many steps were done, or a few more."""

    @cache
    def once(after):
        folder = tmp_path_factory.mktemp("killed")
        child, said = start(folder / "run", 1000)
        with said:
            while int(said.readline()) < after:
                pass
            os.kill(child, signal.SIGKILL)
            said.read()  # to its end
        return folder

    return lambda folder, after: shutil.copytree(once(after), folder, dirs_exist_ok=True)


@pytest.mark.parametrize("after", [1, 6, 7, 10])
def test_a_training_that_was_killed_and_resumed_is_the_uninterrupted_one(after, tmp_path, killed):
    killed(tmp_path, after)
    run = explaind.open(tmp_path / "run")
    assert run.damage() == []
    assert run.steps + run.logged >= after  # not a step is lost
    length = run.steps + run.logged + 4
    loop = Loop(tmp_path / "run").load(after)  # the training's own checkpoint may be older than the record
    check_same(loop.record(length, resume=True), Loop(tmp_path / "whole").record(length))


def test_repair_takes_up_what_was_logged(tmp_path, capsys, killed):
    killed(tmp_path, 7)
    before = explaind.open(tmp_path / "run")
    steps, logged = before.steps, before.logged
    assert logged >= 2
    assert main(["info", str(before.path)]) == 0
    assert f"{logged} more steps: explaind repair takes them up" in capsys.readouterr().out
    assert main(["repair", str(before.path)]) == 0
    assert f"{logged} taken from its log" in capsys.readouterr().out
    after = explaind.open(before.path)
    assert (after.steps, after.logged, after.complete, after.damage()) == (steps + logged, 0, False, [])
    whole = Loop(tmp_path / "whole").record(after.steps)
    same(after.states(0, after.steps + 1), whole.states(0, whole.steps + 1))
    assert main(["repair", str(before.path)]) == 0
    assert "nothing to repair" in capsys.readouterr().out


@pytest.mark.parametrize("cut", [1, 10, 400, 700])
def test_a_log_that_is_cut_off_anywhere_gives_the_whole_steps_before_it(cut, tmp_path, killed):
    killed(tmp_path, 4)
    run = explaind.open(tmp_path / "run")
    have, log = run.logged, run.path / "tail.odd.log"
    log.write_bytes(log.read_bytes()[:-cut])
    left = run.logged
    assert 0 <= left < have
    assert repair(run.path).regained == left
    assert explaind.open(run.path).damage() == []


def test_a_log_that_is_used_again_gives_no_old_step_for_a_new_one(tmp_path):
    """Wherever it is cut off, and whichever of its bytes changes."""

    def record(step):
        row = StepRow(np.arange(3), np.zeros(3, np.int32), np.ones(3), np.ones((1, 1)), np.zeros(1, np.int32), (True,), None, None)
        return Record(step, row, np.full(4, float(step)))

    log = Log(tmp_path / NAMES[0])
    for step in range(100, 108):
        log.append(record(step))
    log.restart([record(110)])
    log.append(record(111))
    log.append(record(112))
    log.close()
    assert [kept.step for kept in records(tmp_path)] == [*range(103, 108), 110, 111, 112]
    text, rng = log.path.read_bytes(), np.random.default_rng(0)
    places = rng.integers(0, len(text), 300)
    changed = [text[:at] + bytes([text[at] ^ (1 << int(rng.integers(8)))]) + text[at + 1 :] for at in places]
    seen = set()
    for damaged in (*changed, *(text[:cut] for cut in range(0, len(text), 7))):
        log.path.write_bytes(damaged)
        found = following(records(tmp_path), 110).steps
        assert [kept.step for kept in found] == [110, 111, 112][: len(found)]
        assert all((kept.theta == kept.step).all() for kept in found)
        seen.add(len(found))
    assert seen == {0, 1, 2, 3}


def test_no_change_of_a_byte_of_the_log_gives_a_wrong_step(tmp_path, killed):
    killed(tmp_path, 7)
    run = explaind.open(tmp_path / "run")
    log, want = run.path / "tail.log", {record.step: record.theta for record in records(run.path)}
    text, rng = log.read_bytes(), np.random.default_rng(0)
    for place in rng.integers(0, len(text), 300):
        log.write_bytes(text[:place] + bytes([text[place] ^ (1 << int(rng.integers(8)))]) + text[place + 1 :])
        for record in following(records(run.path), run.steps).steps:
            same(record.theta, want[record.step])


@pytest.mark.parametrize("state", [4, 0])
def test_repair_cuts_a_damaged_run_off_before_the_fault(state, tmp_path, capsys):
    run = Loop(tmp_path / "run").record(LENGTH)
    group = zarr.open_group(run.path, mode="r+", use_consolidated=False)
    theta = group["theta"]
    theta[state, 3] = theta[state, 3] + 1.0
    assert run.damage()
    if state == 0:
        assert main(["repair", str(run.path)]) == 2
        assert "not even the first state" in capsys.readouterr().err
        return
    assert main(["info", str(run.path)]) == 0
    assert f"{LENGTH} steps" in (told := capsys.readouterr().out)
    assert f"{LENGTH} steps recorded, {state - 1} of them sound; examples and gradients are counted in these\n" in told
    assert f"DAMAGED     {state - 1} steps are sound of the {LENGTH} recorded" in told
    assert repair(run.path) == Repair(LENGTH, state - 1, 0, LENGTH - state + 1)
    after = explaind.open(run.path)
    assert (after.steps, after.complete, after.damage()) == (state - 1, False, [])
    assert cases.decomposed(after, cases.Problem("loop")).verify().ok


@pytest.mark.parametrize("name", ["batch", "theta", "preconditioner"])
def test_info_says_what_is_left_of_a_run_with_a_chunk_that_cannot_be_read(name, tmp_path, capsys):
    run = Loop(tmp_path / "run").record(LENGTH)
    chunk = sorted(file for file in (run.path / name / "c").rglob("*") if file.is_file())[2]  # of states, or steps, 6 to 8
    chunk.write_bytes(chunk.read_bytes()[:20])
    assert main(["info", str(run.path), "--json"]) == 0
    left = 5 if name == "theta" else 6
    assert (json.loads(capsys.readouterr().out)["sound"], explaind.open(run.path).sound()) == (left, left)
    assert main(["repair", str(run.path)]) == 0
    after = explaind.open(run.path)
    assert (after.steps, after.damage()) == (left, [])


def check_prefix(run, want):
    """Whatever of a run is there is what the whole one has."""
    assert run.damage() == []
    for state, row in run.stored(0, run.steps + 1).items():
        same(run._read("theta", slice(row, row + 1))[0], want.states(state, state + 1)[0])


@pytest.mark.parametrize("options", [{}, {"thin": 4}, {"gradients": "store"}, {"codec": "standard"}], ids=str)
def test_of_two_processes_on_one_path_one_records_and_one_is_refused(options, tmp_path, start):
    """And one that wants to go on with what another is recording; a reader meanwhile sees whole prefixes of the record.

    So does one that has opened it before: what it has opened stays as long as it was.
    """
    want, full = (Loop(tmp_path / name).record(80, **how) for name, how in (("whole", options), ("full", {})))
    wait = tmp_path / "run.wait"
    wait.touch()
    racing = [start(tmp_path / "run", 80, **options)[1] for _ in range(2)]
    while not (tmp_path / "run" / "commit.json").exists():
        time.sleep(0.001)
    assert "this run is being recorded" in last_line(start(tmp_path / "run", 80, resume=True, **options)[1])
    held, seen, complete = [explaind.open(tmp_path / "run")], list[int](), False
    while not complete:
        run = explaind.open(tmp_path / "run")
        check_prefix(run, full)
        if run.steps > held[-1].steps:
            held.append(run)
        seen.append(run.steps)
        complete = run.complete
        wait.unlink(missing_ok=True)
    said = sorted(last_line(file) for file in racing)
    assert said[1] == "recorded"
    assert re.match("StoreError (there is something here already|this run is being recorded)", said[0])
    assert seen == sorted(seen)
    assert len(set(seen)) > 1
    assert [run.steps for run in held] == sorted({held[0].steps, *seen})
    for run in held:
        check_prefix(run, full)
    run = explaind.open(tmp_path / "run")
    assert (run.identity, run.complete, run.damage()) == (want.identity, True, [])


@pytest.mark.parametrize("options", [{}, {"thin": 4}, {"gradients": "store"}, {"codec": "standard"}], ids=str)
@pytest.mark.parametrize("how", ["resume", "overwrite"])
def test_a_run_that_was_opened_before_it_changed_reads_what_stands_there_now(how, options, tmp_path):
    """It goes back to an earlier step and on from there with other numbers, or another one takes its place."""
    Loop(tmp_path / "run").record(9, **options)
    held = explaind.open(tmp_path / "run")
    loop = Loop(tmp_path / "run").load(4)
    loop.optimizer.param_groups[0]["lr"] *= 2
    now = loop.record(9, **{how: True}, **options)
    assert (held.steps, held.damage()) == (9, [])
    for state in now.stored(0, 10):
        same(held.states(state, state + 1), now.states(state, state + 1))


def last_line(file):
    with file:
        return file.read().splitlines()[-1]


def test_a_second_recorder_on_one_path_is_refused(tmp_path):
    loop, other = Loop(tmp_path / "run"), Loop(tmp_path / "run")
    with explaind.record(loop.optimizer, loop.model, loop.path) as recorder:
        loop.step(recorder)
        with pytest.raises(StoreError, match="there is something here already"):
            explaind.record(other.optimizer, other.model, other.path)
        with pytest.raises(StoreError, match="this run is being recorded"):
            explaind.record(other.optimizer, other.model, other.path, resume=True)
        assert explaind.open(loop.path).steps == 0  # a reader sees what is committed
        loop.step(recorder)
    assert (explaind.open(loop.path).steps, explaind.open(loop.path).damage()) == (2, [])


def test_batch_norm_and_dropout_go_on_too(tmp_path):
    def network():
        return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Dropout(0.3), torch.nn.Linear(4, 2))

    want = Loop(tmp_path / "whole", network=network).record(LENGTH)
    Loop(tmp_path / "run", network=network).record(5)
    got = Loop(tmp_path / "run", network=network).load(5).record(LENGTH, resume=True)
    assert got.identity == want.identity
    assert got.damage() == []
    same(got.states(0, LENGTH + 1), want.states(0, LENGTH + 1))


def without_a_checkpoint(path):
    return Loop(path).record(LENGTH, resume=True)


def with_the_model_alone(path):
    loop = Loop(path)
    loop.model.load_state_dict(torch.load(loop.file(5))["model"])
    return loop.record(LENGTH, resume=True)


def with_another_optimizer(path):
    return Loop(path, "sgd").record(LENGTH, resume=True)


def with_another_model(path):
    return Loop(path, network=cases.tied).record(LENGTH, resume=True)


def with_a_changed_model(path):
    loop = Loop(path).load(5)
    with torch.no_grad():
        loop.model[0].bias.add_(1e-3)
    return loop.record(LENGTH, resume=True)


def with_damage(path):
    chunk = next(p for p in sorted((path / "theta").rglob("*")) if p.is_file() and p.name != "zarr.json")
    shutil.copy(chunk, chunk.with_name("0") if chunk.name != "0" else chunk.parent.parent / "1" / "0")
    return Loop(path).load(5).record(LENGTH, resume=True)


REFUSED = (
    (with_the_model_alone, "the optimizer has not made the steps of the run.*expected 5 updates; got 0"),
    (with_another_optimizer, "another training.*optimizers"),
    (with_another_model, "another training.*layers"),
    (with_a_changed_model, "the model is in none of the run's states.*load the training's checkpoint"),
    (with_damage, "the run is damaged"),
)


@pytest.mark.parametrize(("fault", "message"), REFUSED, ids=[fault.__name__ for fault, _ in REFUSED])
def test_what_cannot_go_on_is_refused_and_the_run_stays(fault, message, tmp_path):
    before = Loop(tmp_path / "run").record(5)
    states = before.states(0, 6)
    with pytest.raises(RecordError, match=message):
        fault(tmp_path / "run")
    after = explaind.open(tmp_path / "run")
    assert (after.steps, after.complete) == (5, True)
    if fault is not with_damage:
        same(after.states(0, 6), states)


def test_a_fresh_model_resumes_at_the_beginning(tmp_path, whole):
    """Its parameters are the run's first state: the training begins anew, as it would without a checkpoint."""
    Loop(tmp_path / "run").record(5)
    check_same(without_a_checkpoint(tmp_path / "run"), whole())
    assert np.isfinite(explaind.open(tmp_path / "run").states(0, 1)).all()


def test_who_finds_a_folder_taken_between_two_looks_writes_nothing_into_it(tmp_path, monkeypatch):
    """Another recorder has begun, and even ended, since the folder was looked at."""
    check = schema.check_new

    def late(path, but=()):
        check(path, but)
        if not but:
            monkeypatch.setattr(schema, "check_new", check)
            Loop(path).record(LENGTH)
            before.update({file: file.read_bytes() for file in path.rglob("*") if file.is_file()})

    before = dict[Path, bytes]()
    monkeypatch.setattr(schema, "check_new", late)
    with pytest.raises(StoreError, match="something here already"):
        Loop(tmp_path / "run").record(LENGTH)
    assert before
    assert {file: file.read_bytes() for file in before} == before
    assert explaind.open(tmp_path / "run").damage() == []
