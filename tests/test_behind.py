"""Writing behind the training: slow, short and failing writes; what is on disk afterwards, and what the training is told."""

import errno
import gc
import itertools
import os
import shutil
import stat
import threading
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr.storage._local as local
from torch import nn, optim

import explaind
from explaind.cli import main
from explaind.errors import StoreError
from explaind.record import recorder as recording
from explaind.store import durable, filed, schema, span, tail, thin
from explaind.store.reader import open_run
from explaind.store.repair import repair
from explaind.store.sealed import read_sealed
from explaind.store.writer import RunWriter
from tests import cases
from tests.closeness import same
from tests.stopped import nothing_but, same_ledger, save_at_every_segment

CASE = cases.optimizer_named("adamw")


def record(path, **options):
    torch.manual_seed(0)  # which the manifest tells
    model = cases.PLAIN.model()
    optimizer = CASE.make(cases.trainable(model))
    with explaind.record(optimizer, model, path, data=cases.DATA, **options) as recorder:
        cases.train(cases.PLAIN, model, optimizer, CASE, recorder)


def recorded(path, **options):
    record(path, **options)
    return explaind.open(path)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        cases.shorten_blocks(patch)
        return recorded(tmp_path_factory.mktemp("whole") / "run")


def on_write(patch, act):
    """Call act(bytes to write) before every write to disk, of a log, a chunk, metadata or the marker, every renaming and read of a log."""
    log, chunk, anew = os.pwritev, local._put, durable.written

    def append(file, views, at):
        return log(file, [act(b"".join(views))], at)

    def before(call):
        def called(*args, **options):
            act(b"")
            return call(*args, **options)

        return called

    def fsync(file):  # nothing is synced: a full disk is looked for here, no power cut
        if not stat.S_ISDIR(os.fstat(file).st_mode):
            act(b"")

    patch.setattr(os, "pwritev", append)
    patch.setattr(local, "_put", before(chunk))  # of a ledger
    patch.setattr(os, "fsync", fsync)
    for name in ("preadv", "replace", "rename"):
        patch.setattr(os, name, before(getattr(os, name)))
    for module in (durable, filed):
        patch.setattr(module, "written", before(anew))


def test_a_span_is_written_by_a_thread_of_its_own_while_the_training_goes_on(tmp_path, monkeypatch):
    cases.shorten_blocks(monkeypatch)
    seen, write = [], RunWriter._write

    def watched(self, span, *args, **options):
        seen.append((threading.current_thread().name, span.start, len(span.entries)))
        write(self, span, *args, **options)

    monkeypatch.setattr(RunWriter, "_write", watched)
    run = recorded(tmp_path / "run")
    assert [part[1:] for part in seen] == [(0, 3), (3, 3), (6, 1)]
    assert all(name.startswith("explaind-writer") for name, *_ in seen[:2])
    assert run.damage() == []
    assert not [path.name for path in run.path.iterdir() if "tail" in path.name]


def test_nothing_is_asked_of_an_event_loop_while_somebody_trains(tmp_path, monkeypatch, whole):
    """Zarr's own has threads and caches that a small training would pay more for than for its parameters."""
    cases.shorten_blocks(monkeypatch)
    asked = list[int]()
    monkeypatch.setattr("zarr.core.sync._get_loop", lambda: asked.append(1))
    record(tmp_path / "run")
    monkeypatch.undo()
    assert asked == []
    assert explaind.open(tmp_path / "run").identity == whole.identity


def test_a_slow_disk_holds_the_training_up_and_loses_nothing(tmp_path, monkeypatch, whole):
    cases.shorten_blocks(monkeypatch)
    write, ahead = RunWriter._write, []

    def slow(self, span, *args, **options):
        time.sleep(0.2)
        write(self, span, *args, **options)
        ahead.append(self.steps - span.stop)

    monkeypatch.setattr(RunWriter, "_write", slow)
    run = recorded(tmp_path / "run")
    assert (run.identity, run.complete, run.damage()) == (whole.identity, True, [])
    assert max(ahead) <= 3, "the training is never more than the span behind it ahead"


def test_blocks_that_are_written_together_are_the_same_record(tmp_path, monkeypatch, whole):
    cases.shorten_blocks(monkeypatch)
    monkeypatch.setattr(recording, "TOGETHER", 2)
    run = recorded(tmp_path / "run")
    assert (run.manifest.block, run.manifest.span, run.damage()) == (3, 6, [])
    same(run.states(0, 8), whole.states(0, 8))
    same(cases.decomposed(run).rows["data"].values, cases.decomposed(whole).rows["data"].values)


