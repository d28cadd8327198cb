"""Chunks that a recording encodes and puts by itself: the files that zarr would make, and safe on the disk before a marker counts them."""

import errno
import json
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import torch
import zarr
from hypothesis import given, settings
from hypothesis import strategies as some
from zarr.codecs import BytesCodec

import explaind
from explaind.errors import StoreError
from explaind.store import described, durable, filed, location, schema
from explaind.store.described import Described
from explaind.store.filed import created, growing, settle, write_finished
from explaind.store.growing import Put
from explaind.store.repair import repair
from explaind.store.schema import Column
from tests import cases
from tests.closeness import same
from tests.test_bitdelta import KINDS, LIMITS, every_dtype

COLUMNS = (
    Column("theta", ("state", "param"), "float32", (11,), codec="bitdelta"),
    Column("preconditioner", ("step", "param"), "float32", (11,), codec="bitdelta", tile=4),
    Column("momentum", ("anchor", "param"), "float64", (11,)),
    Column("state", ("anchor", "word"), "uint32", (1,), 0, 4, "apart"),
    Column("batch", ("step", "slot"), "int64", (1,), -1, 4),
    Column("consumed", ("step", "layer", "size"), "float64", (3, 2), np.nan),
    Column("gap", ("step",), "int64", ()),
    Column("gradient", ("step", "slot", "param"), "float16", (1, 5), 0, 4, "quick"),
)


def written(folder, column, make, write):
    """The files of an array that is made and written to in this way, by their names."""
    zarr.create_group(folder, zarr_format=3)
    array = make({column: 1 if column.name == "gradient" else 4}, folder)[column.name]
    for _ in write(array):
        settle([array], folder)
    settle([array], folder)
    return files(folder)


def files(folder):
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def rows(column, count, wide, seed):
    found = np.random.default_rng(seed).standard_normal((count, *column.shape)) * 100
    return np.repeat(found, wide, 1).astype(column.dtype) if column.chunk else found.astype(column.dtype)


def spans(column):
    """As a recording writes them: whole chunks, narrow and wide ones, such as are not filled, and one that is only begun."""

    def write(array):
        for seed, (at, count, wide) in enumerate([(0, 4, 2), (4, 4, 6), (8, 4, 1), (12, 2, 3)]):
            values = rows(column, count, wide, seed)
            array.append(values, at)
            if at == 8:
                array.append(np.full_like(values, column.fill), at)
            yield
        if column.dims[0] == "anchor":  # behind a gap
            array.append(rows(column, 3, 2, 9), 14)
            yield
        array.append(rows(column, 4, 6, 10), 4)
        array.append(rows(column, 4, 1, 11), 4)

    return write


def puts(column):
    def write(array):
        for row, wide in enumerate([3, 5, 0, 9]):
            array.put(row, rows(column, 1, 1, row)[0].repeat(wide, 0), 2)
            yield
        array.trim((3, 9, 5))

    return write


def reading(values, fill):
    def read(out, row, start):
        part = values[row : row + len(out), start : start + out.shape[1]]
        out[:, : part.shape[1]], out[:, part.shape[1] :] = part, fill

    return read


def streamed(column):
    """The same, read piece by piece."""

    class Streaming:
        def __init__(self, array):
            self._array = array

        def append(self, values, at):
            self._array.stream(at, len(values), values.shape[1], reading(values, column.fill))

    return lambda array: spans(column)(Streaming(array))


def by_zarr(columns, folder):
    group = zarr.open_group(folder, mode="r+")
    return {column.name: Put(schema.create_column(group, column, rows)) for column, rows in columns.items()}


@pytest.mark.parametrize("column", COLUMNS, ids=lambda column: column.name)
def test_the_files_are_those_that_zarr_makes(column, tmp_path):
    write = puts(column) if column.name == "gradient" else spans(column)
    (tmp_path / "own").mkdir()
    got = written(tmp_path / "own", column, created, write)
    want = written(tmp_path / "zarr", column, by_zarr, write)
    assert sorted(got) == sorted(want)
    assert got == want


FINISHED = {
    "constant/scale": np.float32(2.5),
    "constant/zero": np.zeros((), np.int64),
    "constant/mask.kept": np.array([[True, False, True]]),
    "constant/mask.none": np.zeros((2, 3), bool),
    "constant/empty": np.zeros((0, 3), np.float16),
    "constant/blocks%2F0.weight": np.arange(12, dtype=np.float64).reshape(3, 4).T,
    "constant/spectrum": np.array([1 + 2j, -0.0j], np.complex64),
    "constant/flat": np.zeros(2, np.complex128),
    "constant/bytes": np.arange(5, dtype=np.uint8),
    "constant/signs": np.array([-0.0, 0.0]),
    "fingerprint": np.arange(300, dtype=np.uint32),
}


