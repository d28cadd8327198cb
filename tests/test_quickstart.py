"""The demo's run: it truly groks, and its predictions are explained. (The demo itself takes all 142 of them; here it is 6.)"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import explaind
from explaind.analysis.curves import training_curves
from explaind.config import read
from explaind.ledger.by_name import decompose_by_name
from explaind.tasks import load
from explaind.tasks.training import train
from tests import closeness

CONFIG = read(Path(__file__).parents[1] / "configs" / "quickstart.toml")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    path = tmp_path_factory.mktemp("quickstart") / "run"
    train(load(CONFIG.task.name, CONFIG.task.options), CONFIG, path)
    return explaind.open(path)


def test_training_is_learned_early_and_validation_clearly_later(run):
    curves = training_curves(run, load(CONFIG.task.name, CONFIG.task.options))
    known, grasped = curves.reached("train", 0.99), curves.reached("val", 0.95)
    assert known is not None
    assert grasped is not None
    assert grasped >= 2 * known
    assert curves.accuracy["val"][curves.steps >= known][0] < 0.5
    assert curves.accuracy["val"][-1] >= 0.95


def test_predictions_are_explained_and_the_sum_closes(run):
    verdict = decompose_by_name(run, replace(CONFIG.decompose, queries="val:0:6")).verify()
    assert verdict.ok, verdict.reasons
    assert verdict.explained.min() >= 0.99
    assert verdict.maxima["closure"] <= 1e-10
    assert verdict.maxima["path_share"] <= 1e-2
    assert verdict.maxima["arithmetic_share"] <= 1e-3


def test_float32_agrees_with_float64(run):
    asked = replace(CONFIG.decompose, queries="val:0:3", keep=("query", "example", "layer"), windows=1, rule="gauss:2")
    double, single = (decompose_by_name(run.first(80), replace(asked, dtype=dtype)) for dtype in ("float64", "float32"))
    assert single["data"].dtype == np.float32
    for row in ("initial", "data", "decay", "final"):
        closeness.rounding(single[row], double[row], row)
    assert single.verify().ok
