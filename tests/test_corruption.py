"""Damage to a run on disk is said, or does no harm; what metadata claim is not believed."""

import errno
import importlib.util
import json
import os
import re
import shutil
import time
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import zarr
from hypothesis import Phase, given, settings
from hypothesis import strategies as some

import explaind
from explaind.cli import main
from explaind.errors import ExplaindError, StoreError
from explaind.store.checksums import text_checksum
from explaind.store.location import MIRROR
from explaind.store.opening import reading
from explaind.store.remote import Objects, RemoteError
from explaind.store.repair import Repair, repair
from tests import cases
from tests.closeness import same


def study():
    spec = importlib.util.spec_from_file_location("corruption", Path(__file__).parents[1] / "experiments" / "corruption" / "run.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.filterwarnings("ignore:Object at:zarr.errors.ZarrUserWarning")
def test_no_damage_gives_a_wrong_number_without_a_word(tmp_path, monkeypatch):
    module, told = study(), list[str]()
    monkeypatch.setattr(module.recording, "TOGETHER", module.recording.TOGETHER)  # put back afterwards
    found = module.study(tmp_path, 120, 7, told.append)
    assert told == []
    assert {end for _, end in found} == {"detected", "harmless"}
    assert sum(count for (_, end), count in found.items() if end == "detected") > 60


def out_of_memory():
    try:
        raise MemoryError
    except MemoryError:
        raise ValueError from None


@pytest.mark.parametrize(
    ("fault", "want"),
    [
        (lambda module: time.sleep(60), "HANG"),
        (lambda module: bytearray(2 * module.MEMORY), "MEMORY"),
        (lambda module: out_of_memory(), "MEMORY"),
        (lambda module: json.loads("{"), "detected"),
    ],
)
def test_the_study_takes_neither_a_hang_nor_too_much_memory_for_damage_that_was_detected(fault, want, tmp_path, monkeypatch):
    module = study()

    def everything(path):
        with reading("it cannot be read", path):
            fault(module)

    monkeypatch.setattr(module, "everything", everything)
    monkeypatch.setattr(module, "SECONDS", 1)
    assert module.outcome(tmp_path, {})[0] == want


def test_the_study_reads_the_steps_of_a_thin_run(tmp_path):
    module = study()
    module.record(tmp_path / "run", thin=4)
    assert len(module.everything(tmp_path / "run")[1]["rows"]) == module.STEPS


@pytest.mark.parametrize(("record", "want"), [(-3, "LOST"), (-1, "harmless")])
def test_the_study_misses_the_steps_behind_a_damaged_one_in_the_log(record, want, metadata, tmp_path, monkeypatch):
    """Nobody can know of the last one."""
    run = shutil.copytree(metadata.folder / "whole.killed", tmp_path / "run")
    log = next(log for log in run.glob("*.log") if b'"step": 39,' in log.read_bytes())
    text = bytearray(log.read_bytes())
    text[text.index(b'{"step": %d,' % (metadata.STEPS + record)) + 3] ^= 1
    log.write_bytes(text)
    monkeypatch.setattr(explaind.Run, "damage", lambda run: [])
    assert metadata.outcome(run, metadata.want["whole.killed"])[0] == want


def test_a_machine_that_is_out_of_memory_makes_no_run_a_damaged_one(tmp_path, monkeypatch):
    """Steps that could not be read would be cut off."""
    cases.shorten_blocks(monkeypatch)
    path, read = cases.recorded(tmp_path / "run").path, zarr.Array.__getitem__

    def short(array, rows):
        if array.basename == "theta" and isinstance(rows, slice) and rows.start:
            raise MemoryError
        return read(array, rows)

    with monkeypatch.context() as patch:
        patch.setattr(zarr.Array, "__getitem__", short)
        with pytest.raises(MemoryError):
            repair(path)
    assert explaind.open(path).steps == len(cases.STEPS)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return cases.recorded(tmp_path_factory.mktemp("sound") / "run", data=cases.DATA).path


def edit(path, change):
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def sealed(commit):
    """With the checksum that it then should have."""
    commit.pop("crc")
    commit["crc"] = text_checksum(commit)


odd = some.recursive(
    some.none()
    | some.booleans()
    | some.integers(-(2**70), 2**70)
    | some.floats()
    | some.sampled_from(["", "../x", "object", "float64", "\0"]),
    lambda inner: some.lists(inner, max_size=3) | some.dictionaries(some.sampled_from(["name", "size", "shape"]), inner, max_size=3),
    max_leaves=5,
)
FIELDS = [
    "optimizers",
    "layers",
    "dtype",
    "block",
    "together",
    "modules",
    "examples",
    "random_bytes",
    "gradient_filter",
    "filter_seen",
    "thin",
    "gradients",
]


@settings(max_examples=80, deadline=None, derandomize=True, database=None)
@given(field=some.sampled_from(FIELDS), value=odd)
def test_any_manifest_is_read_or_refused_in_one_line(field, value, run):
    copy = run.parent / "manifest"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(run, copy)

    edit(copy / "zarr.json", lambda group: group["attributes"]["manifest"].__setitem__(field, value))
    cases.resealed(copy)
    check_told(copy)


@settings(max_examples=80, deadline=None, derandomize=True, database=None)
@given(field=some.sampled_from(["steps", "complete", "modes", "checksums"]), value=odd)
def test_any_marker_is_read_or_refused_in_one_line(field, value, run):
    copy = run.parent / "marker"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(run, copy)
    edit(copy / "commit.json", lambda commit: (commit.__setitem__(field, value), sealed(commit)))
    check_told(copy)


@pytest.fixture(scope="module")
def metadata(tmp_path_factory):
    """The study, with the folder of its runs, what is read of each, and the values of every name in the metadata of any."""
    module, folder = study(), tmp_path_factory.mktemp("metadata")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module.recording, "TOGETHER", module.recording.TOGETHER)  # put back afterwards
        want, known = module.sound(folder), dict[str, list]()
    for file in sorted([*folder.rglob("zarr.json"), *folder.rglob("commit.json")]):
        value = json.loads(file.read_text())
        for *inner, name in filter(None, module.places(value)):
            known.setdefault(name, []).append(module.inside(value, (*inner, name)))
    module.folder, module.want, module.known = folder, want, known  # a module is what hypothesis tells of in one line
    return module


