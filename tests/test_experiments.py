"""Small versions of the studies under experiments/: the same code, fewer steps."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "experiments"


def loaded(name):
    spec = importlib.util.spec_from_file_location(f"experiment_{name}", FOLDER / name / "run.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_strongest_examples_of_a_digit_are_of_its_class(tmp_path):
    found = loaded("digits").same_class(tmp_path / "run", seed=0, images=40, overrides=["--train.steps", "150"])
    assert found["all_five"] >= 0.9
    assert found["explained_min"] >= 0.99
    assert found["closure_max"] <= 1e-10


def test_flipped_labels_stand_out(tmp_path):
    found = loaded("digits").flipped_labels(tmp_path / "run", seed=0, overrides=["--train.steps", "120"])
    assert found["raises_mean_held_out_loss"] >= 0.6
    assert found["lowers_own_loss"] >= 0.9
    assert found["training_loss"] >= 0.9


def test_first_steps_of_mod113(tmp_path):
    study = loaded("mod113")
    study.record(
        tmp_path / "run",
        2,
        ["--task.p", "11", "--task.train_examples", "40", "--task.val_examples", "12", "--task.width", "16", "--task.mlp", "32"],
    )
    found = study.decompose(tmp_path / "run", "midpoint:20", 1e-3, "float64", "cpu")
    assert found["recipes"] == ["midpoint:20", "midpoint:20"]
    assert found["closure"] <= 1e-10
    assert found["path_share"] <= 0.05
    assert found["peak_mb"] > 0


@pytest.mark.parametrize("name", ["digits", "mod113"])
def test_every_study_is_a_command_with_a_readme(name):
    done = subprocess.run([sys.executable, FOLDER / name / "run.py", "--help"], capture_output=True, text=True, check=True)
    assert "usage" in done.stdout
    assert f"experiments/{name}/run.py" in (FOLDER / name / "README.md").read_text()


def test_the_last_line_of_a_program_is_what_counts():
    found = loaded("mod113").last_json([sys.executable, "-c", f"print('noise'); print('{json.dumps({'a': 1})}')"])
    assert found == {"a": 1}
