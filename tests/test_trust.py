"""A stranger's run, or ledger, is data: nothing in it is executed, no name in it leads anywhere, no size in it is believed."""

import ast
import gzip
import json
import pickle
import shutil
import tracemalloc
import zipfile
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as some
from numcodecs import blosc

import explaind
from explaind.cli import main
from explaind.errors import ExplaindError
from explaind.ledger import saving
from explaind.store.exporting import export_run
from explaind.store.repair import repair
from explaind.store.sealed import HEAD
from explaind.store.tail import records
from tests import cases
from tests.stopped import ONE_QUERY, Killed, kill_at, recorded, save_at_every_segment
from tests.test_cli import SMALL
from tests.test_corruption import edit, odd

ROOT = Path(__file__).parents[1]
SOURCES = sorted(path for folder in ("explaind", "experiments") for path in (ROOT / folder).rglob("*.py"))
PICKLES = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "jsonpickle", "copyreg"}
CODECS = {"bytes", "blosc", "zstd", "vlen-utf8", "explaind.bitdelta"}


EXECUTED = {"eval", "exec", "compile", "__import__"}
PICKLED = {"torch.load", "torch.save", "torch.serialization.load", "torch.serialization.save"}


def option(node, name):
    """What a call is given by this name; None where that is nothing, or no constant."""
    given = next((k.value for k in node.keywords if k.arg == name), None)
    return given.value if isinstance(given, ast.Constant) else None


def meant(tree):
    """What the names that a source imports stand for: np -> numpy, load -> torch.load."""
    found = dict[str, str]()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.asname: alias.name for alias in node.names if alias.asname}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    return found


def unsafe(text, package=True):
    """Lines of a source that read or write pickles, or execute what they are given; a user's loop may save checkpoints of its own."""
    names = meant(tree := ast.parse(text))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            told = [*(alias.name for alias in node.names), getattr(node, "module", None) or ""]
            bad = any(not PICKLES.isdisjoint(name.split(".")) for name in told)
        elif isinstance(node, ast.Attribute):
            bad = node.attr in PICKLES or node.attr == "read_pickle"
        elif isinstance(node, ast.Call):
            first, dot, rest = ast.unparse(node.func).partition(".")
            name = names.get(first, first) + dot + rest
            bad = package and name.removeprefix("builtins.") in EXECUTED | PICKLED
            bad |= name in PICKLED and name.endswith("load") and option(node, "weights_only") is not True
            bad |= package and name == "numpy.load" and option(node, "allow_pickle") is not False
            bad |= any(k.arg == "allow_pickle" for k in node.keywords) and option(node, "allow_pickle") is not False
            bad |= "import" in name and any(isinstance(to, ast.Constant) and to.value in PICKLES for to in node.args)
        else:
            continue
        if bad:
            yield ast.unparse(node)


UNSAFE = (
    *(f"import {name}" for name in ("pickle", "dill", "joblib", "shelve", "marshal", "cloudpickle.fast")),
    "from pickle import loads",
    "from torch.utils.data import pickle",
    "torch.load(f)",
    "torch.load(f, weights_only=False)",
    "torch.load(f, weights_only=safe)",
    "torch.save(x, f)",
    "np.load(f)",
    "numpy.load(f, allow_pickle=yes)",
    "np.save(f, x, allow_pickle=True)",
    "eval(x)",
    "importlib.import_module('pickle')",
    "__import__('os')",
    "torch.serialization.pickle",
    "pd.read_pickle",
)
ALIASES = (
    "from torch import load\nload(f)",
    "from torch import load as read\nread(f)",
    "from torch import save\nsave(x, f)",
    "import torch as t\nt.load(f)",
    "import torch as t\nt.serialization.load(f)",
    "from torch import serialization as s\ns.load(f)",
    "import numpy as xyz\nxyz.load(f)",
    "from numpy import load as read\nread(f)",
    "import builtins as b\nb.eval(x)",
)


