"""What ``explaind plan`` says of every way to record is held against what is then on disk; times and memory: experiments/plan."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from explaind.cli import main
from explaind.config import read
from explaind.ledger import choices as choosing
from explaind.ledger import trial
from explaind.ledger.by_name import decompose_by_name
from explaind.ledger.choices import spacings
from explaind.store.location import size_of
from explaind.store.reader import open_run
from explaind.store.sizes import foretold
from explaind.tasks import load
from explaind.tasks.training import train
from tests.test_cli import SMALL

CONFIGS = Path(__file__).parents[1] / "configs"
ASKED = ["--decompose.queries", "val:0:3", "--decompose.rule", "secant"]
TRAININGS = {
    "digits": ["--train.steps", "60", "--task.hidden", "16", "--task.train_examples", "300", *ASKED],
    "quickstart": ["--train.steps", "40", "--task.p", "11", "--task.width", "16", "--task.mlp", "32", *ASKED],
}


def recorded(settings, path, thin, codec, gradients=""):
    told = {"codec": "bitdelta" if codec == "any" else codec, "gradients": "store" if gradients else "recompute"}
    shorter = replace(settings, train=replace(settings.train, thin=thin, **told))
    train(load(settings.task.name, settings.task.options), shorter, path)
    return open_run(path)


@pytest.mark.parametrize("name", TRAININGS)
def test_disk_is_within_twice_of_what_is_said_for_every_choice(name, tmp_path, capsys):
    config = CONFIGS / f"{name}.toml"
    assert main(["plan", str(config), *TRAININGS[name], "--json"]) == 0
    said, settings = json.loads(capsys.readouterr().out), read(config, TRAININGS[name])
    ways = [(way["thin"], way["codec"], way["gradients"]) for way in said["choices"]]
    thin = [(every, "any", "") for every in spacings(settings.train.steps, 0)]
    assert ways == [(0, "bitdelta", ""), (0, "standard", ""), *thin, (0, "bitdelta", "float32")]
    assert [way["asked"] for way in said["choices"]] == [True, *[False] * (len(ways) - 1)]
    for way in said["choices"]:
        run = recorded(settings, tmp_path / f"{way['thin']}{way['codec']}{way['gradients']}", *map(way.get, ("thin", "codec", "gradients")))
        assert size_of(run.path) / 2 < way["disk"] < 2 * size_of(run.path), way
        assert way["decompose_seconds"] >= said["choices"][0]["decompose_seconds"] or way["gradients"]
        assert min(way[what] for what in ("record_seconds", "record_memory", "decompose_seconds", "decompose_memory")) > 0
    ledger = decompose_by_name(run, settings.decompose, save=tmp_path / "ledger")
    assert size_of(tmp_path / "ledger") / 2 < said["choices"][0]["ledger"] < 2 * size_of(tmp_path / "ledger")
    assert sum(row.values.nbytes for row in ledger.rows.values()) <= said["choices"][0]["ledger"]


def test_the_table_names_every_choice_and_marks_the_one_that_is_asked_for(capsys):
    assert main(["plan", str(SMALL), "--train.thin", "3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    names = [" ".join(line.split()[:2]) for line in lines[2:-2]]
    assert names == ["every step", "every step", "every 1", "every 3", "every 5", "every 20", "every step"]
    assert [line for line in lines if "*" in line][:-1] == [line for line in lines if line.startswith("  every 3 steps *")]
    assert all("MiB" in line for line in lines[2:-2])
    assert [line for line in lines[2:-2] if "float32" in line] == [lines[-3]]


def test_what_cannot_be_recorded_so_is_said_with_the_reason(tmp_path, capsys):
    file = tmp_path / "filtered.toml"
    file.write_text(SMALL.read_text() + '\n[gradient_filter]\nname = "GrokfastEMA"\nalpha = 0.9\nlamb = 2.0\n')
    assert main(["plan", str(file), "--json"]) == 0
    for way in json.loads(capsys.readouterr().out)["choices"]:
        assert ("a gradient filter" in way["refused"]) == bool(way["thin"] or way["gradients"])
        assert (way["disk"] is None) == bool(way["thin"] or way["gradients"])


def planned(capsys, *options):
    """Exit status, what is refused in all, and the choice that stores gradients."""
    status = main(["plan", str(SMALL), "--train.steps", "6", *options, "--json"])
    said = json.loads(capsys.readouterr().out)
    (way,) = (way for way in said["choices"] if way["gradients"])
    return status, said["refused"], way


def test_gradients_over_their_budget_are_refused_with_their_size(tmp_path, capsys):
    run = recorded(read(SMALL, ["--train.steps", "6"]), tmp_path / "run", 0, "bitdelta", "float32")
    size = int(run.gradient_checksums()[0].sum()) * run.manifest.params * 4
    beyond = ["--train.gradient_budget", str(size - 1)]
    assert planned(capsys, "--train.gradient_budget", str(size))[2]["refused"] == ""
    status, refused, way = planned(capsys, *beyond)
    assert (status, refused, way["asked"], way["disk"], way["decompose_seconds"]) == (0, [], False, None, None)
    assert f"({size} bytes)" in way["refused"]
    assert "train.gradient_budget is" in way["refused"]
    status, refused, way = planned(capsys, *beyond, "--train.gradients", "store")
    assert (status, refused, way["asked"]) == (1, [way["refused"]], True)
    status, refused, way = planned(capsys, *beyond, "--train.gradients", "store", "--train.gradient_dtype", "float16")
    assert (status, refused, way["asked"], way["gradients"], way["refused"]) == (0, [], True, "float16", "")


def test_gradients_that_cannot_be_stored_are_refused_with_the_reason(capsys):
    status, refused, way = planned(capsys, "--train.gradients", "store", "--train.thin", "3")
    assert (status, way["asked"], way["thin"]) == (1, True, 3)
    assert refused == [way["refused"]]
    assert "in a thin run" in way["refused"]


def test_stored_gradients_are_refused_before_the_training_where_there_will_be_none(tmp_path, capsys):
    asked = ["--decompose.products", "stored"]
    for verb in ("plan", "doctor"):
        assert main([verb, str(SMALL), *asked]) == 2
    assert main(["run", str(SMALL), "--out", str(tmp_path / "run"), *asked]) == 2
    assert capsys.readouterr().err.count("no gradients of examples will be stored; got products = 'stored'") == 3
    assert not (tmp_path / "run").exists()
    status, refused, way = planned(capsys, "--train.gradients", "store", *asked)
    assert (status, refused, way["asked"], way["refused"]) == (0, [], True, "")


def test_what_a_process_does_once_counts_for_every_choice(monkeypatch):
    """Reading the data, which was done before, or for which the first trial alone has waited."""
    seen = []

    def tried(*given):
        seen.append(trial.tried(*given))
        return replace(seen[-1], start=1000.0) if len(seen) == 1 else seen[-1]

    monkeypatch.setattr(choosing, "tried", tried)
    _, ways = choosing.choices(read(SMALL, ["--train.steps", "6"]), before=500.0)
    assert len(seen) == 4
    for way in ways:
        assert min(way.record_seconds, way.decompose_seconds) > 1500, way


def test_time_of_writing_goes_with_the_commits(tmp_path):
    run = recorded(read(SMALL, ["--train.steps", "20"]), tmp_path / "run", 10, "any")
    made = trial.Trial(run, start=1.0, step=0.5, write=4.0, memory=0)
    assert run.manifest.span == 10
    assert made.seconds(20) == 1 + 10 + 4
    assert made.seconds(200) == 1 + 100 + 40
    assert made.seconds(200, span=50) == 1 + 100 + 8
    assert made.seconds(20, span=400) == 1 + 10 + 2


def test_a_training_that_breaks_is_refused_in_one_line(capsys):
    assert main(["plan", str(SMALL), "--optimizer.lr", "1e30"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_run_says_its_own_size(tmp_path):
    run = recorded(read(SMALL, ["--train.steps", "40"]), tmp_path / "run", 0, "standard")
    assert abs(foretold(run, run.steps, run.manifest.block) / size_of(run.path) - 1) < 0.1
