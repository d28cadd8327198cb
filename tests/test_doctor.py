"""Twelve set-ups before the doctor, of which four must be refused; and what it says of a configuration and a run."""

import json
import re

import numpy as np
import pytest
import torch
from torch.utils.data import TensorDataset

import explaind
from explaind.cli import main
from explaind.ledger import doctor
from tests import cases
from tests.test_causes import Augmented, half
from tests.test_cli import SMALL as FILE
from tests.test_coupled import losses as contrastive
from tests.test_coupled import network as encoders
from tests.test_coupled import pairs
from tests.test_table import Recurrent


@pytest.fixture(autouse=True)
def short_blocks(monkeypatch):
    cases.shorten_blocks(monkeypatch)


SMALL = str(FILE)


def sgd(params):
    return torch.optim.SGD(params, lr=0.1, momentum=0.8)


def examined(path, model, make=sgd, data=cases.DATA, losses=cases.losses, recorded=None, size=4, steps=6, **given):
    """Record a plain loop, and let the doctor look at it."""
    train_losses, train_data = losses if recorded is None else recorded, given.pop("trained_on", data)
    params = [p for p in model.parameters() if p.requires_grad]
    optimizers = make(params)
    with explaind.record(optimizers, model, path, data=given.pop("fingerprinted", train_data)) as recorder:
        for step in range(steps):
            ids = torch.arange(step, step + size) % len(train_data)
            recorder.examples(ids)
            model.zero_grad()
            batch = torch.utils.data.default_collate([train_data[i] for i in ids.tolist()])
            train_losses(model, batch).mean().backward()
            for optimizer in [optimizers] if isinstance(optimizers, torch.optim.Optimizer) else optimizers:
                optimizer.step()
    queries = given.pop("queries", cases.QUERIES)
    measure = given.pop("measure", cases.measure)
    given_model = given.pop("given_model", model)
    return explaind.doctor(
        explaind.open(path), given_model, data=data, losses=losses, queries=queries, measure=measure, keep=("query", "example", "layer")
    )


def plain(problem):
    return problem.model()


def muon_and_adamw(params):
    return [torch.optim.Muon([params[0], params[2]], lr=0.02), torch.optim.AdamW([params[1], params[3]], lr=0.03)]


TOKENS = TensorDataset(torch.arange(24).reshape(8, 3) % 5, torch.tensor([0, 1, 1, 0, 1, 0, 0, 1]))
PAIRS, _ = pairs(8, 0)
SOUND = {
    "mlp": (lambda: plain(cases.PLAIN), {}, {"coupled": False, "random": False}),
    "batch norm": (lambda: plain(cases.WHOLE[2]), {}, {"coupled": True, "buffers": ["1.running_mean", "1.running_var"]}),
    "dropout": (lambda: plain(cases.WHOLE[0]), {}, {"random": True, "coupled": False}),
    "gru": (lambda: Recurrent().double(), {"data": TOKENS, "queries": TOKENS[:2][0]}, {"coupled": False}),
    "contrastive": (encoders, {"data": PAIRS, "losses": contrastive, "queries": PAIRS[:], "measure": contrastive}, {"coupled": True}),
    "tied weights": (lambda: plain(cases.problem_named("tied weights")), {}, {"coupled": False}),
    "frozen parameter": (lambda: plain(cases.problem_named("frozen parameter")), {}, {"coupled": False}),
    "two optimizers": (lambda: plain(cases.PLAIN), {"make": muon_and_adamw} if hasattr(torch.optim, "Muon") else {}, {"coupled": False}),
}
OTHER_LABELS = TensorDataset(cases.DATA.tensors[0], 1 - cases.DATA.tensors[1])
REFUSED = {
    "augmentation": ({"data": Augmented()}, "another one each time"),
    "another loss": ({"losses": half, "recorded": cases.losses}, "2 times the replayed ones"),
    "changed labels": (
        {"trained_on": cases.DATA, "data": OTHER_LABELS},
        "not the data of the training",
    ),
    "a measure of the wrong shape": ({"measure": lambda model, queries: model(queries)[None]}, "one number per query"),
}