SAID = {"zarr.json": {"manifest", "identity"}, "commit.json": {"modes", "complete"}}
"""What follows from the attributes and the marker of a run themselves, and from nothing that they could be held against."""


@pytest.mark.filterwarnings("ignore:Object at:zarr.errors.ZarrUserWarning")
@settings(max_examples=120, deadline=timedelta(seconds=30), derandomize=True, database=None, phases=[Phase.generate])
@given(
    numbers=some.tuples(*[some.integers(0, 1 << 16)] * 4),
    top=some.booleans(),
    new=some.sampled_from(["gone", "leaf", "known", "near", "power", "reversed"]) | some.tuples(odd),
)
def test_metadata_with_the_right_checksums_are_refused_or_change_no_number(numbers, top, new, metadata):
    """Any place in any of a run's JSON is left out, or holds anything, what it holds elsewhere, or almost what it held."""
    folder, want, known = metadata.folder, metadata.want, metadata.known

    def nth(i, values):
        return values[numbers[i] % len(values)]

    path = folder / nth(0, sorted(want))
    file = nth(1, [path / "zarr.json", path / "commit.json"] if top else sorted(path.glob("*/**/zarr.json")))
    before = {each: each.read_text() for each in (file, path / "commit.json")}
    value = json.loads(before[file])
    *inner, name = nth(2, [place for place in metadata.places(value) if place])
    parent = metadata.inside(value, inner)
    old = parent.pop(name)
    if new != "gone":
        near = [old + 1, old - 1] if isinstance(old, int) else [[old]]
        made = {"leaf": metadata.LEAVES, "known": known[name], "near": near, "power": [1 << k for k in range(41)]}
        made["reversed"] = [old[::-1]] if isinstance(old, list | str) else [str(old)]
        found = new[0] if isinstance(new, tuple) else nth(3, made[new])
        parent.insert(name, found) if isinstance(parent, list) else parent.update({name: found})
    try:
        file.write_text(json.dumps(value))
        if file.parent == path:
            with suppress(KeyError, TypeError, AttributeError):  # no checksum can be right
                cases.resealed(path)
        said = SAID[file.name] if file.parent == path else set()
        came, words = metadata.outcome(path, {key: value for key, value in want[path.name].items() if key not in said})
    finally:
        for each, text in before.items():
            each.write_text(text)
    assert came in metadata.GOOD, words


