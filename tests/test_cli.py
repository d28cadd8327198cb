"""The command line as a newcomer meets it, happy and unhappy."""

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import zarr
from torch.utils.data import TensorDataset

import explaind
from explaind.analysis import similarity as of_similarity
from explaind.analysis.analyse import Analysed, read_tables
from explaind.analysis.table import Table
from explaind.cli import main
from explaind.errors import StoreError
from explaind.ledger.by_name import task_of
from tests import cases

SCORES = {"step_scores", "example_scores"}
SMALL = Path(__file__).parent / "small.toml"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run with its ledger and report."""
    out = tmp_path_factory.mktemp("cli") / "run"
    assert main(["run", str(SMALL), "--out", str(out)]) == 0
    return out


@pytest.fixture
def copied(finished, tmp_path):
    return Path(shutil.copytree(finished, tmp_path / "run"))


def refused(capsys, *arguments):
    """The one line on stderr of a command that must exit with 2."""
    assert main([str(a) for a in arguments]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("explaind: ")
    assert said.err.count("\n") == 1
    return said.err


def asked(capsys, *arguments):
    status = main([str(a) for a in arguments])
    return status, capsys.readouterr().out


def test_run_makes_a_run_a_ledger_and_a_report(finished, capsys):
    figures = {p.stem for p in (finished / "report" / "ledgers" / "val.target_log_probability").glob("*.png")}
    predictions = {f"{kind}_query{i}" for kind in ("waterfall", "examples") for i in (0, 1)}
    assert figures == {"training", "layers_over_steps", "layer_shares", "balance", "rest_rows"} | predictions
    assert {p.stem for p in (finished / "report" / "run").iterdir()} == {"training", "progress", "key_frequencies", "clock_or_pizza"}
    summary = json.loads((finished / "report" / "ledgers" / "val.target_log_probability" / "ledger.json").read_text())
    assert len(summary["predictions"]) == 6
    for prediction in summary["predictions"]:
        assert abs(sum(prediction["rows"].values()) - prediction["final"]) <= 1e-10
        assert prediction["explained"] >= 0.99
        assert prediction["path"] + prediction["arithmetic"] <= 0.01 * prediction["movement"]
        assert prediction["strongest"][0]["credit"] > 0 > prediction["strongest"][-1]["credit"]
    assert summary["run"]["config"]["optimizer"] == {"name": "AdamW", "lr": 0.01, "weight_decay": 0.5}


def test_the_resolved_config_is_kept_with_the_run(finished):
    config = explaind.open(finished).manifest.config
    assert config["decompose"]["tol"] == 1e-3
    assert config["train"]["reduction"] == "mean"


def test_verify_and_info_in_words_and_as_json(finished, capsys):
    ledger = finished / "ledgers" / "val.target_log_probability"
    for path, key in ((finished, "run"), (ledger, "ledger")):
        status, text = asked(capsys, "verify", path)
        assert status == 0
        assert "ok" in text
        status, text = asked(capsys, "verify", path, "--json")
        assert json.loads(text)["ok"] is True
        assert key in json.loads(text)
    assert "20 steps" in asked(capsys, "info", finished)[1]
    assert json.loads(asked(capsys, "info", finished, "--json")[1])["steps"] == 20
    assert json.loads(asked(capsys, "info", ledger, "--json")[1])["axes"]["step"] == 4


def test_analyses_are_tables_with_their_formulas(copied, capsys):
    status, text = asked(capsys, "analyse", copied, "--json")
    facts = json.loads(text)["analyses"]
    assert status == 0
    assert list(facts) == ["run", "ledgers/val.target_log_probability"]
    for name, tables in (
        ("run", {"training", "key_frequencies", "progress", "clock_or_pizza"}),
        ("ledgers/val.target_log_probability", {"layer_shares", "balance", "phases", *SCORES}),
    ):
        about = json.loads((copied / "analysis" / name / "analysis.json").read_text())
        assert set(about["tables"]) == tables
        assert all(entry["formula"] and entry["source"] for entry in about["tables"].values())
        assert all(Path(file).exists() for file in facts[name]["files"])
    with (copied / "analysis" / "ledgers" / "val.target_log_probability" / "layer_shares.csv").open() as file:
        rows = list(csv.DictReader(file))
    steps = {row["step"] for row in rows}
    assert len(steps) == 4
    for step in steps:
        assert abs(sum(float(row["share"]) for row in rows if row["step"] == step) - 1) <= 1e-12
    lacking = ["similarity, kernel_pca, frequency_agreement: keep query and param"]
    assert facts["ledgers/val.target_log_probability"]["left_out"] == lacking


def test_credit_by_parameter_is_told_with_its_components_classes_and_frequencies(copied, capsys, monkeypatch):
    fine = ["decompose", copied, "--keep", "query,param,step", "--windows", "10", "--queries", "val:1:5", "--name", "fine"]
    assert asked(capsys, *fine)[0] == 0
    said = asked(capsys, "analyse", copied)[1]
    assert "left out    layer_shares: keep layer and step" in said
    assert "left out    frequency_agreement: 0 of 3 frequencies are key" in said  # of a network that has hardly begun
    shares = {name: np.array([0.1, 0.8, 0.1]) for name in ("neurons", "embedding", "decoder")}
    columns = {"frequency": np.arange(1, 4), **shares, "key": np.array([False, True, False])}
    monkeypatch.setattr("explaind.analysis.analyse.key_frequencies", lambda run, task: Table("key_frequencies", "", "", columns))
    assert asked(capsys, "analyse", copied)[0] == 0
    tables = read_tables(copied / "analysis" / "ledgers" / "fine")
    cosines = tables["similarity"].where(layer="all")
    assert cosines.where(query=2, other=2)["cosine"] == pytest.approx([1.0, 1.0], abs=1e-12)
    targets = task_of(explaind.open(copied)).data("val").tensors[1]
    assert tables["classes"]["class"].tolist() == targets[1:5].tolist()
    for step in (0, 10):
        matrix = cosines.where(step=step).grid("query", "other", "cosine")[2]
        for name, want in (
            ("kernel_pca", of_similarity.kernel_pca(matrix, np.arange(4))),
            ("frequency_agreement", of_similarity.agreement(matrix, targets[1:5].numpy(), 7, [2])),
        ):
            found = tables[name].where(step=step)
            assert {c: found[c].tolist() for c in want.columns} == {c: pytest.approx(want[c].tolist(), abs=1e-9) for c in want.columns}
        assert tables["spectrum"].where(step=step)["power"] == pytest.approx(of_similarity.spectrum(matrix, targets[1:5].numpy(), 7))
    assert asked(capsys, "report", copied)[0] == 0
    shutil.rmtree(copied / "ledgers" / "val.target_log_probability")
    (copied / "report").rename(copied / "before")
    assert asked(capsys, "report", copied)[0] == 0
    drawn = {folder: {p.stem for p in (copied / folder / "ledgers" / "fine").glob("*.png")} for folder in ("before", "report")}
    assert drawn["before"] == drawn["report"] >= {"similarity", "kernel_pca", "spectrum", "rest_rows"}
    gone = {p.stem for p in (copied / "report" / "ledgers" / "val.target_log_probability").iterdir()}
    assert gone == {"layer_shares", "balance"}  # of the tables that are left


def test_a_ledger_may_have_any_name_without_touching_other_tables(copied, capsys):
    assert asked(capsys, "analyse", copied)[0] == 0
    before = read_tables(copied / "analysis" / "run")
    (copied / "analysis" / "pruning").mkdir()
    (copied / "analysis" / "pruning" / "pruning.csv").write_text("kept\n")
    for name in ("run", "pruning", "ledgers"):
        assert asked(capsys, "decompose", copied, "--keep", "step", "--queries", "val:0", "--name", name)[0] == 0
    assert asked(capsys, "analyse", copied)[0] == 0
    assert set(read_tables(copied / "analysis" / "run")) == set(before) == {"training", "key_frequencies", "progress", "clock_or_pizza"}
    assert (copied / "analysis" / "pruning" / "pruning.csv").read_text() == "kept\n"
    for name in ("run", "pruning", "ledgers"):
        assert set(read_tables(copied / "analysis" / "ledgers" / name)) == {"step_scores"}


def test_tables_are_read_as_they_were_written(copied):
    columns = {"step": [0, 1], "share": [1 / 3, float("nan")], "layer": ["a,b", "c"], "key": [True, False]}
    made = Table("t", "f", "s", {name: np.array(values) for name, values in columns.items()})
    Analysed((made, Table("none", "", "", {"step": np.array([])})), ()).write(copied / "kept")
    found = read_tables(copied / "kept")
    assert list(found) == ["t", "none"]
    assert found["t"].about() == made.about()
    for name, values in made.columns.items():
        np.testing.assert_array_equal(found["t"][name], values)
        assert found["t"][name].dtype.kind == values.dtype.kind
    assert len(found["none"]) == 0
    assert read_tables(copied / "nowhere") == {}
    (copied / "kept" / "t.csv").write_text("step\n1,2\n")
    with pytest.raises(StoreError, match="cannot be read"):
        read_tables(copied / "kept")


def test_decompose_takes_its_options_and_refuses_to_overwrite(copied, capsys):
    options = [
        "--queries",
        "val:0:2",
        "--measure",
        "logits",
        "--keep",
        "output,example,layer",
        "--tol",
        "1e-4",
        "--dtype",
        "float64",
        "--json",
    ]
    status, text = asked(capsys, "decompose", copied, *options)
    facts = json.loads(text)
    assert status == 0
    assert list(facts["axes"]) == ["output", "example", "layer"]
    assert facts["settings"]["rule"] == "auto:0.0001"
    ledger = explaind.open_ledger(copied / "ledgers" / "val-0-2.logits")
    assert ledger.axes == ("output", "example", "layer")
    assert "something here already" in refused(capsys, "decompose", copied, *options)
    assert asked(capsys, "decompose", copied, *options, "--overwrite")[0] == 0
    assert asked(capsys, "decompose", copied, "--queries", "train:3", "--name", "mine")[0] == 0
    assert asked(capsys, "report", copied)[0] == 0
    assert (copied / "report" / "ledgers" / "mine" / "ledger.json").exists()


def test_groups_by_class_and_module(copied, capsys):
    keep = "query,example,layer,step"
    options = ["--keep", keep, "--groups", "query=target, example=target,layer=module", "--name", "classes"]
    assert asked(capsys, "decompose", copied, *options)[0] == 0
    assert asked(capsys, "decompose", copied, "--keep", keep, "--name", "whole")[0] == 0
    ledger, whole = (explaind.open_ledger(copied / "ledgers" / name) for name in ("classes", "whole"))
    task = task_of(explaind.open(copied))
    classes = {split: [str(int(task.target(task.data(split)[i]))) for i in range(len(task.data(split)))] for split in ("train", "val")}
    assert ledger.coords["query"].tolist() == sorted(set(classes["val"]), key=int)
    assert ledger.coords["example"].tolist() == sorted(set(classes["train"]), key=int)
    assert {"embedding", "mix", "linear1", "decoder"} <= set(ledger.coords["layer"].tolist())
    for place, name in enumerate(ledger.coords["query"]):
        mine = [i for i, c in enumerate(classes["val"]) if c == name]
        for other, group in enumerate(ledger.coords["example"]):
            theirs = [i for i, c in enumerate(classes["train"]) if c == group]
            want = whole["data"][mine][:, theirs].sum()
            np.testing.assert_allclose(ledger["data"][place, other].sum(), want, rtol=0, atol=1e-9)
    assert asked(capsys, "decompose", copied, "--keep", "layer", "--groups", "layer=task", "--name", "parts")[0] == 0
    parts = explaind.open_ledger(copied / "ledgers" / "parts")
    assert parts.coords["layer"].tolist() == ["embedding", "attention in", "attention out", "linear1", "linear2", "decoder"]
    assert asked(capsys, "report", copied)[0] == 0
    summary = json.loads((copied / "report" / "ledgers" / "classes" / "ledger.json").read_text())
    assert summary["predictions"][0]["strongest"][0]["label"] in classes["train"]


def test_record_alone(tmp_path, capsys):
    status, text = asked(capsys, "record", SMALL, "--out", tmp_path / "r", "--train.steps", "2", "--json")
    assert (status, json.loads(text)["steps"]) == (0, 2)
    assert "no tables and no ledger to report on" in refused(capsys, "report", tmp_path / "r")
    assert asked(capsys, "analyse", tmp_path / "r")[0] == 0
    assert asked(capsys, "report", tmp_path / "r")[0] == 0
    assert (tmp_path / "r" / "report" / "run" / "progress.png").exists()
    assert "something here already" in refused(capsys, "record", SMALL, "--out", tmp_path / "r")
    assert asked(capsys, "record", SMALL, "--out", tmp_path / "r", "--train.steps", "3", "--overwrite")[0] == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["run", SMALL, "--train.stepz", "3"], ["expected steps", "'stepz'"]),
        (["run", SMALL, "--task.operatoin", "add"], ["expected operation"]),
        (["run", SMALL, "--task.p", "1"], ["modular.p", "at least 2"]),
        (["run", SMALL, "--optimizer.name", "Lookahead"], ["unknown optimizer", "'Lookahead'"]),
        (["run", SMALL, "--optimizer.lrr", "1"], ["unknown option", "expected lr"]),
        (["run", SMALL, "--optimizer.lr", "-1"], ["the optimizer refuses its options"]),
        (["run", SMALL, "--train.batch", "1000"], ["train.batch", "at most the 22"]),
        (["run", SMALL, "--train.device", "moon"], ["the device cannot be used", "'moon'"]),
        (["run", SMALL, "--decompose.queries", "val:0:99"], ["out of range", "<= 6"]),
        (["run", SMALL, "--decompose.measure", "logit"], ["expected logits"]),
        (["run", SMALL, "--decompose.rule", "simpson:3"], ["unknown path rule"]),
        (["run", SMALL, "--decompose.keep", "query,stepp"], ["unknown axis"]),
        (["run", SMALL, "--decompose.groups", '{ layer = "modules" }'], ["unknown groups", "'module'"]),
        (["run", SMALL, "--decompose.groups", "{ step = { all = [0] } }"], ["cannot be grouped", "windows"]),
        (["run", SMALL, "--decompose.device", "moon"], ["the device cannot be used"]),
        (["run", "nowhere.toml"], ["No such file"]),
        (["info", "nowhere"], ["no run or ledger here"]),
        (["verify", "nowhere"], ["no run or ledger here"]),
        (["decompose", "nowhere"], ["no run here"]),
        (["report", "nowhere"], ["no run here"]),
        (["explode"], ["explode"]),
    ],
)
def test_bad_input_is_one_line_and_exit_2(arguments, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    line = refused(capsys, *arguments)
    assert all(word in line for word in words), line
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--queries", "val:0:99"], ["out of range", "6, the examples of val"]),
        (["--queries", "val:4:2"], ["out of range"]),
        (["--queries", "test"], ["unknown split", "train or val"]),
        (["--queries", "val:-1"], ["queries cannot be read"]),
        (["--measure", "logit"], ["expected logits"]),
        (["--keep", "query,exmple"], ["unknown axis", "exmple"]),
        (["--rule", "simpson:3"], ["unknown path rule", "midpoint:N"]),
        (["--tol", "0"], ["tol > 0"]),
        (["--dtype", "float16"], ["float64 | float32"]),
        (["--tol", "small"], ["small"]),
        (["--budget", "1e-9"], ["larger than the budget", "sum over"]),
        (["--device", "moon"], ["the device cannot be used"]),
        (["--nodes", "3"], ["--nodes"]),
        (["--groups", "layer"], ["groups cannot be read", "AXIS=WORD"]),
        (["--groups", "layer=target"], ["unknown groups", "'module'"]),
        (["--groups", "step=target"], ["unknown groups", "a table of names and members"]),
        (["--groups", "layer=module", "--keep", "query"], ["not kept", "add 'layer' to keep"]),
    ],
)
def test_a_decomposition_that_cannot_be_is_refused_in_one_line(finished, options, words, capsys):
    line = refused(capsys, "decompose", finished, "--name", "other", *options)
    assert all(word in line for word in words), line


def test_a_run_of_an_unknown_schema_version(copied, capsys):
    attributes = json.loads((copied / "zarr.json").read_text())
    attributes["attributes"]["explaind"]["schema"] = 99
    (copied / "zarr.json").write_text(json.dumps(attributes))
    cases.resealed(copied)
    for verb in ("info", "verify", "decompose", "report"):
        line = refused(capsys, verb, copied)
        assert "unknown schema version" in line
        assert "99" in line


def test_a_ledger_is_not_a_run_and_a_stranger_is_neither(finished, tmp_path, capsys):
    assert "not a run" in refused(capsys, "decompose", finished / "ledgers" / "val.target_log_probability")
    zarr.create_group(tmp_path / "other")
    assert "neither a run nor a ledger" in refused(capsys, "verify", tmp_path / "other")
    assert "not a run" in refused(capsys, "record", SMALL, "--out", tmp_path / "other", "--overwrite")


def changed(run: Path, **task) -> None:
    """Another configuration in the run's attributes: other data or another model than were trained."""
    attributes = json.loads((run / "zarr.json").read_text())
    attributes["attributes"]["manifest"]["config"]["task"] |= task
    (run / "zarr.json").write_text(json.dumps(attributes))
    cases.resealed(run)


