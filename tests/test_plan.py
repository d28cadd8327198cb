"""What ``explaind plan`` says of every way to record is held against what is then on disk; times and memory: experiments/plan."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from explaind.cli import main
from explaind.config import read
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


def recorded(settings, path, thin, codec):
    shorter = replace(settings, train=replace(settings.train, thin=thin, codec="bitdelta" if codec == "any" else codec))
    train(load(settings.task.name, settings.task.options), shorter, path)
    return open_run(path)


@pytest.mark.parametrize("name", TRAININGS)
def test_disk_is_within_twice_of_what_is_said_for_every_choice(name, tmp_path, capsys):
    config = CONFIGS / f"{name}.toml"
    assert main(["plan", str(config), *TRAININGS[name], "--json"]) == 0
    said, settings = json.loads(capsys.readouterr().out), read(config, TRAININGS[name])
    ways = [(way["thin"], way["codec"]) for way in said["choices"]]
    assert ways[:2] == [(0, "bitdelta"), (0, "standard")]
    assert [thin for thin, _ in ways[2:]] == list(spacings(settings.train.steps, 0))
    assert [way["asked"] for way in said["choices"]] == [True, *[False] * (len(ways) - 1)]
    for way in said["choices"]:
        run = recorded(settings, tmp_path / f"{way['thin']}{way['codec']}", way["thin"], way["codec"])
        assert size_of(run.path) / 2 < way["disk"] < 2 * size_of(run.path), way
        assert way["decompose_seconds"] >= said["choices"][0]["decompose_seconds"]
        assert min(way[what] for what in ("record_seconds", "record_memory", "decompose_seconds", "decompose_memory")) > 0
    ledger = decompose_by_name(run, settings.decompose, save=tmp_path / "ledger")
    assert size_of(tmp_path / "ledger") / 2 < said["choices"][0]["ledger"] < 2 * size_of(tmp_path / "ledger")
    assert sum(row.values.nbytes for row in ledger.rows.values()) <= said["choices"][0]["ledger"]


def test_the_table_names_every_choice_and_marks_the_one_that_is_asked_for(capsys):
    assert main(["plan", str(SMALL), "--train.thin", "3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    names = [" ".join(line.split()[:2]) for line in lines[2:-1]]
    assert names == ["every step", "every step", "every 1", "every 3", "every 5", "every 20"]
    assert [line for line in lines if "*" in line][:-1] == [line for line in lines if line.startswith("  every 3 steps *")]
    assert all("MiB" in line for line in lines[2:-1])


def test_what_cannot_be_recorded_thinly_is_said_with_the_reason(tmp_path, capsys):
    file = tmp_path / "filtered.toml"
    file.write_text(SMALL.read_text() + '\n[gradient_filter]\nname = "GrokfastEMA"\nalpha = 0.9\nlamb = 2.0\n')
    assert main(["plan", str(file), "--json"]) == 0
    for way in json.loads(capsys.readouterr().out)["choices"]:
        assert ("a gradient filter" in way["refused"]) == bool(way["thin"])
        assert (way["disk"] is None) == bool(way["thin"])


def test_a_training_that_breaks_is_refused_in_one_line(capsys):
    assert main(["plan", str(SMALL), "--optimizer.lr", "1e30"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_run_says_its_own_size(tmp_path):
    run = recorded(read(SMALL, ["--train.steps", "40"]), tmp_path / "run", 0, "standard")
    assert abs(foretold(run, run.steps, run.manifest.block) / size_of(run.path) - 1) < 0.1
