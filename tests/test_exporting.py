"""A run in one file and back is bitwise what it was; what is damaged, hostile or in the way is refused in a line, and leaves nothing."""

import gc
import json
import shutil
import tracemalloc

import numpy as np
import pytest

import explaind
from explaind.cli import main
from explaind.errors import StoreError
from explaind.ledger.ledger import Ledger
from explaind.store import admission
from explaind.store.exporting import export_run, import_run
from explaind.store.repair import repair
from explaind.store.row import StepRow
from explaind.store.writer import RunWriter
from tests import cases
from tests.closeness import same
from tests.test_store import MODES, manifest, odd_numbers, step_row

h5py = pytest.importorskip("h5py", reason="HDF5 needs h5py")
KINDS = ("h5", "zip")
every_kind = pytest.mark.parametrize("kind", KINDS)
NAMES = (
    "sgd",
    "sgd momentum",
    "adamw",
    "adam amsgrad",
    "adafactor",
    "nadam",
    "rmsprop centred momentum maximize",
    "lion",
    "adam in groups",
)


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def back(run, tmp_path, kind, **options):
    """Out of the store and in again."""
    export_run(run, tmp_path / f"out.{kind}", **options)
    import_run(tmp_path / f"out.{kind}", tmp_path / "back")
    return tmp_path / "back"


def check_same(run, again):
    """Every file, chunks and metadata, byte by byte."""
    want, got = files(run), files(again)
    assert want.keys() == got.keys()
    assert not [name for name in want if want[name] != got[name]]
    assert explaind.open(again).damage() == explaind.open(run).damage() == []
    assert explaind.open(again).identity == explaind.open(run).identity


@every_kind
@pytest.mark.parametrize("name", NAMES)
def test_runs_of_any_optimizer_come_back_bitwise(name, kind, tmp_path, monkeypatch):
    cases.shorten_blocks(monkeypatch)
    run = cases.recorded(tmp_path / "run", case=cases.optimizer_named(name), data=cases.DATA)
    check_same(run.path, back(run.path, tmp_path, kind))


OPTIONS = {
    "no fingerprints": ("mean loss", {}),
    "standard codec": ("mean loss", {"codec": "standard"}),
    "constants": ("frozen parameter", {"data": cases.DATA}),
    "random states": ("dropout in micro-batches", {}),
    "moving buffers": ("batch norm", {}),
    "a gap": ("mean loss", {"steps": [(0, 2), (4, 7)]}),
    "a gradient filter": ("mean loss", {"gradient_filter": explaind.GrokfastMA(2, 0.5)}),
    "a configuration": ("clipped by norm", {"config": {"task": {"name": "ünï", "options": [1, None, 0.1]}}}),
}


@every_kind
@pytest.mark.parametrize("what", OPTIONS)
def test_all_that_a_run_may_hold_comes_back_bitwise(what, kind, tmp_path, monkeypatch):
    cases.shorten_blocks(monkeypatch)
    problem, options = OPTIONS[what]
    run = cases.recorded(tmp_path / "run", cases.problem_named(problem), cases.optimizer_named("adamw"), **options)
    check_same(run.path, back(run.path, tmp_path, kind))


@every_kind
@pytest.mark.parametrize(("steps", "dtype"), [(0, "float64"), (1, "float32"), (8, "float32")])
def test_any_bits_and_constants_of_any_shape_come_back(steps, dtype, kind, tmp_path):
    rng = np.random.default_rng(steps)
    theta = odd_numbers(rng, (steps + 1, 11), dtype)
    constants = {
        "still.x": odd_numbers(rng, (2, 2), dtype),
        "seen": np.array(7),
        "mask": np.array([True, False]),
        "none": np.zeros((0, 3), np.float32),
        "phase": np.array([1j, np.nan]),
        "zeros": np.zeros(5),
        "half": np.array([-0.0, 1], np.float16),
        "a": np.array([1.0]),
        "a/b.weight": np.array([2.0]),
        "a%2Fb.weight": np.array([3.0]),
        "a\\b:c%": np.array([4.0]),
    }
    prints = rng.integers(0, 2**32, 9, dtype=np.uint32)
    writer = RunWriter(tmp_path / "run", manifest(3, dtype), theta[0], constants, prints, momentum=True, preconditioner=True)
    for step, after in enumerate(theta[1:]):
        writer.add(step_row(rng, step, 3, dtype), after)
    writer.close()
    check_same(tmp_path / "run", back(tmp_path / "run", tmp_path, kind))
    again = explaind.open(tmp_path / "back")
    assert again.constants.keys() == constants.keys()
    for name, values in constants.items():
        same(again.constants[name], values, name)
    assert again.damage() == []