def test_verify_names_a_changed_float_of_theta(copied, capsys):
    theta = zarr.open_group(copied)["theta"]
    theta[7, 3] = np.nextafter(theta[7, 3], np.float32(np.inf))
    status, text = asked(capsys, "verify", copied)
    assert status == 1
    assert "theta before step 7 is not what was recorded: positions changed on disk" in text


def test_verify_names_other_data_another_model_and_a_removed_step(copied, finished, tmp_path, capsys):
    changed(copied, split_seed=1)
    status, text = asked(capsys, "verify", copied)
    assert status == 1
    assert "the data is not the data of the training" in text
    other = Path(shutil.copytree(finished, tmp_path / "other"))
    changed(other, network="paper")
    status, text = asked(capsys, "verify", other)
    assert status == 1
    assert "the model is not the one that was recorded" in text
    shorter = Path(shutil.copytree(finished, tmp_path / "shorter"))
    theta = zarr.open_group(shorter)["theta"]
    theta[9:20] = theta[10:21]
    status, text = asked(capsys, "verify", shorter)
    assert status == 1
    assert "a step was removed" in text


def test_verify_names_a_changed_label_in_the_data_that_was_given(copied, capsys):
    run = explaind.open(copied)
    task = task_of(run)
    tokens, answers = task.data("train").tensors
    answers = answers.clone()
    answers[4] = (answers[4] + 1) % 7
    data, queries, measure = TensorDataset(tokens, answers), list(task.data("val").tensors), task.measures()["loss"]
    explaind.decompose(
        run, task.model(), data=data, losses=task.losses, queries=queries, measure=measure, save=copied / "ledgers" / "wrong"
    )
    for path in (copied / "ledgers" / "wrong", copied):
        status, text = asked(capsys, "verify", path)
        assert status == 1
        assert "the data is not the data of the training: 1 of 22 examples differ (input or label): 4" in text
        assert "replay differs from the record" in text