def test_finished_arrays_are_those_that_zarr_makes(tmp_path):
    for name in ("own", "zarr"):
        zarr.create_group(tmp_path / name, zarr_format=3)
    arrays = {name: (np.asarray(values), [f"axis{i}" for i in range(np.ndim(values))]) for name, values in FINISHED.items()}
    write_finished(arrays, tmp_path / "own")
    for name, (values, dims) in arrays.items():
        schema.write_array(zarr.open_group(tmp_path / "zarr", mode="r+"), name, values, tuple(dims))
    got, want = (files(tmp_path / name) for name in ("own", "zarr"))
    assert sorted(got) == sorted(want)
    assert got == want
    for name, values in FINISHED.items():
        found = zarr.open_group(tmp_path / "own")[name][...]
        assert found.dtype == values.dtype
        assert found.tobytes() == np.ascontiguousarray(values).tobytes()


@pytest.mark.parametrize("attributes", [{}, {"manifest": {"layers": ["a", "é"], "lr": 1e-3, "none": None, "deep": [[True]]}}])
def test_a_group_is_told_as_zarr_tells_it(attributes, tmp_path):
    zarr.create_group(tmp_path, zarr_format=3, attributes=attributes)
    assert described.group(attributes) == (tmp_path / "zarr.json").read_bytes()


@pytest.mark.filterwarnings("ignore:The data type:zarr.errors.UnstableSpecificationWarning")
def test_codecs_that_no_recording_writes_are_refused(tmp_path):
    group = zarr.create_group(tmp_path / "run", zarr_format=3)
    others = {"plain": {"compressors": None}, "big": {"serializer": BytesCodec(endian="big")}, "text": {"dtype": "U4"}}
    for name, options in others.items():
        array = group.create_array(name, shape=(4,), **{"dtype": "float32", **options})
        with pytest.raises(StoreError, match=rf"codecs that no recording writes \({name}\)"):
            growing(array, tmp_path / "run")


FILLS = {
    "float64": (np.nan, np.inf, -np.inf, -0.0, 1.5),
    "complex64": (0, 1 - 2j, complex(np.nan, -np.inf)),
    "int8": (-1,),
    "bool": (True,),
}


@pytest.mark.parametrize(("dtype", "fill"), [(dtype, fill) for dtype, fills in FILLS.items() for fill in fills])
def test_a_fill_value_is_read_as_it_was_told(dtype, fill, tmp_path):
    codecs = {"compressors": [schema.lossless()]}
    array = zarr.create_array(
        tmp_path / "a", shape=(0, 2), chunks=(3, 2), dtype=dtype, fill_value=fill, dimension_names=["x", "y"], **codecs
    )
    own = described.column(Column("a", ("x", "y"), dtype, (2,), fill), 3)
    assert own.text((0, 2)) == (tmp_path / "a" / "zarr.json").read_bytes()
    for found in (own, Described("a", array.metadata.to_dict())):
        assert (found.fill_value.dtype, found.fill_value.tobytes()) == (dtype, np.dtype(dtype).type(fill).tobytes())


def test_what_stands_beside_the_shape_is_left_as_it_is(tmp_path):
    """Whatever somebody has noted there."""
    options = {"shape": (4, 2), "chunks": (2, 2), "dtype": "float32", "compressors": [schema.lossless()], "attributes": {"why": "?"}}
    array = zarr.create_array(tmp_path / "a", **options)
    want = json.loads((tmp_path / "a" / "zarr.json").read_text())
    found = json.loads(Described("a", array.metadata.to_dict()).text((6, 3)))
    assert found == {**want, "shape": [6, 3]}


def test_a_new_file_is_whole_or_not_there(tmp_path, monkeypatch):
    write = os.write

    def half(number, text):
        write(number, bytes(text)[:3])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "write", half)
    with pytest.raises(OSError, match="No space left"):
        durable.write_new(tmp_path / "a", b"one")
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    durable.write_new(tmp_path / "a", b"one")
    with pytest.raises(FileExistsError):
        durable.write_new(tmp_path / "a", b"two")
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [("a", b"one")]