@every_kind
def test_a_recording_that_was_killed_comes_back_with_its_log(kind, tmp_path, monkeypatch):
    cases.shorten_blocks(monkeypatch)
    case, model = cases.optimizer_named("adamw"), cases.PLAIN.model()
    optimizer = case.make(cases.trainable(model))
    with explaind.record(optimizer, model, tmp_path / "live") as recorder:
        cases.train(cases.PLAIN, model, optimizer, case, recorder)
        shutil.copytree(tmp_path / "live", tmp_path / "run", ignore=shutil.ignore_patterns("*.partial"))  # what a kill would leave
        with pytest.raises(StoreError, match=r"this run is being recorded.*live"):
            export_run(tmp_path / "live", tmp_path / f"live.{kind}")
    run, again = explaind.open(tmp_path / "run"), explaind.open(back(tmp_path / "run", tmp_path, kind))
    # Rows behind the marker are no part of the record; the log has them.
    assert (run.steps, run.complete, run.logged, run.damage()) == (again.steps, again.complete, again.logged, again.damage())
    assert (run.steps + run.logged, run.complete) == (7, False)
    assert run.steps in (2, 5), "the second block may still have been on its way"
    assert run.identity == again.identity
    same(run.states(0, run.steps + 1), again.states(0, run.steps + 1))
    if kind == "zip":
        assert explaind.open(tmp_path / "out.zip").logged == run.logged
        with pytest.raises(StoreError, match="a run in a zip is only read"):
            repair(tmp_path / "out.zip")
    assert repair(run.path) == repair(again.path)
    check_same(run.path, again.path)


def with_ledgers(path):
    """Two ledgers whose steps are not alike, one with names as coordinates; one that is not finished; a report."""
    run = cases.recorded(path, case=cases.optimizer_named("adamw"), data=cases.DATA, codec="standard")
    cases.decomposed(run, save=path / "ledgers" / "val-0-16.ü", groups={"layer": {"first": ["0.*"]}}, windows=2)
    cases.decomposed(run, save=path / "ledgers" / "by step")
    shutil.copytree(path / "ledgers" / "by step", path / "ledgers" / ".begun")
    (path / "report").mkdir()
    (path / "report" / "summary.json").write_text("{}")
    return run


@every_kind
def test_finished_ledgers_come_along_and_figures_stay(kind, tmp_path):
    run = with_ledgers(tmp_path / "run")
    again = back(run.path, tmp_path, kind)
    want = {name: text for name, text in files(run.path).items() if "report" not in name and ".begun" not in name}
    assert files(again) == want
    ledger = explaind.open_ledger(again / "ledgers" / "val-0-16.ü")
    assert isinstance(ledger, Ledger)
    assert ledger.verify().ok
    import_run(tmp_path / f"out.{kind}", tmp_path / "bare", ledgers=False)
    assert files(tmp_path / "bare") == {name: text for name, text in want.items() if not name.startswith("ledgers")}


def test_the_names_of_the_schema_are_those_that_are_written(tmp_path):
    run = with_ledgers(tmp_path / "run")
    checks = {path.name for path in (run.path / "ledgers" / "by step" / "check").iterdir() if path.is_dir()}
    assert checks == admission.CHECKS
    assert {path.name for path in run.path.iterdir() if (path / "zarr.json").exists()} <= admission.COLUMNS


def test_the_command_line_says_what_it_did(tmp_path, capsys):
    run = with_ledgers(tmp_path / "run")
    told = {}
    for kind in KINDS:
        out, again = tmp_path / f"out.{kind}", tmp_path / f"again-{kind}"
        assert main(["export", str(run.path), str(out), "--json"]) == 0
        assert json.loads(capsys.readouterr().out) == {
            "run": str(run.path), "file": str(out), "steps": 7, "complete": True,
            "ledgers": ["by step", "val-0-16.ü"], "bytes": out.stat().st_size,
        }  # fmt: skip
        assert main(["import", str(out), str(again)]) == 0
        assert capsys.readouterr().out == f"imported {out} to {again}: 7 steps, 2 ledgers, {out.stat().st_size / 2**20:.1f} MiB\n"
        for path in (run.path, again):
            assert main(["info", str(path), "--json"]) == 0
            told[path] = capsys.readouterr().out.replace(str(path), "RUN").replace("/.begun", "")
        assert json.loads(told[again]) == json.loads(told[run.path])
        assert main(["export", str(run.path), str(out), "--no-ledgers", "--overwrite"]) == 0
        assert "0 ledgers" in capsys.readouterr().out