@pytest.mark.parametrize("text", [*UNSAFE, *ALIASES])
def test_what_the_scan_of_sources_finds(text):
    assert list(unsafe(("" if text in ALIASES else "import numpy as np\n") + text)) == text.splitlines()[-1:]


@pytest.mark.parametrize(
    "text",
    [
        "import torch",
        "import numpy as np\nnp.load(f, allow_pickle=False)",
        "from zarr import load\nload(f)",
        "re.compile(x)",
        "model.eval()",
    ],
)
def test_what_is_harmless_is_let_pass(text):
    assert list(unsafe(text)) == []


@pytest.mark.parametrize("text", ["torch.save(x, f)", "torch.load(f, weights_only=True)"])
def test_a_users_loop_may_keep_checkpoints(text):
    assert list(unsafe(text, package=False)) == []
    assert list(unsafe(text)) == [text]


def test_no_source_reads_or_writes_pickles():
    assert len(SOURCES) > 150
    found = {str(path): list(unsafe(path.read_text(), path.is_relative_to(ROOT / "explaind"))) for path in SOURCES}
    assert not any(found.values()), {path: lines for path, lines in found.items() if lines}


def check_holds_no_pickle(folder):
    """Every file is JSON, a chunk of an array of numbers or texts in a known codec, a log of such arrays, or a sealed npz of them."""
    kinds = set()
    for path in sorted(file for file in folder.rglob("*") if file.is_file()):
        part = path.relative_to(folder)
        if path.suffix == ".json":
            told = json.loads(path.read_text())
            if told.get("node_type") == "array":
                assert np.dtype("S" if told["data_type"] == "string" else told["data_type"]).kind in "fiubcS", part
                assert {codec["name"] for codec in told["codecs"]} <= CODECS, part
        elif path.name.endswith(".log"):
            kinds.add("log")
        elif ".parts" in str(part):
            with np.load(BytesIO(path.read_bytes()[HEAD:]), allow_pickle=False) as archive:
                assert {archive[name].dtype.kind for name in archive.files} <= set("fiubU"), part
        else:
            assert "c" in part.parts, part
        kinds.add(path.suffix or "chunk")
        with pytest.raises(Exception):  # noqa: B017, PT011 — whatever pickle makes of bytes that are none
            pickle.loads(path.read_bytes())
    return kinds


KINDS = {
    "full": ("adamw", {}),
    "standard": ("adamw", {"codec": "standard"}),
    "thin": ("adamw", {"thin": 3}),
    "gradients": ("adamw", {"gradients": "store"}),
    "filtered": ("adamw", {"gradient_filter": explaind.GrokfastEMA(0.9, 2.0)}),
    "scalar": ("nadam for-loop", {}),
}
OWN = {"gradients": "gradient", "filtered": "filtered", "scalar": "scalar", "thin": "state"}
"""Arrays that no other run has."""
every_kind = pytest.mark.parametrize("kind", KINDS)


@every_kind
def test_a_run_and_what_is_left_of_a_kill_hold_no_pickle(kind, tmp_path, monkeypatch):
    save_at_every_segment(monkeypatch)
    name, options = KINDS[kind]
    case = cases.optimizer_named(name)
    run = cases.recorded(tmp_path / "run", cases.problem_named("frozen parameter"), case, data=cases.DATA, **options)
    model = cases.PLAIN.model()
    optimizer = case.make(cases.trainable(model))
    recorder = explaind.record(optimizer, model, tmp_path / "killed", data=cases.DATA, **options)
    cases.train(cases.PLAIN, model, optimizer, case, recorder)
    recorder._writer._wait()  # a file may be renamed under a copy's hands
    shutil.copytree(tmp_path / "killed", tmp_path / "left")
    recorder.close()
    assert check_holds_no_pickle(run.path) == {".json", "chunk"}
    assert (run.path / OWN.get(kind, "theta")).is_dir()
    assert "log" in check_holds_no_pickle(tmp_path / "left")
    assert records(tmp_path / "left")