@pytest.mark.parametrize("name", SOUND)
def test_what_can_be_explained(name, tmp_path):
    make, given, want = SOUND[name]
    torch.manual_seed(0)
    found = examined(tmp_path / "run", make(), **given)
    assert found.ok, found.refused
    for field, value in want.items():
        assert getattr(found, field) == value, field
    assert found.explained > (0.9 if name == "two optimizers" else 0.99)
    whole = name in ("batch norm", "dropout", "contrastive")
    assert set(found.layers.values()) <= ({"jvp", "backward"} if whole else {"ghost", "materialise"})
    assert found.seconds > 0
    assert found.memory > 1 << 20
    assert found.recommended["rule"] in ("secant", "adaptive")
    assert any("depend on each other" in words for words in found.warnings) == found.coupled


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_explained_is_refused_with_the_reason(name, tmp_path):
    given, words = REFUSED[name]
    torch.manual_seed(0)
    found = examined(tmp_path / "run", plain(cases.PLAIN), **given)
    assert not found.ok
    assert any(words in reason for reason in found.refused), found.refused
    assert not found.recommended


class StraightThrough(torch.nn.Sequential):
    """Rounds its hidden layer, and hands gradients on as if it did not."""

    def __init__(self):
        super().__init__(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))

    def forward(self, x):
        hidden = self[0](x)
        return self[1](hidden + (hidden.round() - hidden).detach())


class Aging(torch.nn.Linear):
    """A state that no buffer holds: replayed in the order of the training it is as it was, in another it is not."""

    def __init__(self):
        super().__init__(3, 2)
        self.age = 0

    def forward(self, x):
        self.age += 1
        return super().forward(x) * (1 + 0.1 * self.age)


@pytest.mark.parametrize(("network", "words"), [(StraightThrough, r"\|path\| is [1-9]"), (Aging, "replay differs from the record")])
def test_a_ledger_that_would_not_hold_is_refused_in_the_words_of_verify(network, words, tmp_path):
    torch.manual_seed(0)
    found = examined(tmp_path / "run", network().double(), given_model=network().double())
    assert any(re.search(words, reason) for reason in found.refused), found.refused
    assert not found.ok
    assert not found.recommended
    assert found.seconds > 0


def test_steps_that_are_too_small_to_tell_are_worth_a_warning(tmp_path):
    found = examined(tmp_path / "still", plain(cases.PLAIN), make=lambda params: torch.optim.SGD(params, lr=0.0))  # a warm-up begins so
    assert found.ok, found.refused
    assert any("of 4 steps alone: no measure moved" in words for words in found.warnings)
    coarse = TensorDataset(cases.DATA.tensors[0].float(), cases.DATA.tensors[1])
    given = {"data": coarse, "make": lambda params: torch.optim.SGD(params, lr=3e-6)}
    found = examined(tmp_path / "small", plain(cases.PLAIN).float(), **given)  # updates of a few roundings of float32
    assert found.ok, found.refused
    assert any(re.search(r"of 4 steps alone: explained is .*\|arithmetic\|", words) for words in found.warnings)


def test_a_rule_that_misses_is_worth_a_warning_where_the_recommended_one_holds(tmp_path):
    def by(rule):
        asked = {"data": cases.DATA, "losses": cases.losses, "queries": cases.QUERIES, "measure": cases.measure, "rule": rule}
        return explaind.doctor(explaind.open(tmp_path / "run"), plain(cases.PLAIN), keep=("query", "example"), **asked)

    assert examined(tmp_path / "run", plain(cases.PLAIN), make=lambda params: torch.optim.SGD(params, lr=3.0)).ok
    missing = by("midpoint:1")
    assert missing.ok
    assert any("with another rule than 'secant': explained is" in words for words in missing.warnings)
    assert not any("with another rule" in words for words in by("secant").warnings)


def test_stored_gradients_need_neither_data_nor_losses(tmp_path):
    run = cases.recorded(tmp_path / "run", gradients="store", data=cases.DATA)
    asked = {"queries": cases.QUERIES, "measure": cases.measure, "keep": ("query", "example", "layer")}
    found = explaind.doctor(run, cases.PLAIN.model(), **asked)
    assert found.ok, found.refused
    assert set(found.layers.values()) == {"stored"}
    assert found.replay_error < 1e-6
    assert found.seconds > 0
    assert any("without data and losses" in words for words in found.warnings)
    whole = explaind.doctor(run, cases.PLAIN.model(), data=cases.DATA, losses=cases.losses, **asked)
    assert (whole.ok, whole.warnings, whole.layers, whole.ledger) == (True, [], found.layers, found.ledger)
    assert not explaind.doctor(run, cases.PLAIN.model(), products="ghost", **asked).ok
    wrong = explaind.doctor(run, cases.PLAIN.model(), data=OTHER_LABELS, **asked)
    assert any("not the data of the training" in words for words in wrong.refused)