def test_a_folder_that_cannot_be_listed_is_told(tmp_path, monkeypatch):
    """What is in it would not be synced."""
    scan = os.scandir

    def broken(path):
        if str(path).endswith("theta"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return scan(path)

    (tmp_path / "run" / "theta").mkdir(parents=True)
    monkeypatch.setattr(os, "scandir", broken)
    with pytest.raises(OSError, match="Input/output error"):
        durable.sync_tree(tmp_path / "run", tmp_path)


@pytest.mark.parametrize("column", [column for column in COLUMNS if len(column.dims) == 2], ids=lambda column: column.name)
def test_they_are_so_too_where_rows_are_read_piece_by_piece(column, tmp_path):
    (tmp_path / "own").mkdir()
    got = written(tmp_path / "own", column, created, streamed(column))
    assert got == written(tmp_path / "zarr", column, by_zarr, spans(column))
    assert written(tmp_path / "streamed", column, by_zarr, streamed(column)) == got


@pytest.mark.parametrize("column", COLUMNS[:3], ids=lambda column: column.name)
def test_a_row_that_is_on_disk_is_read_piece_by_piece(column, tmp_path):
    column, values = replace(column, shape=(40,)), rows(replace(column, shape=(40,)), 6, 1, 0)
    (tmp_path / "run").mkdir()
    array = created({replace(column, chunk=None): 4}, tmp_path / "run")[column.name]
    array.append(values, 0)
    settle([array], tmp_path / "run")
    for row in range(6):
        read = array.row(row)
        for start, stop in ((0, 5), (5, 7), (7, 40), (3, 9), (38, 60), (40, 50)):
            same(read(start, stop), values[row, start:stop])


extents, chunk_rows = some.tuples(some.integers(0, 14), some.integers(1, 40)), some.integers(1, 6)


@every_dtype
@pytest.mark.parametrize("codec", sorted(schema.CODECS))
@settings(LIMITS, max_examples=30)
@given(
    extents, chunk_rows, some.none() | some.integers(1, 41), some.none() | some.integers(1, 40), some.integers(0, 14),
    some.sampled_from(sorted(KINDS)), some.integers(0, 99), some.sampled_from([0, 1]), some.sampled_from(["whole", "in pieces", "deep"]),
)  # fmt: skip
def test_what_a_recording_packs_zarr_reads_bitwise(codec, dtype, shape, height, chunk, tile, cut, kind, seed, fill, way):
    """Any bits, in chunks of any width; in two spans, of which the second begins anywhere, but for rows of matrices at a chunk."""
    cut = min(cut, shape[0])
    if way == "deep":
        shape, cut = (*shape, 3), cut - cut % height
    values = KINDS[kind](np.random.default_rng(seed), shape, dtype)
    dims = ("step", "slot", "param")[: len(shape)]
    column = Column("a", dims, dtype, shape[1:], fill, chunk, codec, tile if len(shape) == 2 else None)
    with TemporaryDirectory() as folder:
        place = Path(folder)
        zarr.create_group(place, zarr_format=3)
        array = created({column: height}, place)["a"]
        for start, part in ((0, values[:cut]), (cut, values[cut:])):
            if way == "in pieces":
                array.stream(start, len(part), shape[1], reading(part, fill))
            else:
                array.append(part, start)
            settle([array], place, synced=False)
        same(zarr.open_group(place, mode="r")["a"][...], values)
        if way != "deep" and len(values):
            row = min(cut, len(values) - 1)
            read = array.row(row)
            same(np.concatenate([read(0, cut), read(cut, shape[1])]), values[row])


def test_zeros_of_both_signs_and_nans_are_kept(tmp_path):
    values = np.array([[0.0] * 11, [-0.0] * 11, [np.nan] * 11, [0.0] * 11], np.float32)
    written(tmp_path / "run", COLUMNS[0], created, lambda array: [array.append(values, 0)])
    same(zarr.open_group(tmp_path / "run")["theta"][...], values)


def record(path):
    torch.manual_seed(0)
    model = cases.PLAIN.model()
    case = cases.optimizer_named("adamw")
    optimizer = case.make(cases.trainable(model))
    with explaind.record(optimizer, model, path, data=cases.DATA) as recorder:
        cases.train(cases.PLAIN, model, optimizer, case, recorder)


@pytest.fixture
def short_spans(monkeypatch):
    cases.shorten_blocks(monkeypatch)


@pytest.mark.usefixtures("short_spans")
def test_all_that_a_marker_counts_was_synced_before_it_was_put(tmp_path, monkeypatch):
    """Whatever bytes stand in the run then, under names that the disk has too, down from the folder that was there."""
    sync, put, path = os.fsync, os.replace, tmp_path / "new" / "newer" / "run"
    safe, named, markers = {}, set(), []

    def fsync(number):
        sync(number)
        name = Path(f"/proc/self/fd/{number}").resolve()
        status = os.stat(name)
        if name.is_dir():
            named.update((child.name, child.stat().st_ino, name) for child in name.iterdir())
        else:
            safe[status.st_ino] = (status.st_size, status.st_mtime_ns)

    def replace(source, target):
        if Path(target) == path / "commit.json":
            markers.append(target)
            for file in (tmp_path / "new").rglob("*"):
                if "tail" in file.name or file.name.endswith(".partial") or file == path / "commit.json":
                    continue
                status = file.stat()
                assert (file.name, status.st_ino, file.parent) in named, f"the name of {file} at marker {len(markers)}"
                assert file.is_dir() or safe.get(status.st_ino) == (status.st_size, status.st_mtime_ns), f"{file} at {len(markers)}"
        elif markers and Path(target).exists() and Path(target).suffix != ".log":
            status = os.stat(source)
            assert safe.get(status.st_ino) == (status.st_size, status.st_mtime_ns), f"{target} was replaced by what is not on the disk"
        put(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        patch.setattr(location.os, "replace", replace)
        record(path)
    assert len(markers) == 4
    assert "new" in {name for name, _, _ in named}
    assert explaind.open(path).complete


@pytest.mark.usefixtures("short_spans")
@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
def test_a_disk_that_does_not_sync_ends_the_recording(code, tmp_path, monkeypatch):
    """From the second marker on: the training is told in one line, and what was committed before opens."""
    sync, path = os.fsync, tmp_path / "run"

    def fsync(number):
        if (path / "theta" / "c" / "0" / "0").exists() and "1" in Path(f"/proc/self/fd/{number}").resolve().parts:
            raise OSError(code, os.strerror(code))
        sync(number)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        with pytest.raises(StoreError, match=os.strerror(code)) as caught:
            record(path)
    assert "\n" not in str(caught.value)
    run = explaind.open(path)
    assert (run.complete, run.damage()) == (False, [])
    assert run.steps >= 2


def files_of(run):
    return {file.relative_to(run).as_posix(): file.read_bytes() for file in run.rglob("*") if file.is_file() and file.parent != run}


def half_of(pieces):
    """What stands in a file when the disk is full in the middle of it."""
    return [(at, text[: len(text) // 2]) for at, text in pieces][:1]


@pytest.mark.usefixtures("short_spans")
@pytest.mark.parametrize("nth", range(0, 60, 7))
def test_half_a_chunk_that_no_marker_counts_is_written_anew(nth, tmp_path, monkeypatch):
    """A new one stands in its place at once: the disk fills up in the middle of it, once the training is on its way."""
    record(tmp_path / "whole")
    seen, anew = [], filed.written

    def written(file, text, new=False):
        if (tmp_path / "run" / "commit.json").exists():
            seen.append(file)
        if len(seen) > nth:
            os.close(anew(file, half_of(text), new))
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return anew(file, text, new)

    with monkeypatch.context() as patch:
        patch.setattr(filed, "written", written)
        with pytest.raises(StoreError, match=os.strerror(errno.ENOSPC)):
            record(tmp_path / "run")
    beyond = tmp_path / "run" / "batch" / "c" / "99" / "0"
    beyond.parent.mkdir(parents=True)
    beyond.write_bytes(b"of a span that is no more")
    assert explaind.open(tmp_path / "run").damage() == []
    found = repair(tmp_path / "run")
    assert (found.lost, explaind.open(tmp_path / "run").damage(), beyond.exists()) == (0, [], False)
    if found.after == explaind.open(tmp_path / "whole").steps:
        assert files_of(tmp_path / "run") == files_of(tmp_path / "whole")


def from_zeros(path, end):
    """A recording of parameters that are all zero at first, whose first chunk is therefore no file."""
    model = torch.nn.Linear(3, 1)
    with torch.no_grad():
        [parameter.zero_() for parameter in model.parameters()]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    recorder = explaind.record(optimizer, model, path)
    assert not (path / "theta" / "c").exists()
    for step in range(20):
        recorder.examples([0, 1])
        optimizer.zero_grad()
        (model(torch.ones(2, 3) * (step + 1)) - 1).square().mean().backward()
        optimizer.step()
    return end(recorder)


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError], ids=["interrupted", "full"])
@pytest.mark.parametrize("name", ["theta", "batch", "checksum_theta", "hyper"])
def test_half_a_chunk_never_stands_where_the_marker_counts_rows(name, error, tmp_path, monkeypatch):
    """Rows that are all fill are counted, too, and have no file that would be found there."""
    own = filed.written

    def half(file, text, new=False):
        if name in file.parts and "c" in file.parts:
            os.close(own(file, half_of(text), new))
            monkeypatch.setattr(filed, "written", own)
            raise error(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return own(file, text, new)

    def ended(recorder):
        monkeypatch.setattr(filed, "written", half)
        with pytest.raises(KeyboardInterrupt if error is KeyboardInterrupt else StoreError):
            recorder.close()
        run = explaind.open(tmp_path / "run")
        assert (run.steps, run.damage(), len(run.states(0, 1))) == (0, [], 1)
        recorder.close()

    from_zeros(tmp_path / "run", ended)
    repair(tmp_path / "run")
    run = explaind.open(tmp_path / "run")
    assert (run.steps, run.damage()) == (20, [])


@pytest.mark.usefixtures("short_spans")
def test_no_file_stays_open_behind_a_recording(tmp_path, monkeypatch):
    """One that ends well, one whose disk is full, and one whose chunks are more than are kept open."""
    monkeypatch.setattr(schema, "CHUNK_VALUES", 8)
    record(tmp_path / "before")
    before, anew, left = len(os.listdir("/proc/self/fd")), filed.written, [60]

    def written(*args, **options):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return anew(*args, **options)

    record(tmp_path / "run")
    monkeypatch.setattr(filed, "written", written)
    with pytest.raises(StoreError):
        record(tmp_path / "other")
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.usefixtures("short_spans")
@pytest.mark.parametrize("name", ["adagrad", "adamw"])
@pytest.mark.parametrize("when", ["before", "behind"])
def test_closing_may_be_interrupted_and_asked_for_again(when, name, tmp_path, monkeypatch):
    """Before the files are put in their places, and behind it."""
    torch.manual_seed(0)
    model = cases.PLAIN.model()
    case = cases.optimizer_named(name)
    optimizer = case.make(cases.trainable(model))
    recorder = explaind.record(optimizer, model, tmp_path / "run", data=cases.DATA)
    cases.train(cases.PLAIN, model, optimizer, case, recorder)
    recorder._writer._wait()

    def interrupted(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(filed, "sync" if when == "before" else "sync_folders", interrupted)
        with pytest.raises(KeyboardInterrupt):
            recorder.close()
    recorder.close()
    run = explaind.open(tmp_path / "run")
    assert (run.steps, run.complete, run.damage()) == (recorder.steps, True, [])
    assert list((tmp_path / "run").rglob("*.partial")) == []


def test_rows_may_be_put_while_others_are_settled(tmp_path):
    """Longer and longer ones, wider and wider ones, and empty ones, by one thread, while another settles all the time."""
    (tmp_path / "run").mkdir()
    column = COLUMNS[-1]
    array = growing(schema.create_column(zarr.create_group(tmp_path / "run", zarr_format=3), column, 1), tmp_path / "run")
    over = threading.Event()

    def settling():
        while not over.is_set():
            settle([array], tmp_path / "run")

    want = {row: rows(column, 1, 1, row)[0].repeat(row % 7, 0) for row in range(60)}
    with ThreadPoolExecutor(1) as pool:
        beside = pool.submit(settling)
        try:
            for row, values in want.items():
                array.put(row, values, 2)
        finally:
            over.set()
        beside.result()
    settle([array], tmp_path / "run")
    found = zarr.open_group(tmp_path / "run")["gradient"][...]
    for row, values in want.items():
        same(found[row, : len(values)], values)
        assert not found[row, len(values) :].any()


FORKED = """
import os, sys, signal
from pathlib import Path
from explaind.store.durable import sync, write_file
files = [Path(sys.argv[1]) / name for name in "abc"]
for file in files:
    write_file(file, b"some")
sync(files)
if (child := os.fork()) == 0:
    signal.alarm(20)  # whose default action ends it
    sync(files)
    os._exit(0)
sys.exit(os.waitpid(child, 0)[1])
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_process_that_is_forked_behind_a_recording_syncs_too(tmp_path):
    """Where the threads that its parent had are not."""
    subprocess.run([sys.executable, "-W", "ignore", "-c", FORKED, str(tmp_path)], check=True)
