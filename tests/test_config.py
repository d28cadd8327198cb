"""Configurations: one way through the checks, and errors that name file, key and nearest valid key."""

from pathlib import Path

import pytest

import explaind
from explaind.config import Config, Decompose, bytes_of, literal, read, resolved
from explaind.errors import ConfigError
from explaind.tasks import load
from explaind.tasks.training import train

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.toml"))
MOD53 = Path(__file__).parents[1] / "configs" / "mod53.toml"
SMALL = """
[task]
name = "modular"
p = 7
[train]
steps = 3
[optimizer]
name = "SGD"
lr = 0.1
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "small.toml"
    path.write_text(SMALL)
    return path


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_is_complete_and_survives_a_round_trip(path):
    config = read(path)
    assert resolved(config.to_json(), "again") == config


def test_what_is_not_given_takes_its_default(file):
    config = read(file)
    assert config.decompose == Decompose()
    assert (config.task.name, config.task.options) == ("modular", {"p": 7})
    assert (config.train.steps, config.train.batch, config.train.reduction) == (3, 0, "mean")


def test_overrides_win_and_may_be_written_both_ways(file):
    config = read(file, ["--train.steps", "5", "--optimizer.lr=1e-2", "--decompose.keep", "query,example", "--task.operation", "multiply"])
    assert config.train.steps == 5
    assert config.optimizer.options["lr"] == 0.01
    assert config.decompose.keep == ("query", "example")
    assert config.task.options["operation"] == "multiply"


@pytest.mark.parametrize(
    ("text", "value"), [("3", 3), ("1e-3", 1e-3), ("true", True), ("[0.9, 0.98]", [0.9, 0.98]), ("add", "add"), ("val:0:4", "val:0:4")]
)
def test_literals_are_read_as_toml_or_else_as_text(text, value):
    assert literal(text) == value


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["--train.stepz", "3"], ["small.toml: train", "expected steps", "'stepz'"]),
        (["--trian.steps", "3"], ["small.toml", "expected train", "[trian]"]),
        (["--train.steps", "many"], ["train.steps", "expected int", "'many'"]),
        (["--train.steps", "true"], ["train.steps", "expected int", "True"]),
        (["--train.reduction", "max"], ["expected mean | sum", "'max'"]),
        (["--decompose.dtype", "float16"], ["expected float64 | float32"]),
        (["--decompose.keep", "3"], ["expected list of str"]),
        (["--task", "modular"], ["expected --table.key value", "'--task'"]),
        (["--train.steps"], ["expected --train.steps VALUE", "nothing after it"]),
        (["stray"], ["unknown argument", "'stray'"]),
        (["--task.name", "3"], ["name = a string", "3"]),
    ],
)
def test_a_wrong_override_is_named_with_what_was_meant(file, overrides, words):
    with pytest.raises(ConfigError) as caught:
        read(file, overrides)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("table", ["task", "train", "optimizer"])
def test_a_missing_table_is_named(file, table):
    kept = {name: {"name": "x", "steps": 1} for name in ("task", "train", "optimizer") if name != table}
    kept = {name: ({"steps": 1} if name == "train" else {"name": "x"}) for name in kept}
    with pytest.raises(ConfigError, match=rf"expected \[{table}\]"):
        resolved(kept, "file")


def test_a_file_that_is_no_toml_or_not_there(tmp_path):
    (tmp_path / "bad.toml").write_text("[task\n")
    with pytest.raises(ConfigError, match="not TOML"):
        read(tmp_path / "bad.toml")
    with pytest.raises(ConfigError, match="No such file"):
        read(tmp_path / "none.toml")


def test_missing_key_is_named():
    with pytest.raises(ConfigError, match=r"missing key .*expected steps"):
        resolved({"task": {"name": "modular"}, "train": {}, "optimizer": {"name": "SGD"}}, "file")


def test_a_config_is_a_value():
    config = resolved({"task": {"name": "modular"}, "train": {"steps": 1}, "optimizer": {"name": "SGD"}}, "file")
    assert isinstance(config, Config)
    with pytest.raises(AttributeError):
        config.train = None


@pytest.mark.parametrize(
    ("amount", "size"),
    [("512MiB", 512 << 20), ("2GiB", 2 << 30), ("1.5GB", 1_500_000_000), ("2 GiB", 2 << 30), ("4096", 4096), (4096, 4096), ("3kB", 3000)],
)
def test_amounts_of_memory_are_read(amount, size):
    assert bytes_of(amount, "here") == size


@pytest.mark.parametrize("amount", ["", "much", "2 Gib", "-1GiB", "0", "1e9", "GiB", "1.5.2GB", -5, "0.5B"])
def test_what_is_no_amount_of_memory_is_refused(amount):
    with pytest.raises(ConfigError, match=r"not an amount of memory \(here\).*such as 2GiB"):
        bytes_of(amount, "here")


def test_memory_may_be_a_number_or_a_text(file):
    assert read(file, ["--decompose.memory", "4096"]).decompose.memory == 4096
    assert read(file, ["--decompose.memory", "2GiB"]).decompose.memory == "2GiB"
    with pytest.raises(ConfigError, match=r"expected str \| int"):
        read(file, ["--decompose.memory", "true"])


def test_the_long_configuration_keeps_its_record_small(tmp_path):
    path = Path(__file__).parents[1] / "configs" / "nanda.toml"
    assert read(path).train.thin == "sqrt"
    few = read(path, ["--train.steps", "4", "--task.width", "16", "--task.mlp", "16"])
    train(load(few.task.name, few.task.options), few, tmp_path / "run")
    run = explaind.open(tmp_path / "run")
    assert (run.complete, run.steps, run.manifest.thin is not None, run.manifest.block) == (True, 4, True, 2)


def test_what_is_asked_of_a_run_does_not_make_its_training_another_one():
    """By which kept trainings are known."""
    plain = read(MOD53)
    asked = read(MOD53, ["--decompose.tol", "0.5", "--report.dpi", "30"])
    assert asked.to_json() != plain.to_json()
    assert asked.of_training() == plain.of_training()
    assert read(MOD53, ["--train.seed", "7"]).of_training() != plain.of_training()