@every_kind
def test_a_run_in_one_file_holds_no_pickle(kind, tmp_path):
    h5py = pytest.importorskip("h5py", reason="HDF5 needs h5py")
    name, options = KINDS[kind]
    run = cases.recorded(tmp_path / "run", cases.PLAIN, cases.optimizer_named(name), data=cases.DATA, **options)
    for file in ("run.zip", "run.h5"):
        export_run(run.path, tmp_path / file)
    with zipfile.ZipFile(tmp_path / "run.zip") as archive:
        archive.extractall(tmp_path / "unpacked")
    assert check_holds_no_pickle(tmp_path / "unpacked") == {".json", "chunk"}

    def check(name, item):
        links = {"DIMENSION_LIST", "REFERENCE_LIST"}  # which are HDF5's own references
        kinds = [item.attrs.get_id(key).dtype for key in item.attrs.keys() - links]
        for dtype in (*kinds, *([item.dtype] if isinstance(item, h5py.Dataset) else [])):
            assert dtype.kind in "fiubcS" or h5py.check_string_dtype(dtype), (name, dtype)

    with h5py.File(tmp_path / "run.h5") as archive:
        archive.visititems(check)
        assert OWN.get(kind, "theta") in archive


def test_a_ledger_and_one_on_its_way_hold_no_pickle(tmp_path, monkeypatch):
    save_at_every_segment(monkeypatch)
    run = recorded(tmp_path)
    cases.decomposed(run, save=tmp_path / "ledgers" / "whole", rule="auto")
    with pytest.raises(Killed):
        cases.decomposed(run, save=tmp_path / "ledgers" / "begun", memory=ONE_QUERY, progress=kill_at(9))
    check_holds_no_pickle(tmp_path / "ledgers")


TASK = """
import dataclasses
from explaind.tasks import Digits
open({mark!r}, "w").write("executed")
@dataclasses.dataclass(frozen=True)
class Evil(Digits):
    pass
"""


@pytest.mark.parametrize("where", ["beside", "inside", "package"])
def test_code_that_comes_in_the_folder_of_a_run_is_not_executed(where, tmp_path, monkeypatch, capsys):
    main(["record", str(SMALL), "--train.steps", "2", "--out", str(tmp_path / "run")])
    module = {"beside": "run.evil", "inside": "evil", "package": "run.package.evil"}[where]
    place = tmp_path / "run" / ("package" if where == "package" else "")
    place.mkdir(exist_ok=True)
    (place / "evil.py").write_text(TASK.format(mark=str(tmp_path / "mark")))
    edit(tmp_path / "run" / "zarr.json", lambda told: told["attributes"]["manifest"]["config"]["task"].update(name=f"{module}:Evil"))
    cases.resealed(tmp_path / "run")
    monkeypatch.chdir(tmp_path / "run" if where == "inside" else tmp_path)
    capsys.readouterr()
    for verb in ("verify", "decompose", "doctor"):
        assert main([verb, str(tmp_path / "run")]) == 2, verb
        assert "a task of its own folder" in capsys.readouterr().err
    assert main(["info", str(tmp_path / "run")]) == 0
    assert not (tmp_path / "mark").exists()


@pytest.fixture(scope="module")
def ledger(tmp_path_factory):
    path = tmp_path_factory.mktemp("sound") / "ledger"
    cases.decomposed(cases.recorded(path.parent / "run"), save=path)
    return path