def test_a_users_own_task_is_found_where_they_stand(tmp_path, monkeypatch, capsys):
    (tmp_path / "mine.py").write_text("from dataclasses import dataclass\nfrom explaind.tasks import ModularArithmetic\n\n\n"
                                      "@dataclass(frozen=True)\nclass Mine(ModularArithmetic):\n    p: int = 5\n")  # fmt: skip
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert main(["record", str(SMALL), "--out", "r", "--task.name", "mine:Mine", "--task.p", "5", "--train.steps", "1"]) == 0
    assert main(["verify", "r"]) == 0
    capsys.readouterr()
    assert "No module named 'yours'" in refused(capsys, "record", SMALL, "--out", "s", "--task.name", "yours:Task")


def mounts() -> str | None:
    """Why a small file system cannot be made here, or None."""
    probe = subprocess.run(["unshare", "-rm", "true"], capture_output=True, text=True, check=False) if shutil.which("unshare") else None
    return "there is no unshare" if probe is None else probe.stderr.strip() or None if probe.returncode else None


@pytest.mark.skipif(mounts() is not None, reason=f"cannot mount a small tmpfs: {mounts()}")
@pytest.mark.parametrize(("size", "verb"), [("300k", "record"), ("1200k", "decompose"), ("1200k", "report")])
def test_no_space_left_is_one_line_and_loses_nothing(size, verb, finished, tmp_path):
    shell = 'mount -t tmpfs -o size=$0 tmpfs "$1" && shift && exec "$@"'
    python = f"""
import shutil, sys
from pathlib import Path
from explaind.cli import main
place = Path({str(tmp_path)!r})
if {verb!r} != "record":
    shutil.copytree({str(finished)!r}, place / "run", ignore=shutil.ignore_patterns("report"))
    with open(place / "filler", "wb", buffering=0) as filler:
        try:
            while filler.write(bytes(1024)):
                pass
        except OSError:
            pass
arguments = {{"record": ["record", {str(SMALL)!r}, "--out", str(place / "run"), "--train.steps", "400"],
              "decompose": ["decompose", str(place / "run"), "--name", "more"], "report": ["report", str(place / "run")]}}
status = main(arguments[{verb!r}])
assert main(["info", str(place / "run")]) == 0
assert main(["verify", str(place / "run")]) == 0
sys.exit(status)
"""
    command = ["unshare", "-rm", "sh", "-c", shell, size, str(tmp_path), sys.executable, "-c", python]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 2, done.stderr
    assert "No space left on device" in done.stderr
    assert done.stderr.count("\n") == 1
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("name", ["../../outside", "../ledgers/outside", "{run}/outside"])
def test_tables_are_read_from_their_own_folder_alone(name, copied):
    folder = copied / "analysis" / "run"
    main(["analyse", str(copied)])
    told = json.loads((folder / "analysis.json").read_text())
    for place in (copied / "outside.csv", folder.parent / "ledgers" / "outside.csv"):
        shutil.copy(folder / "training.csv", place)
    assert set(read_tables(folder)) == set(told["tables"])
    told["tables"][name.format(run=copied)] = told["tables"]["training"]
    (folder / "analysis.json").write_text(json.dumps(told))
    with pytest.raises(StoreError, match="these tables cannot be read"):
        read_tables(folder)


@pytest.mark.parametrize(
    ("verb", "place"),
    [
        ("analyse", "analysis"),
        ("analyse", "analysis/run"),
        ("report", "report"),
        ("report", "report/run"),
        ("report", "report/run/training.png"),
        ("decompose", "ledgers"),
        ("decompose", "ledgers/.val.target_log_probability.parts"),
    ],
)
def test_no_verb_writes_where_a_link_in_a_run_leads(verb, place, copied, capsys):
    outside = copied.parent / "outside"
    if (copied / place).exists():
        (copied / place).rename(outside)
    else:
        outside.mkdir()
    (copied / place).symlink_to(outside)
    before = sorted((file, file.stat().st_mtime_ns) for file in copied.parent.rglob("*"))
    options = ["--overwrite", "--measure", "target_log_probability", "--queries", "val"] if verb == "decompose" else []
    assert f"a link stands where the run is to be written ({copied / place}); got {outside}" in refused(capsys, verb, copied, *options)
    assert sorted((file, file.stat().st_mtime_ns) for file in copied.parent.rglob("*")) == before
