"""A file from a stranger: what is damaged, or made to do harm, is refused in one line before anything is written outside or believed."""

import json
import shutil
import sys
import warnings
import zipfile

import numpy as np
import pytest

import explaind
from explaind.cli import main
from explaind.errors import StoreError
from explaind.store.exporting import SEAL, _seal, export_run, import_run
from tests import cases
from tests.closeness import same

h5py = pytest.importorskip("h5py", reason="HDF5 needs h5py")
KINDS = ("h5", "zip")
every_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A run with constants, fingerprints and a ledger, as either file."""
    folder, problem = tmp_path_factory.mktemp("exported"), cases.problem_named("frozen parameter")
    run = cases.recorded(folder / "run", problem, cases.optimizer_named("adamw"), data=cases.DATA)
    cases.decomposed(run, problem, save=run.path / "ledgers" / "mine")
    for kind in KINDS:
        export_run(run.path, folder / f"out.{kind}")
    return folder


def refused(file, message, capsys):
    """In one line, with no folder made anywhere."""
    inside = file.parent
    before = sorted(inside.rglob("*")) + sorted(inside.parent.iterdir())
    with pytest.raises(StoreError, match=message) as caught:
        import_run(file, inside / "new")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1000
    assert main(["import", str(file), str(inside / "new")]) == 2
    said = capsys.readouterr()
    assert (said.out, said.err.count("\n"), said.err[:10]) == ("", 1, "explaind: ")
    assert sorted(inside.rglob("*")) + sorted(inside.parent.iterdir()) == before


@every_kind
def test_any_flipped_byte_is_refused(kind, exported, tmp_path):
    whole = (exported / f"out.{kind}").read_bytes()
    file = tmp_path / f"bad.{kind}"
    places = {*np.random.default_rng(0).integers(0, len(whole), 200).tolist(), 0, 20, 511, 512, 520, len(whole) - SEAL, len(whole) - 1}
    for place in places:
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 0x41]) + whole[place + 1 :])
        with pytest.raises(StoreError, match=r"the file is damaged, or no exported run.*bad") as caught:
            import_run(file, tmp_path / "new")
        assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


@every_kind
@pytest.mark.parametrize("spoil", [lambda b: b"", lambda b: b[:-1], lambda b: b + b"\0", lambda b: b[: len(b) // 2], lambda b: b[600:]])
def test_a_file_that_is_cut_or_grown_is_refused(spoil, kind, exported, tmp_path, capsys):
    file = tmp_path / f"bad.{kind}"
    file.write_bytes(spoil((exported / f"out.{kind}").read_bytes()))
    refused(file, "the file is damaged, or no exported run", capsys)


def sealed(path):
    """Whoever makes a file can make its checksum too."""
    with open(path, "r+b") as file:
        _seal(file, path.suffix == ".zip")


def put(file, name, value):
    """A small file in HDF5."""
    instead(name, data=np.frombuffer(json.dumps(value).encode(), np.uint8))(file)


def as_a_ledger(file):
    put(file, "attributes.json", {"explaind": {"kind": "ledger", "schema": 2}})


def manifest_with(**changes):
    def act(file):
        told = json.loads(bytes(file["attributes.json"][...]))
        put(file, "attributes.json", {**told, "manifest": {**told["manifest"], **changes}})

    return act


def layers_with(**changes):
    def act(file):
        layers = json.loads(bytes(file["attributes.json"][...]))["manifest"]["layers"]
        manifest_with(layers=[{**layers[0], **changes}, *layers[1:]])(file)

    return act


def commit_with(**changes):
    return lambda file: put(file, "commit.json", {**json.loads(bytes(file["commit.json"][...])), **changes})


def instead(name, **options):
    """Another dataset in the place of one."""

    def act(file):
        told = file[name].attrs["explaind"]
        del file[name]
        file.create_dataset(name, **options).attrs["explaind"] = told

    return act


def telling(**told):
    """Another attribute of theta."""
    return lambda file: file["theta"].attrs.__setitem__("explaind", np.bytes_(json.dumps(told)))


def outside(file):
    del file["theta"]
    file.create_dataset("theta", (8, 22), "f8", external=[("/etc/passwd", 0, 8 * 22 * 8)])


def virtual(file):
    del file["theta"]
    layout = h5py.VirtualLayout(shape=(8, 22), dtype="f8")
    layout[:] = h5py.VirtualSource("/etc/passwd", "x", shape=(8, 22))
    file.create_virtual_dataset("theta", layout)


def cycle(file):
    file["ledgers/again"] = file["ledgers"]


def linked(link):
    def act(file):
        del file["theta"]
        file["theta"] = link

    return act


OBJECTS = h5py.string_dtype()
HDF5 = {
    "a name above": (lambda f: f.create_dataset("../evil", data=[1.0]), r"'\.\./evil' is no part of a run"),
    "a constant above": (lambda f: f["constant"].create_dataset("..", data=[1.0]), r"'constant/\.\.' is no part of a run"),
    "a hidden constant": (lambda f: f["constant"].create_dataset(".x", data=[1.0]), r"'constant/\.x' is no part"),
    "a constant like zarr's file": (lambda f: f["constant"].create_dataset("zarr.json", data=[1.0]), "zarr.json' is no part"),
    "a constant of Windows": (lambda f: f["constant"].create_dataset("..\\evil", data=[1.0]), "is no part of a run"),
    "a constant of two lines": (lambda f: f["constant"].create_dataset("a\nb", data=[1.0]), "is no part of a run"),
    "an endless name": (lambda f: f["constant"].create_dataset("a" * 4000, data=[1.0]), "is no part of a run"),
    "an unknown array": (lambda f: f.create_dataset("evil", data=[1.0]), "'evil' is no part of a run"),
    "an unknown group": (lambda f: f.create_dataset("evil/theta", data=[1.0]), "'evil/theta' is no part of a run"),
    "an unknown row": (lambda f: f["ledgers/mine"].create_dataset("evil", data=[1.0]), "ledgers/mine/evil' is no part"),
    "a ledger above": (lambda f: f.create_dataset("ledgers/../data", data=[1.0]), "is no part of a run"),
    "groups in a circle": (cycle, "no part of a run"),
    "a soft link": (linked(h5py.SoftLink("/batch")), "'theta' is a link"),
    "a link to another file": (linked(h5py.ExternalLink("/etc/passwd", "/")), "'theta' is a link"),
    "numbers in another file": (outside, "theta is not stored plainly"),
    "numbers that are made up": (virtual, "theta is not stored plainly"),
    "another filter": (instead("theta", data=np.zeros((8, 22)), compression="lzf", chunks=True), "theta is not stored plainly"),
    "objects": (instead("theta", shape=(8, 22), dtype=OBJECTS), "theta is no array of numbers"),
    "names for numbers": (instead("theta", data=np.full((8, 22), b"abcd")), "theta is of another shape"),
    "another width": (instead("theta", data=np.zeros((8, 23))), r"theta is of another shape.*param 22\]; got float64 \[state 8, param 23"),
    "another dtype": (instead("theta", data=np.zeros((8, 22), "f4")), "theta is of another shape"),
    "a row less": (instead("theta", data=np.zeros((7, 22))), "theta is of another shape"),
    "terabytes that are not there": (instead("gap", shape=(2**40,), dtype="i8", chunks=(2**20,)), "gap is not whole"),
    "terabytes of slots": (instead("batch", shape=(7, 2**40), dtype="i8", chunks=(7, 2**20)), "batch is not whole"),
    "terabytes of a constant": (instead("constant/0.bias", shape=(2**40,), dtype="f8"), "constant/0.bias is larger than it can be"),
    "a dimension less": (telling(dims=["state"], codec="standard"), "theta is without"),
    "another codec": (telling(dims=["state", "param"], codec="sh"), "theta is without"),
    "an attribute of objects": (lambda f: f["theta"].attrs.__setitem__("explaind", "text"), "theta is without"),
    "an array less": (lambda f: f.__delitem__("age"), "age is missing"),
    "no manifest": (lambda f: f.__delitem__("attributes.json"), "attributes.json is missing"),
    "a ledger without attributes": (lambda f: f.__delitem__("ledgers/mine/attributes.json"), "attributes.json is missing"),
    "no JSON": (instead("commit.json", data=np.frombuffer(b"{", np.uint8)), "commit.json is damaged"),
    "JSON without end": (instead("commit.json", data=np.frombuffer(b"[" * 100_000, np.uint8)), "commit.json is damaged"),
    "a commit marker of numbers": (instead("commit.json", data=np.zeros(3)), "commit.json is no file"),
    "a ledger that is a run": (as_a_ledger, "the run is something else"),
    "more steps": (commit_with(steps=10**12), "gap is of another shape"),
    "fewer than none": (commit_with(steps=-1), "commit.json is damaged"),
    "steps in words": (commit_with(steps="7"), "commit.json is damaged"),
    "modes that are none": (commit_with(modes=[["yes"]]), "commit.json is damaged"),
    "an endless block": (manifest_with(block=2**40), "attributes are damaged"),
    "no block": (manifest_with(block=0), "attributes are damaged"),
    "objects as dtype": (manifest_with(dtype="object"), "attributes are damaged"),
    "no optimizer": (manifest_with(optimizers=[]), "attributes are damaged"),
    "an optimizer without options": (manifest_with(optimizers=[{}]), "attributes are damaged"),
    "endless random states": (manifest_with(random_bytes=2**40), "attributes are damaged"),
    "more examples": (manifest_with(examples=2**40), "fingerprint is of another shape"),
    "an unknown gradient filter": (manifest_with(gradient_filter={"name": "os.system", "options": {}}), "the manifest is damaged"),
    "a filter without end": (
        manifest_with(gradient_filter={"name": "grokfast-ma", "options": {"window": 2**40, "lamb": 1.0}}),
        "the manifest is damaged|filtered is missing",
    ),
    "a layer of another size": (layers_with(size=5), "attributes are damaged"),
    "a layer of negative size": (layers_with(shape=[-3, -4]), "attributes are damaged"),
    "a layer elsewhere": (layers_with(offset=5), "attributes are damaged"),
    "a layer of no optimizer": (layers_with(optimizer=3), "attributes are damaged"),
}  # fmt: skip


@pytest.mark.parametrize("what", HDF5)
def test_a_hostile_hdf5_file_is_refused(what, exported, tmp_path, capsys):
    spoil, message = HDF5[what]
    path = tmp_path / "inside" / "bad.h5"
    path.parent.mkdir()
    shutil.copy(exported / "out.h5", path)
    with h5py.File(path, "r+") as file:
        spoil(file)
    sealed(path)
    refused(path, message, capsys)


def metadata_with(name, **changes):
    """Other metadata of an array in a zip."""
    return {f"{name}/zarr.json": lambda text: json.dumps({**json.loads(text), **changes})}


def chunked(*extents):
    return {"name": "regular", "configuration": {"chunk_shape": list(extents)}}


BOMB = bytes(1 << 20)
ZIP = {
    "a name above": ({"../evil": "x"}, r"'\.\./evil' is no part of a run"),
    "an absolute name": ({"/tmp/evil": "x"}, "'/tmp/evil' is no part of a run"),
    "a name of Windows": ({"constant/..\\evil/zarr.json": "{}"}, "no part of a run"),
    "a chunk above": ({"theta/c/../../evil": "x"}, "no part of a run"),
    "a chunk of nothing": ({"evil/c/0": "x"}, "no part of a run"),
    "a ledger above": ({"ledgers/../zarr.json": "{}"}, "no part of a run"),
    "an unknown array": ({"evil/zarr.json": "{}"}, "'evil' is no part of a run"),
    "an unknown file": ({"setup.py": "import os"}, "'setup.py' is no part of a run"),
    "a folder": ({"theta/": ""}, "no part of a run"),
    "a link": ({"tail.log ": "/etc/passwd"}, "no part of a run"),
    "a name twice": ({"commit.json": ["{}", "{}"]}, "no run was exported to this zip.*twice"),
    "zeros without end": ({"tail.log": BOMB}, "no run was exported to this zip.*larger than it can be"),
    "a marker without end": ({"commit.json": BOMB}, "no run was exported to this zip.*larger than it can be"),
    "a chunk without end": ({"theta/c/0/0": BOMB}, "no run was exported to this zip.*larger than it can be"),
    "a chunk less": ({"constant/0.bias/c/0": None}, "constant/0.bias is not whole"),
    "no commit marker": ({"commit.json": None}, "commit.json is missing"),
    "no metadata": ({"zarr.json": None}, "attributes.json is missing|cannot be read"),
    "metadata that are none": ({"theta/zarr.json": "{"}, "theta is damaged|cannot be read"),
    "endless rows": (metadata_with("theta", shape=[2**40, 22]), "theta is not whole"),
    "endless chunks": (metadata_with("theta", chunk_grid=chunked(2**40, 22)), "theta is too large"),
    "another codec": (
        metadata_with("age", codecs=[{"name": "bytes"}, {"name": "crc32c"}]),
        "age is damaged.*codecs that nothing is written with",
    ),
    "a codec that is not there": (metadata_with("age", codecs=[{"name": "numcodecs.pickle"}]), "age is damaged"),
    "objects": (metadata_with("age", data_type="variable_length_bytes", fill_value=""), "age is no array of numbers"),
    "a chunk of four gigabytes": ({"theta/c/0/0": lambda text: text[:4] + b"\xff" * 4 + text[8:]}, "a chunk cannot be read.*another size"),
    "a chunk that is too short": ({"theta/c/0/0": "short"}, "a chunk cannot be read.*another size"),
    "a chunk that is damaged": ({"theta/c/0/0": lambda text: text[:16] + bytes(len(text) - 16)}, "a chunk cannot be read"),
}


@pytest.mark.parametrize("what", ZIP)
def test_a_hostile_zip_is_refused(what, exported, tmp_path, capsys):
    changes, message = ZIP[what]
    path = tmp_path / "inside" / "bad.zip"
    path.parent.mkdir()
    rewritten(exported / "out.zip", path, changes)
    sealed(path)
    refused(path, message, capsys)


HARMLESS = (
    "endless rows",
    "a name above",
    "an absolute name",
    "a chunk above",
    "a chunk of nothing",
    "a ledger above",
    "an unknown array",
    "an unknown file",
    "a folder",
    "a link",
)
"""Of the above: what nobody who reads a run asks for, names that are none of its own and rows behind the committed ones."""


@pytest.mark.parametrize("what", ZIP)
def test_a_hostile_zip_is_not_opened_or_does_no_harm(what, exported, tmp_path):
    changes, _ = ZIP[what]
    path = tmp_path / "bad.zip"
    rewritten(exported / "out.zip", path, changes)
    try:
        run = explaind.open(path)
        faults = run.damage()
        block = run.block(0, run.steps)
        assert not run.logged
    except StoreError as error:
        faults = [str(error)]
    assert all("\n" not in fault for fault in faults)
    assert bool(faults) == (what not in HARMLESS)
    if not faults:
        same(block.theta, explaind.open(exported / "run").block(0, run.steps).theta)
    assert [file.name for file in tmp_path.iterdir()] == ["bad.zip"]


def rewritten(source, path, changes):
    """A zip with entries changed (function of the text), replaced, doubled (list), or left out (None)."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(path, "w") as new, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of names that are there twice
        for name in dict.fromkeys([*old.namelist(), *changes]):
            change = changes.get(name, lambda text: text)
            texts = change if isinstance(change, list) else [change(old.read(name)) if callable(change) else change]
            for text in texts:
                if text is not None:
                    new.writestr(name, text, zipfile.ZIP_DEFLATED if text is BOMB else zipfile.ZIP_STORED)


def test_a_zip_that_is_rewritten_as_it_was_is_taken(exported, tmp_path):
    """The tests above refuse what was changed, not the rewriting."""
    rewritten(exported / "out.zip", tmp_path / "again.zip", {})
    sealed(tmp_path / "again.zip")
    assert import_run(tmp_path / "again.zip", tmp_path / "run").steps == 7
    with h5py.File(shutil.copy(exported / "out.h5", tmp_path / "again.h5"), "r+") as file:
        manifest_with()(file)
    sealed(tmp_path / "again.h5")
    assert import_run(tmp_path / "again.h5", tmp_path / "other").ledgers == ("mine",)


def test_without_h5py_a_line_says_what_to_install(exported, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "h5py", None)
    for act in (lambda: export_run(exported / "run", tmp_path / "out.h5"), lambda: import_run(exported / "out.h5", tmp_path / "new")):
        with pytest.raises(StoreError, match=r"HDF5 needs h5py; pip install 'explaind-ledger\[hdf5\]'"):
            act()
    assert import_run(exported / "out.zip", tmp_path / "run").steps == 7
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