def check_told(path):
    try:
        found = explaind.open(path)
        found.damage()
        found.block(0, found.steps)
    except ExplaindError as error:
        told = str(error)
    else:
        told = ""
    assert "\n" not in told


@pytest.mark.parametrize(("array", "shape"), [("theta", [8, 2**40]), ("batch", [7, 2**50]), ("fingerprint", [2**45])])
def test_sizes_are_bounded_before_memory_is_made(array, shape, run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    edit(tmp_path / "run" / array / "zarr.json", lambda told: told.__setitem__("shape", shape))
    with pytest.raises(ExplaindError, match=r"not what the manifest says|too large"):
        explaind.open(tmp_path / "run").damage()


def test_a_marker_of_an_earlier_moment_is_told(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / MIRROR).unlink()  # else the marker is put back
    edit(tmp_path / "run" / "commit.json", lambda commit: (commit.update(steps=4, complete=False), sealed(commit)))
    [told] = explaind.open(tmp_path / "run").damage()
    assert told.startswith("3 steps stand behind those that the commit marker tells of")
    assert repair(tmp_path / "run") == Repair(before=4, after=4, regained=0, lost=3)
    assert explaind.open(tmp_path / "run").damage() == []


def test_a_marker_of_the_very_beginning_leaves_the_first_state(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / MIRROR).unlink()  # else the marker is put back
    edit(tmp_path / "run" / "commit.json", lambda commit: (commit.update(steps=0, complete=False), sealed(commit)))
    assert repair(tmp_path / "run") == Repair(before=0, after=0, regained=0, lost=7)
    assert explaind.open(tmp_path / "run").damage() == []


def test_another_fill_of_what_was_never_written_is_refused(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    edit(tmp_path / "run" / "gap" / "zarr.json", lambda told: told.__setitem__("fill_value", 1))
    with pytest.raises(ExplaindError, match=r"not what the manifest says.*gap.*filled with 0; got .*filled with 1"):
        explaind.open(tmp_path / "run")


def test_what_fills_short_batches_up_is_no_example(tmp_path):
    """It is in no step's checksum, so nobody may read it."""
    path = cases.recorded(tmp_path / "run", data=cases.DATA).path
    batch, want = zarr.open_array(path / "batch", mode="r+"), explaind.open(path).examples
    batch[:] = np.where(batch[:] < 0, 1 << 40, batch[:])
    run = explaind.open(path)
    assert (batch[:] == 1 << 40).any()
    assert run.damage() == []
    same(run.examples, want)


def test_a_frozen_parameter_that_changed_on_disk_is_told(tmp_path, capsys):
    module = study()
    module.record(tmp_path / "run")
    run = explaind.open(tmp_path / "run")
    assert run.damage() == []
    array = explaind.store.schema.zarr.open_array(run.path / "constant" / "3.bias", mode="r+")
    array[0] = array[0] + 1
    words = "frozen parameters, buffers or fingerprints are not what was recorded"
    damaged = explaind.open(run.path)
    assert (damaged.damage(), damaged.sound()) == ([words], run.steps)
    assert main(["info", str(run.path)]) == 0
    told = capsys.readouterr().out
    assert (f"DAMAGED     {words}" in told, "steps are sound of" in told) == (True, False)
    assert repair(run.path) == Repair(run.steps, run.steps, 0, 0, words)
    assert main(["repair", str(run.path)]) == 1
    assert f"nothing to repair\n  DAMAGED     {words}" in capsys.readouterr().out
    edit(run.path / "zarr.json", lambda group: group["attributes"]["manifest"].__setitem__("reduction", "sum"))
    with pytest.raises(ExplaindError, match="the run's attributes are not what was recorded"):
        explaind.open(run.path)


@pytest.mark.parametrize(
    ("modes", "match"),
    [
        ([[True]], "the commit marker is not this run's.*expected modes of 4 modules; got of 1"),
        ([[1, 1, 1, 1]], "the commit marker is missing or damaged"),
        ([], None),
    ],
)
def test_modes_that_are_those_of_no_step_are_told(modes, match, run, tmp_path):
    """A row has the number of its mode alone, and so has its checksum."""
    shutil.copytree(run, tmp_path / "run")
    edit(tmp_path / "run" / "commit.json", lambda commit: (commit.update(modes=modes), sealed(commit)))
    if match is None:
        assert "the record of step 0 is not what was recorded" in explaind.open(tmp_path / "run").damage()[0]
    else:
        with pytest.raises(ExplaindError, match=match):
            explaind.open(tmp_path / "run")


@pytest.mark.parametrize("number", [-1, -(1 << 31), 1 << 30])
def test_a_mode_that_there_is_not_is_told_and_cut_off(number, tmp_path):
    path = cases.recorded(tmp_path / "run", data=cases.DATA).path
    zarr.open_array(path / "mode", mode="r+")[3] = number
    assert any("step 3 is not what was recorded" in words for words in explaind.open(path).damage())
    assert repair(path).after == 3


@pytest.mark.parametrize("options", [{}, {"gradients": "store"}], ids=["full", "gradients"])
@pytest.mark.parametrize("url", [False, True], ids=["folder", "URL"])
def test_what_cannot_be_read_at_present_is_no_damage(url, options, tmp_path, monkeypatch, capsys):
    """And is not cut off: a limit of the system, a permission or the network is in the way."""
    place = f"memory://{tmp_path.name}/run" if url else tmp_path / "run"
    run = cases.recorded(place, data=cases.DATA, **options)
    store = Objects if url else zarr.storage.LocalStore
    whole, get = explaind.open(place).identity, store.get
    for name in ("theta", "gradient" if options else "hyper", "fingerprint"):

        async def none_left(self, key, *words, name=name, **more):
            if f"{name}/c/" in key:
                if url:
                    raise RemoteError(key, ConnectionError())
                raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
            return await get(self, key, *words, **more)

        with monkeypatch.context() as patch:
            patch.setattr(store, "get", none_left)
            for verb in ("info", "repair"):
                assert main([verb, str(place)]) == 2
                assert re.search("cannot be reached|Too many open files.*try again", capsys.readouterr().err)
        after = explaind.open(place)
        assert (after.identity, after.complete, after.damage()) == (whole, True, [])
    assert run.steps == after.steps


@pytest.mark.parametrize(("name", "axis"), [("random", 1), ("fingerprint", 0)])
def test_endless_chunks_are_refused(name, axis, tmp_path):
    path = cases.recorded(tmp_path / "run", data=cases.DATA).path

    def narrow(told):
        told["shape"][axis], told["chunk_grid"]["configuration"]["chunk_shape"][axis] = 1 << 20, 1

    edit(path / name / "zarr.json", narrow)
    with pytest.raises(StoreError, match=r"an array has too many chunks.*at most 65536 at once"):
        explaind.open(path).damage()


def test_a_machine_without_memory_is_told_in_one_line(tmp_path, monkeypatch, capsys):
    path = cases.recorded(tmp_path / "run", data=cases.DATA).path

    def full(self, *_):
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(explaind.store.reader.Run, "checksums", full)
        assert main(["repair", str(path)]) == 2
    assert capsys.readouterr().err.startswith("explaind: out of memory; nothing that was recorded is lost")
    assert explaind.open(path).damage() == []