def test_data_and_losses_that_are_needed_are_asked_for(tmp_path):
    run = cases.recorded(tmp_path / "run")
    found = explaind.doctor(run, cases.PLAIN.model(), queries=cases.QUERIES, measure=cases.measure)
    assert len(found.refused) == 1
    assert "data and losses of the training are needed" in found.refused[0]


def test_steps_that_are_lived_again_beforehand_are_counted_in(tmp_path, monkeypatch):
    """Clipped steps are replayed before they are credited, rounded ones in both precisions: an estimate from few steps must know."""
    passes, own = [], doctor._passes
    monkeypatch.setattr(doctor, "_passes", lambda *of: passes.append(own(*of)) or passes[-1])
    model = plain(cases.PLAIN).float()
    optimizer = sgd(list(model.parameters()))
    for kind in ("plain", "clipped", "rounded", "both"):
        with explaind.record(optimizer, model, tmp_path / kind) as recorder:
            for ids in map(torch.tensor, ([0, 1, 2], [3, 4, 5], [6, 7, 0])):
                recorder.examples(ids)
                model.zero_grad()
                with torch.autocast("cpu", torch.bfloat16, enabled=kind in ("rounded", "both")):
                    loss = cases.losses(model, (cases.DATA[ids][0].float(), cases.DATA[ids][1])).mean()
                loss.backward()
                if kind in ("clipped", "both"):
                    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
                optimizer.step()
        asked = {"data": cases.DATA, "losses": cases.losses, "queries": cases.QUERIES, "measure": cases.measure}
        assert explaind.doctor(explaind.open(tmp_path / kind), plain(cases.PLAIN), keep=("query", "example"), **asked).ok
    assert passes == [0, 1, 1, 1]


def test_its_recommendation_is_what_auto_follows(tmp_path, capsys):
    assert main(["run", SMALL, "--out", str(tmp_path / "run"), "--auto", "--json"]) == 0
    capsys.readouterr()
    ledgers = list((tmp_path / "run" / "ledgers").iterdir())
    settings = explaind.open_ledger(ledgers[0]).settings
    assert main(["doctor", str(tmp_path / "run"), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["recommended"]["rule"] == "secant"
    assert settings["rule"] == "secant"


def test_a_configuration_is_tried_and_its_disk_is_foretold(tmp_path, capsys):
    assert main(["doctor", SMALL, "--train.steps", "60", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["ok"]
    assert said["steps"] == 60
    assert main(["record", SMALL, "--train.steps", "60", "--out", str(tmp_path / "run")]) == 0
    have = sum(file.stat().st_size for file in (tmp_path / "run").rglob("*") if file.is_file())
    assert have / 2 < said["disk"] < 2 * have
    assert said["record_seconds"] > 0
    assert said["measures"]
    assert set(said["layers"]) == set(explaind.open(tmp_path / "run").theta(0))


def test_the_doctor_prints_for_people(capsys):
    assert main(["doctor", SMALL]) == 0
    out = capsys.readouterr().out
    for words in ("can be explained", "optimizer   torch.optim", "replay", "recommended rule = 'secant'", "GiB"):
        assert words in out, words


def test_a_training_that_cannot_be_recorded_is_refused_by_the_doctor(capsys):
    assert main(["doctor", SMALL, "--optimizer.lr", "1e30"]) == 1
    assert "REFUSED: " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("recipes", "seconds"),
    [
        (["secant:1"] * 4, 4.0),
        (["secant:1", "secant:1", "gauss:1", "gauss:1"], (4.0 * 1.5) ** 0.5),
        (["gauss:1"], 9.0),
    ],
)
def test_a_pace_lies_between_those_of_the_ways_that_steps_were_averaged_in(recipes, seconds):
    """The first pause has what is done once in it."""
    pauses = [9.0, 4.0, 1.0, 2.0] if len(set(recipes)) > 1 else [9.0, 4.0, 3.0, 5.0][: len(recipes)]
    assert doctor._pace(np.array(pauses), np.array(recipes)) == pytest.approx(seconds, rel=1e-12)