@pytest.mark.parametrize("options", [{}, {"thin": 3}, {"gradients": "store"}, {"codec": "standard"}], ids=str)
def test_large_batches_are_read_back_from_the_log_and_are_the_same_record(options, tmp_path, monkeypatch):
    cases.shorten_blocks(monkeypatch)
    torch.manual_seed(0)
    small = cases.recorded(tmp_path / "small", data=cases.DATA, **options)
    monkeypatch.setattr(span, "LARGE", 1)
    monkeypatch.setattr(thin, "LOGGED", 2)
    torch.manual_seed(0)
    large = cases.recorded(tmp_path / "large", data=cases.DATA, **options)
    assert (large.identity, large.damage()) == (small.identity, [])
    for name in ("batch", "part", "weight"):
        same(large._read(name, slice(None)), small._read(name, slice(None)))


@pytest.mark.parametrize("sizes", [[5, 5], [2, 2, 2, 5], [5, 2], [2, 5, 3, 2]], ids=str)
@pytest.mark.parametrize("end", ["closed", "killed", "url"])
def test_gradients_of_the_largest_batch_stay_where_it_is_in_the_last_span(sizes, end, tmp_path, monkeypatch):
    cases.shorten_blocks(monkeypatch)
    monkeypatch.setattr(span, "LARGE", 3)
    model, path = torch.nn.Linear(2, 1), f"memory://large/{'-'.join(map(str, sizes))}" if end == "url" else tmp_path / "run"
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    recorder = explaind.record(optimizer, model, path, gradients="store", **({"spool": tmp_path / "spool"} if end == "url" else {}))
    for size in sizes:
        recorder.examples(range(size))
        optimizer.zero_grad()
        model(torch.randn(size, 2)).square().mean().backward()
        optimizer.step()
    if end == "killed":
        shutil.copytree(tmp_path / "run", tmp_path / "left")
        repair(tmp_path / "left")
    recorder.close()
    for place in (path, *([tmp_path / "left"] if end == "killed" else [])):
        run = explaind.open(place)
        assert (run.steps, run.damage()) == (len(sizes), [])
        assert [len(run.gradients(step, 0, size)) for step, size in enumerate(sizes)] == sizes


def test_recording_holds_less_than_two_copies_of_the_parameters(tmp_path):
    """What Python and numpy allocate, in the thread that writes too; the tensors of hooks are not counted here (experiments/overhead)."""

    def training(path, steps):
        torch.manual_seed(0)
        model = torch.nn.Sequential(
            torch.nn.Linear(16, 330), torch.nn.ReLU(), torch.nn.Linear(330, 330), torch.nn.ReLU(), torch.nn.Linear(330, 2)
        )
        optimizer, x, ids = torch.optim.AdamW(model.parameters(), lr=1e-3), torch.randn(2000, 16), torch.arange(2000)
        with explaind.record(optimizer, model, path) as recorder:
            for _ in range(steps):
                recorder.examples(ids)
                optimizer.zero_grad()
                torch.nn.functional.cross_entropy(model(x), ids % 2).backward()
                optimizer.step()
        return 4 * sum(p.numel() for p in model.parameters())

    training(tmp_path / "warm", 20)  # what is loaded once is no recording's
    gc.collect()
    tracemalloc.start()
    try:
        copy = training(tmp_path / "run", 40)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert explaind.open(tmp_path / "run").manifest.span < 40
    assert peak < 2 * copy, f"{peak / copy:.2f} copies"


def test_a_file_that_takes_less_than_it_is_given_is_written_on(tmp_path, monkeypatch, whole):
    cases.shorten_blocks(monkeypatch)
    on_write(monkeypatch, lambda text: text[:50])
    assert recorded(tmp_path / "run").identity == whole.identity


def test_chunks_and_the_marker_too(tmp_path, monkeypatch, whole):
    cases.shorten_blocks(monkeypatch)
    write, cut = os.write, list[int]()

    def few(number, text):
        cut.append(len(text) > 50)
        return write(number, text[:50])

    monkeypatch.setattr(os, "write", few)
    run = recorded(tmp_path / "run")
    monkeypatch.undo()
    assert sum(cut) > 100
    assert (run.identity, run.damage()) == (whole.identity, [])
    for file in ("commit.json", "zarr.json", *(f"theta/c/{i}/0" for i in range(3))):
        assert (run.path / file).stat().st_size > 50
        got, want = ((one.path / file).read_text("latin-1").replace(one.attributes["recording"], "") for one in (run, whole))
        assert got == want, file