def check_told(path):
    try:
        found = explaind.open_ledger(path)
        found.verify()
        for row in found.rows.values():
            assert row.values.nbytes < 1 << 31
    except ExplaindError as error:
        told = str(error)
    else:
        told = ""
    assert "\n" not in told


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(field=some.sampled_from(["rows", "layers", "check_dims", "doubts", "settings"]), value=odd)
def test_any_attributes_of_a_ledger_are_read_or_refused_in_one_line(field, value, ledger):
    copy = ledger.parent / "attributes"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(ledger, copy)
    edit(copy / "zarr.json", lambda group: group["attributes"].__setitem__(field, value))
    check_told(copy)


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(
    array=some.sampled_from(["data", "example", "final", "check/recipes", "check/by_step"]),
    field=some.sampled_from(["shape", "data_type", "chunk_grid", "codecs", "fill_value", "dimension_names"]),
    value=odd | some.lists(some.integers(0, 2**60), min_size=1, max_size=5),
)
def test_any_metadata_of_an_array_of_a_ledger_are_read_or_refused_in_one_line(array, field, value, ledger):
    copy = ledger.parent / "metadata"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(ledger, copy)
    edit(copy / array / "zarr.json", lambda told: told.__setitem__(field, value))
    check_told(copy)


def test_a_long_name_among_many_makes_no_table_of_long_names(ledger, monkeypatch):
    copy = shutil.copytree(ledger, ledger.parent / "names")
    layers = zarr.open_array(copy / "layer", mode="r+")
    layers[0] = "x" * (1 << 18)
    assert len(explaind.open_ledger(copy).coords["layer"][0]) == 1 << 18
    monkeypatch.setattr(saving, "LARGEST", 1 << 20)
    with pytest.raises(ExplaindError, match=f"the ledger is damaged.*{layers.size} names of up to {1 << 18} characters"):
        explaind.open_ledger(copy)


def test_steps_that_nothing_is_stored_of_are_refused_before_memory_is_made(tmp_path):
    run = cases.recorded(tmp_path / "run", case=cases.optimizer_named("adamw"))
    for file in run.path.glob("*/zarr.json"):
        if file.parent.name not in ("momentum", "constant", "fingerprint"):
            edit(file, lambda told: told["shape"].__setitem__(0, 2**44))
    edit(run.path / "commit.json", lambda commit: commit.__setitem__("steps", 2**44 - 1))
    cases.resealed(run.path)
    with pytest.raises(ExplaindError, match="chunks of checksum_theta are missing"):
        explaind.open(run.path)


def check_small(path, match):
    """Opened, and held against its checksums: refused in one line, before memory is made for what it claims."""
    tracemalloc.start()
    try:
        with pytest.raises(ExplaindError, match=match) as caught:
            check_whole(path)
        assert tracemalloc.get_traced_memory()[1] < 1 << 25
    finally:
        tracemalloc.stop()
    assert "\n" not in str(caught.value)


def check_whole(path):
    run = explaind.open(path)
    assert run.damage() == []
    run.block(0, run.steps)


BOMB = np.zeros(1 << 27, np.uint8)


def zipped(told):
    told["codecs"] = [told["codecs"][0], {"name": "gzip", "configuration": {"level": 1}}]


@pytest.mark.parametrize("array", ["age", "theta", "constant/0.bias", "fingerprint"])
def test_a_chunk_that_would_fill_the_memory_is_refused(array, tmp_path):
    case = cases.optimizer_named("adamw")
    run = cases.recorded(tmp_path / "run", cases.problem_named("frozen parameter"), case, data=cases.DATA, codec="standard")
    check_whole(run.path)
    metadata, chunk = run.path / array / "zarr.json", next(file for file in (run.path / array / "c").rglob("*") if file.is_file())
    chunk.write_bytes(blosc.compress(BOMB, b"zstd", 1, blosc.NOSHUFFLE))
    check_small(run.path, "cannot be read.*a chunk of .* bytes is of another size")
    edit(metadata, zipped)
    chunk.write_bytes(gzip.compress(BOMB.data, 1))
    check_small(run.path, "codecs that nothing is written with: BytesCodec, GzipCodec")


