"""Training by configuration: seeds, batches, schedules."""

from pathlib import Path

import numpy as np
import pytest
import torch

import explaind
from explaind.config import Named, read
from explaind.errors import ConfigError
from explaind.tasks import load
from explaind.tasks.training import make_optimizer, train
from tests import closeness

SMALL = Path(__file__).parent / "small.toml"


def trained(tmp_path, name, *overrides):
    config = read(SMALL, overrides)
    train(load(config.task.name, config.task.options), config, tmp_path / name)
    return explaind.open(tmp_path / name)


def test_the_seed_alone_decides(tmp_path):
    first, again, other = (trained(tmp_path, str(i), "--train.batch", "8", "--train.seed", s) for i, s in enumerate("001"))
    closeness.same(first.states(0, 21), again.states(0, 21))
    assert not np.array_equal(first.states(0, 1), other.states(0, 1))


def test_batches_go_through_all_examples_before_any_comes_twice(tmp_path):
    run = trained(tmp_path, "run", "--train.batch", "5")
    ids = [row.batch for row in run.block(0, 8).rows]  # 22 examples: 4 batches of 5 an epoch
    for epoch in (ids[:4], ids[4:]):
        assert len(set(np.concatenate(epoch).tolist())) == 20
    assert not np.array_equal(ids[0], ids[4])
    assert all(row.weight == pytest.approx(1 / 5) for row in run.block(0, 8).rows)


def test_without_a_batch_size_every_step_takes_everything(tmp_path):
    run = trained(tmp_path, "run", "--train.reduction", "sum")
    for row in run.block(0, 16).rows:
        closeness.same(row.batch, np.arange(22))
        closeness.same(row.weight, np.ones(22))


def test_warmup_raises_the_rate_linearly(tmp_path):
    run = trained(tmp_path, "run", "--train.warmup", "4")
    rates = [row.hyper[0, 0] for row in run.block(0, 6).rows]
    assert rates == pytest.approx([0.0025, 0.005, 0.0075, 0.01, 0.01, 0.01])


def test_a_broken_training_says_so_and_keeps_what_was_recorded(tmp_path):
    with pytest.raises(explaind.ExplaindError, match="not finite"):
        trained(tmp_path, "run", "--optimizer.lr", "1e30")
    run = explaind.open(tmp_path / "run")
    assert not run.complete
    assert run.damage() == []


@pytest.mark.parametrize(
    ("named", "words"),
    [
        (Named("Lookahead"), "expected one of Adadelta, Adafactor"),
        (Named("AdamV"), "expected Adam"),
        (Named("SGD", {"lr": 0.1, "momentun": 0.9}), "expected momentum"),
        (Named("SGD", {"lr": "fast"}), "the optimizer refuses its options"),
        (Named("SGD", {"lr": 0.1, "nesterov": True}), "the optimizer refuses its options"),
    ],
)
def test_optimizers_that_cannot_be_made_are_refused(named, words):
    with pytest.raises(ConfigError, match=words):
        make_optimizer(named, torch.nn.Linear(2, 2))