FAILING = (({}, 1), ({"thin": 3}, 5), ({"gradients": "store"}, 7))
"""With so many writes from one that fails to the next."""


@pytest.mark.parametrize(("options", "stride"), FAILING, ids=["full", "thin", "gradients"])
def test_any_write_may_fail(options, stride, tmp_path, whole, capsys):
    told = list[str]()
    want = cases.recorded(tmp_path / "whole", case=CASE, **options)

    def check(run, steps):
        assert (run.steps, run.damage()) == (steps, [])
        for state, row in run.stored(0, steps + 1).items():
            same(run._read("theta", slice(row, row + 1))[0], whole.states(state, state + 1)[0])
        if "gradients" in options:
            for step in range(steps):
                count = len(cases.STEPS[step][0])
                same(run.gradients(step, 0, count), want.gradients(step, 0, count))

    for k in itertools.count(0, stride):
        path, count, code = tmp_path / f"run{k}", itertools.count(), (errno.ENOSPC, errno.EIO)[k // stride % 2]

        def fail(text, count=count, k=k, code=code):
            if next(count) >= k:  # a disk that is full stays full
                raise OSError(code, os.strerror(code))
            return text

        try:
            with pytest.MonkeyPatch.context() as patch:
                cases.shorten_blocks(patch)
                patch.setattr(thin, "LOGGED", 2)
                on_write(patch, fail)
                recorded(path, **options)
            break
        except StoreError as error:
            told.append(str(error))
        assert told[-1].startswith(f"cannot write: {os.strerror(code)} ({path}")
        assert "\n" not in told[-1]
        if not (path / "commit.json").exists():
            with pytest.raises(StoreError):
                open_run(path)
            continue
        run = explaind.open(path)
        assert run.complete == (run.steps == whole.steps and not (path / "metadata.json").exists())  # of that alone there is no copy then
        check(run, run.steps)
        if len(told) % 3:  # what follows takes most of the time
            continue
        assert main(["info", str(path)]) == 0
        have = run.steps + run.logged
        repair(path)
        check(explaind.open(path), have)
    capsys.readouterr()
    assert len(told) * stride == k > 40, "every write of the recording has failed once"


def test_where_a_disk_was_full_from_the_start_a_recording_can_begin_again(tmp_path, monkeypatch):
    write = os.write

    def half(number, text):
        write(number, bytes(text)[:10])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", half)
        with pytest.raises(StoreError, match="cannot write: No space left on device"):
            record(tmp_path / "run")
    assert list((tmp_path / "run").iterdir()) == []
    assert recorded(tmp_path / "run").damage() == []


def test_what_is_left_of_a_recording_that_was_killed_while_it_began_can_be_overwritten(tmp_path, monkeypatch, whole):
    """As it stands on disk before every renaming up to the first commit."""
    cases.shorten_blocks(monkeypatch)
    left = list[Path]()

    def before(call):
        def called(*args):
            if not (tmp_path / "run" / "commit.json").exists():
                left.append(tmp_path / f"left{len(left)}")
                shutil.copytree(tmp_path / "run", left[-1])
            return call(*args)

        return called

    with monkeypatch.context() as patch:
        for name in ("rename", "replace"):
            patch.setattr(os, name, before(getattr(os, name)))
        record(tmp_path / "run")
    assert {file.name for file in left[0].iterdir()} == {"tail.log", "zarr.json.partial"}
    assert len(left) > 10
    for path in (left[0], left[1], *left[2::5], left[-1]):
        with pytest.raises(StoreError, match="there is something here already"):
            record(path)
        run = recorded(path, overwrite=True)
        assert (run.identity, run.damage()) == (whole.identity, [])
    (left[0] / "another's").touch()
    (left[0] / "zarr.json").unlink()
    with pytest.raises(StoreError, match="this is not a run"):
        record(left[0], overwrite=True)
    assert (left[0] / "another's").exists()


def test_of_two_who_begin_at_once_one_is_refused_where_nothing_can_be_locked(tmp_path, monkeypatch, whole):
    """As on Windows: the other one has begun since the place was looked at."""
    monkeypatch.setattr(tail, "fcntl", None)
    looked = schema.check_new

    def late(place, but=()):
        looked(place, but)
        if not (place / "zarr.json").exists() and "tail.log" in but:
            (place / "zarr.json").write_text("another's")

    monkeypatch.setattr(schema, "check_new", late)
    with pytest.raises(StoreError, match="there is something here already"):
        record(tmp_path / "run")
    assert (tmp_path / "run" / "zarr.json").read_text() == "another's"


@pytest.mark.parametrize("options", [{}, {"resume": True}], ids=["new", "gone on with"])
def test_a_log_that_cannot_be_opened_is_one_line(options, tmp_path, monkeypatch, whole):
    """As where a file system has no inode left."""
    if options:
        shutil.copytree(whole.path, tmp_path / "run")

    def full(path, *args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    model = cases.PLAIN.model()
    optimizer = CASE.make(cases.trainable(model))
    monkeypatch.setattr(tail, "FileIO", full)
    with pytest.raises(StoreError, match="cannot write: No space left on device") as error:
        explaind.record(optimizer, model, tmp_path / "run", data=cases.DATA, **options)
    assert "\n" not in str(error.value)


def test_any_write_of_a_decomposition_may_fail(tmp_path, whole):
    """The ledger is not there then; what was saved on the way is whole, and is gone on with to the undisturbed ledger."""
    asked, told, folder = {"keep": ("query", "output", "layer")}, list[str](), tmp_path / ".val.parts"
    want = cases.decomposed(whole, **asked)
    for k in itertools.count():
        count, code, failed = itertools.count(), (errno.ENOSPC, errno.EIO)[k % 2], list[int]()

        def fail(text, count=count, k=k, code=code, failed=failed):
            if next(count) >= k:  # a disk that is full stays full
                failed.append(k)
                raise OSError(code, os.strerror(code))
            return text

        try:
            with pytest.MonkeyPatch.context() as patch:
                save_at_every_segment(patch)
                on_write(patch, fail)
                cases.decomposed(whole, save=tmp_path / "val", **asked)
            if not failed:
                break
            same_ledger(explaind.open_ledger(tmp_path / "val"), want)  # it is there: what could not be cleared up is no fault
            for path in tmp_path.iterdir():
                shutil.rmtree(path)
            continue
        except StoreError as error:
            told.append(str(error))
        assert told[-1].startswith(f"cannot write: {os.strerror(code)} ({tmp_path}")
        assert "\n" not in told[-1]
        assert {path.name for path in tmp_path.iterdir()} <= {folder.name}
        assert all(read_sealed(path) is not None for path in folder.glob("block-*"))
        if k % 12 == 5:
            same_ledger(cases.decomposed(whole, save=tmp_path / "val", **asked), want)
            same_ledger(explaind.open_ledger(tmp_path / "val"), want)
            shutil.rmtree(tmp_path / "val")
        shutil.rmtree(folder, ignore_errors=True)
    assert k > len(told) > 40, "every write of the decomposition has failed once"
    nothing_but(tmp_path / "val")


def test_a_run_that_is_being_recorded_is_not_overwritten(tmp_path):
    model = cases.PLAIN.model()
    optimizer = CASE.make(cases.trainable(model))
    with explaind.record(optimizer, model, tmp_path / "run") as recorder:
        cases.train(cases.PLAIN, model, optimizer, CASE, recorder)
        for options in ({"overwrite": True}, {"resume": True}):
            with pytest.raises(StoreError, match="this run is being recorded"):
                explaind.record(optimizer, model, tmp_path / "run", **options)
    assert explaind.open(tmp_path / "run").complete


def test_memory_of_a_recording_does_not_grow_with_its_steps(tmp_path, monkeypatch):
    """What is kept of a step is small; numpy's memory is traced."""
    params = 200_000
    model = nn.Linear(params, 1, bias=False)
    optimizer = optim.Adam(model.parameters())

    def peak(steps):
        tracemalloc.start()
        with explaind.record(optimizer, model, tmp_path / f"run{steps}") as recorder:
            for _ in range(steps):
                recorder.examples([0])
                model(model.weight.new_ones(1, params)).sum().backward()
                optimizer.step()
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most

    peak(2)  # imports
    short, long = peak(40), peak(160)
    assert long - short < 10 * 4 * params, "120 more steps, of two vectors each, took less than ten vectors"
    assert np.isfinite(short)