@every_kind
def test_what_is_there_is_replaced_only_when_asked(kind, tmp_path):
    first = cases.recorded(tmp_path / "run", case=cases.optimizer_named("sgd"))
    second = cases.recorded(tmp_path / "other", case=cases.optimizer_named("adamw"))
    out = tmp_path / f"out.{kind}"
    export_run(first.path, out)
    whole = out.read_bytes()
    with pytest.raises(StoreError, match=r"something here already.*out.*overwrite"):
        export_run(second.path, out)
    with pytest.raises(StoreError, match=r"something here already.*other.*overwrite"):
        import_run(out, second.path)
    assert out.read_bytes() == whole
    import_run(out, second.path, overwrite=True)
    check_same(first.path, second.path)
    export_run(second.path, out, overwrite=True)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("dear")
    with pytest.raises(StoreError, match="not a run"):  # even then only a run
        import_run(out, tmp_path / "mine", overwrite=True)
    (tmp_path / f"folder.{kind}").mkdir()
    with pytest.raises(StoreError, match="something here already"):
        export_run(first.path, tmp_path / f"folder.{kind}", overwrite=True)
    with pytest.raises(StoreError, match=r"unknown kind of file.*ends with \.h5, \.hdf5, \.zip"):
        export_run(first.path, tmp_path / "out.tar")
    with pytest.raises(StoreError, match="no file to import"):
        import_run(tmp_path / f"none.{kind}", tmp_path / "new")
    (tmp_path / "empty").mkdir()
    import_run(out, tmp_path / "empty")
    check_same(first.path, tmp_path / "empty")


@every_kind
def test_what_is_interrupted_leaves_nothing_and_harms_nothing(kind, tmp_path):
    run = cases.recorded(tmp_path / "run")
    out = tmp_path / f"out.{kind}"
    export_run(run.path, out)
    before = files(tmp_path)

    def stop(done, total):
        if done > total // 2:
            raise KeyboardInterrupt

    for act in (
        lambda: export_run(run.path, tmp_path / f"new.{kind}", progress=stop),
        lambda: export_run(run.path, out, overwrite=True, progress=stop),
        lambda: import_run(out, tmp_path / "new", progress=stop),
        lambda: import_run(out, run.path, overwrite=True, progress=stop),
    ):
        with pytest.raises(KeyboardInterrupt):
            act()
        assert files(tmp_path) == before
        assert {path.name for path in tmp_path.iterdir()} == {"run", out.name}


@every_kind
def test_memory_holds_a_few_chunks_and_never_an_array(kind, tmp_path):
    params, block = 16_000, 4

    def written(steps):
        told = manifest(block, "float64")
        layer = type(told.layers[0])("a", (params,), 0, params)
        told = type(told)(**{**vars(told), "layers": (layer,)})
        rng, path = np.random.default_rng(0), tmp_path / f"run{steps}"
        writer = RunWriter(path, told, rng.random(params), {}, None, momentum=False, preconditioner=False)
        for _ in range(steps):
            batch, part, weight = np.arange(3), np.zeros(3, np.int32), np.ones(3)
            row = StepRow(batch, part, weight, np.ones((1, 2)), np.ones(1, np.int32), MODES[0], None, None, np.ones((1, 1)))
            writer.add(row, rng.random(params))
        writer.close()
        return path

    def peak(act, *arguments):
        tracemalloc.start()
        act(*arguments)
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most

    gc.collect()
    chunk, peaks = 8 * block * params, []
    for steps in (16, 32, 128):  # the first also imports what is needed for it
        run, out, back = written(steps), tmp_path / f"out{steps}.{kind}", tmp_path / f"back{steps}"
        peaks.append((peak(export_run, run, out), peak(import_run, out, back)))
        check_same(run, back)
    for short, long in zip(*peaks[1:], strict=True):
        # How many chunks are on their way at once is up to threads; all that 96 more steps come with are 24 more.
        assert max(short, long) < 16 * chunk
        assert long - short < 6 * chunk