def test_parameters_that_nothing_is_stored_of_are_refused_before_memory_is_made(tmp_path):
    run = cases.recorded(tmp_path / "run", case=cases.optimizer_named("adamw"))
    params, more = run.manifest.params, 2**34

    def grow(told):
        (*_, last) = told["attributes"]["manifest"]["layers"]
        last.update(shape=[last["size"] + more], size=last["size"] + more)

    def wide(chunk):
        chunk[1:] = [n + (more >> 16) * (n == params) for n in chunk[1:]]

    edit(run.path / "zarr.json", grow)
    for file in run.path.glob("*/zarr.json"):
        edit(file, lambda told: told.update(shape=[n + more * (n == params) for n in told["shape"]]))
        edit(file, lambda told: wide(told["chunk_grid"]["configuration"]["chunk_shape"]))
    cases.resealed(run.path)
    check_small(run.path, "less is stored than the metadata say.*theta")


def test_constants_that_nothing_is_stored_of_are_refused_before_memory_is_made(tmp_path):
    run = cases.recorded(tmp_path / "run", cases.problem_named("frozen parameter"))
    one, chunks = run.path / "constant" / "0.bias", {"name": "regular", "configuration": {"chunk_shape": [2**27]}}
    for i in range(3):
        shutil.copytree(one, one.with_name(f"more{i}"), ignore=shutil.ignore_patterns("c"))
        edit(one.with_name(f"more{i}") / "zarr.json", lambda told: told.update(shape=[2**27], chunk_grid=chunks))
    check_small(run.path, "less is stored than the metadata say.*constant")


def test_rows_of_a_chunk_that_no_recorder_writes_are_refused(tmp_path):
    """They would be read together."""
    run = cases.recorded(tmp_path / "run")
    edit(run.path / "age" / "zarr.json", lambda told: told["chunk_grid"]["configuration"].update(chunk_shape=[2**20, 1]))
    check_small(run.path, "not what the manifest says")


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """What a kill leaves of a recording, and how to go on with it at any place."""
    folder, problem = tmp_path_factory.mktemp("killed"), cases.problem_named("frozen parameter")
    model, case = problem.model(), cases.optimizer_named("adamw")
    optimizer = case.make(cases.trainable(model))
    recorder = explaind.record(optimizer, model, folder / "run", data=cases.DATA)
    cases.train(problem, model, optimizer, case, recorder)
    recorder._writer._wait()  # a file may be renamed under a copy's hands
    shutil.copytree(folder / "run", folder / "left")
    recorder.close()
    return folder / "left", lambda path: explaind.record(optimizer, model, path, data=cases.DATA, resume=True).close()


def listing(place):
    return {file: file.read_bytes() for file in (place, *place.rglob("*")) if file.is_file()}


def linked(path, outside):
    """A link in the place of a file or a folder, which stands outside then."""
    if path.exists():
        path.rename(outside)
    else:
        outside.write_text("mine")
    path.symlink_to(outside)


PLACES = ("theta", "theta/c", "age/zarr.json", "tail.log", "tail.odd.log", "commit.json", "commit.json.partial", "constant", "analysis")


@pytest.mark.parametrize("name", PLACES)
def test_who_goes_on_with_a_run_writes_nothing_where_a_link_in_it_leads(name, killed, tmp_path):
    left, go_on = killed
    run, outside = shutil.copytree(left, tmp_path / "run"), tmp_path / "outside"
    linked(run / name, outside)
    before = listing(tmp_path)
    for act in (repair, go_on):
        with pytest.raises(ExplaindError, match="a link stands where the run is to be written") as caught:
            act(run)
        assert "\n" not in str(caught.value)
    assert listing(tmp_path) == before


def test_a_run_is_read_through_links_and_gone_on_with_where_it_is_one_itself(killed, tmp_path):
    left, go_on = killed
    run = shutil.copytree(left, tmp_path / "run")
    linked(run / "ledgers", tmp_path / "ledgers")
    linked(run, tmp_path / "elsewhere")
    go_on(run)
    linked(run / "theta" / "c", tmp_path / "chunks")
    check_whole(run)
