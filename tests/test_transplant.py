"""Transplants: exact facts about the surgery, and trainings that go on where they were."""

import json
import shutil

import numpy as np
import pytest
import torch

import explaind
from explaind.analysis import surgery as of_surgery
from explaind.analysis import transplant as of_transplant
from explaind.analysis.surgery import Bench, drawn, grafted, identities, layers_named, parameters_at, shuffled
from explaind.analysis.transplant import (
    Patient,
    Training,
    confused,
    memorising,
    outcome,
    patients,
    recorded,
    swapped,
    trained_on,
    transplants,
)
from explaind.cli import main
from explaind.config import read
from explaind.errors import RequestError
from explaind.tasks import load
from explaind.tasks.training import train
from tests.closeness import same
from tests.test_cli import SMALL, asked, refused


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    path = tmp_path_factory.mktemp("transplant") / "run"
    config = read(SMALL, ["--train.steps", "12"])
    train(load(config.task.name, config.task.options), config, path)
    return Bench(explaind.open(path))


def all_same(one, two):
    assert list(one) == list(two)
    for name in one:
        same(one[name], two[name])


def test_a_transplant_into_itself_changes_nothing_and_all_layers_are_the_donor(bench):
    run, everything = bench.run, [layer.name for layer in bench.run.manifest.layers]
    host, donor = run.theta(12), run.theta(3)
    for layers in ([], everything[:2], everything):
        all_same(grafted(host, host, layers), host)
    all_same(grafted(host, donor, everything), donor)
    made = grafted(host, donor, everything[:2])
    for name in everything:
        same(made[name], (donor if name in everything[:2] else host)[name])
    made[everything[0]][:] = 0.0  # a copy
    assert np.abs(donor[everything[0]]).max() > 0


def test_layers_by_name_pattern_and_group(bench):
    names = [layer.name for layer in bench.run.manifest.layers]
    assert layers_named(bench.run, bench.task, ["linear*"]) == tuple(n for n in names if n.startswith("linear"))
    assert layers_named(bench.run, bench.task, ["attention in"]) == ("query.weight", "key.weight", "value.weight")
    assert layers_named(bench.run, bench.task, ["decoder", "mix"]) == ("mix.weight", "decoder.weight")
    with pytest.raises(RequestError, match=r"expected linear[12]\.bias"):
        layers_named(bench.run, bench.task, ["linear3"])


def test_a_shuffled_donor_has_the_same_values(bench):
    theta = bench.run.theta(12)
    one, again, other = (shuffled(theta, seed) for seed in (1, 1, 2))
    all_same(one, again)
    for name in theta:
        same(np.sort(one[name], axis=None), np.sort(theta[name], axis=None))
        assert one[name].shape == theta[name].shape
    assert any((one[name] != other[name]).any() for name in theta)


@pytest.mark.parametrize("how", ["init", "normal:0.1"])
def test_what_is_drawn_follows_from_the_seed_alone(how, bench):
    before = torch.random.get_rng_state()
    one, again, other = (drawn(bench.run, bench.task, how, seed) for seed in (5, 5, 6))
    assert torch.equal(before, torch.random.get_rng_state())
    all_same(one, again)
    assert (one["embedding.weight"] != other["embedding.weight"]).any()
    assert {n: v.shape for n, v in one.items()} == {layer.name: layer.shape for layer in bench.run.manifest.layers}
    if how == "normal:0.1":
        assert 0.05 < one["embedding.weight"].std() < 0.15
    else:  # as the run itself began
        all_same(drawn(bench.run, bench.task, "init", 0), bench.run.theta(0))


@pytest.mark.parametrize("how", ["normal:", "normal:-1", "normal:x", "uniform:1"])
def test_other_ways_to_draw_are_refused(how, bench):
    with pytest.raises(RequestError, match="unknown way to draw"):
        drawn(bench.run, bench.task, how, 0)


def test_parameters_by_words(bench):
    run = bench.run
    all_same(parameters_at(run, bench.task, "last", 0), run.theta(12))
    all_same(parameters_at(run, bench.task, "7", 0), run.theta(7))
    all_same(parameters_at(run, bench.task, f"{run.path}@7", 0), run.theta(7))
    all_same(parameters_at(run, bench.task, str(run.path), 0), run.theta(12))
    for where in ("13", f"{run.path}@13", f"{run.path}@x"):
        with pytest.raises(RequestError, match="no such state"):
            parameters_at(run, bench.task, where, 0)


def test_what_is_measured_is_what_the_model_does(bench):
    theta = bench.run.theta(5)
    model = bench.task.model().eval()
    model.load_state_dict({name: torch.from_numpy(values) for name, values in theta.items()})
    found, data = bench.measured(theta), bench.task.data("val")
    with torch.no_grad():
        predicted = bench.task.predict(model, data.tensors)
        logits = model(data.tensors[0])
    assert found["val_accuracy"] == float((predicted == data.tensors[1]).double().mean())
    assert found["val_loss"] == pytest.approx(float(torch.nn.functional.cross_entropy(logits, data.tensors[1])), abs=1e-6)
    assert bench.divergence(theta, theta) == 0.0
    assert bench.divergence(theta, bench.run.theta(12)) > 0
    confusion = bench.confusion(theta)
    assert confusion.sum() == len(data)
    assert np.trace(confusion) == int((predicted == data.tensors[1]).sum())


def test_swapping_gives_the_donor_or_the_host_at_the_ends(bench):
    host, everything = bench.run.theta(12), [layer.name for layer in bench.run.manifest.layers]
    nothing, whole = swapped(bench, host, [0, 12], []), swapped(bench, host, [0, 12], everything)
    assert nothing["kl"].tolist() == [0.0, 0.0]
    assert whole["kl"][1] == 0.0 < whole["kl"][0]
    half = swapped(bench, host, [3], everything[:2])
    for name, of in (("kl", host), ("kl_donor", bench.run.theta(3))):
        for split, end in (("val", ""), ("train", "_train")):
            assert half[f"{name}{end}"][0] == bench.divergence(of, grafted(host, bench.run.theta(3), everything[:2]), split)
    assert whole["val_loss"][0] == bench.measured(bench.run.theta(0))["val_loss"]


def test_training_on_from_the_beginning_is_the_training(bench, tmp_path):
    found = trained_on(bench, bench.run.theta(0), Training(12, stop=2.0), seed=0, path=tmp_path / "run")
    again = explaind.open(tmp_path / "run")
    same(again.states(0, 13), bench.run.states(0, 13))
    assert found.steps is None
    assert found.taken == 12
    assert recorded(bench, again, Training(12, stop=2.0)) == found
    assert found.val_accuracy == bench.measured(bench.run.theta(12))["val_accuracy"]


def test_training_ends_where_the_aim_is_reached(bench, tmp_path):
    accuracies = [bench.measured(bench.run.theta(step))["train_loss"] for step in range(13)]
    assert accuracies[6] < accuracies[0]
    aim = bench.measured(bench.run.theta(4))["val_accuracy"]
    first = next(s for s in range(0, 13, 2) if bench.measured(bench.run.theta(s))["val_accuracy"] >= aim)
    found = trained_on(bench, bench.run.theta(0), Training(12, stop=aim, every=2), seed=0)
    assert found.steps == found.taken == first


def test_what_begins_at_its_aim_reached_it_after_no_step(bench, tmp_path):
    begun = bench.run.theta(12)
    aim = Training(4, stop=bench.measured(begun)["val_accuracy"], every=2)
    told = trained_on(bench, begun, aim, seed=0)
    assert (told.steps, told.taken) == (0, 0)
    kept = trained_on(bench, begun, aim, seed=0, path=tmp_path / "run")
    assert kept.steps == 0 < kept.taken
    assert recorded(bench, explaind.open(tmp_path / "run"), aim) == kept


def test_patients_begin_as_their_kind_says(bench):
    donor, fresh = bench.run.theta(9), drawn(bench.run, bench.task, "init", 3)
    layers = ("decoder.weight",)
    kinds = {p.kind: p.theta(bench) for p in patients([9], layers, [3])}
    assert list(kinds) == ["transplant", "random", "shuffled", "whole"]
    all_same(kinds["whole"], donor)
    all_same(kinds["random"], fresh)
    for name in donor:
        same(kinds["transplant"][name], (donor if name in layers else fresh)[name])
        if name not in layers:
            same(kinds["shuffled"][name], fresh[name])
    same(kinds["shuffled"]["decoder.weight"], shuffled(donor, 3)["decoder.weight"])


def test_what_was_interrupted_goes_on_and_nothing_is_trained_twice(bench, tmp_path, monkeypatch):
    asked_for, training = patients([2, 8], ("decoder.weight",), [0, 1], kinds=("transplant", "random")), Training(4, stop=2.0, every=2)
    fit, count = of_transplant.fit, []

    def stopping(*args, **named):
        count.append(1)
        if len(count) == 4:
            raise KeyboardInterrupt
        return fit(*args, **named)

    monkeypatch.setattr(of_transplant, "fit", stopping)
    with pytest.raises(KeyboardInterrupt):
        transplants(bench, asked_for, training, tmp_path)
    found = transplants(bench, asked_for, training, tmp_path)
    assert len(count) == 1 + 6  # of eight patients, two are the same training from scratch twice
    again = transplants(bench, asked_for, training, tmp_path)
    assert len(count) == 7
    for name in found.columns:
        assert np.array_equal(found[name], again[name], equal_nan=name in ("steps", "still"))
    assert np.isnan(found["steps"]).all()
    assert len(list(tmp_path.glob("*.json"))) == 6
    assert outcome(bench, asked_for[0], Training(2, stop=2.0), tmp_path).taken == 2  # another training is another one
    next(tmp_path.glob("*.json")).write_text("{")  # what is damaged is trained again
    transplants(bench, asked_for, training, tmp_path)
    assert len(count) in (8, 9)


def test_a_self_transplant_is_the_identity_bitwise(bench):
    found = identities(bench.run, [0, 5, 12], ("decoder.weight",))
    for name in ("self", "whole", "rest"):
        assert found[name].all(), name


def test_a_transplant_that_changes_a_bit_is_not_the_identity(bench, monkeypatch):
    def careless(host, donor, layers):
        made = grafted(host, donor, layers)
        made["embedding.weight"].flat[0] = np.nextafter(made["embedding.weight"].flat[0], np.inf)
        return made

    monkeypatch.setattr(of_surgery, "grafted", careless)
    found = identities(bench.run, [5], ("decoder.weight",))
    for name in ("self", "whole", "rest"):
        assert not found[name].any(), name


def test_confusions_are_counted_by_class(bench):
    table = confused(bench, bench.run.theta(12), [0, 12], ("decoder.weight",))
    for step in (0, 12):
        mine = table.where(donor=step)
        assert mine["count"].sum() == len(bench.task.data("val"))
        right = mine["count"][mine["true"] == mine["predicted"]].sum() / mine["count"].sum()
        assert right == pytest.approx(swapped(bench, bench.run.theta(12), [step], ("decoder.weight",))["val_accuracy"][0])


def test_the_memorisation_phase_is_where_training_fits_and_validation_does_not(bench):
    accuracies = [bench.measured(bench.run.theta(step)) for step in range(13)]
    fitted = accuracies[6]["train_accuracy"]
    step = memorising(bench, Training(4, stop=2.0, every=1), fitted)
    assert step == next(s for s, found in enumerate(accuracies) if found["train_accuracy"] >= fitted)
    with pytest.raises(explaind.ExplaindError, match="no memorisation phase"):
        memorising(bench, Training(4, stop=0.0), fitted)


def test_frozen_layers_stay_as_they_are(bench, tmp_path):
    theta = bench.run.theta(12)
    trained_on(bench, theta, Training(4, stop=2.0), seed=0, path=tmp_path / "run", frozen=("decoder.weight",))
    run = explaind.open(tmp_path / "run")
    last = {**run.theta(4), **run.constants}
    moved = {name for name in theta if not np.array_equal(last[name], theta[name])}
    assert moved == set(theta) - {"decoder.weight"}
    with pytest.raises(explaind.ExplaindError, match="nothing is left to train"):
        trained_on(bench, theta, Training(4), seed=0, frozen=tuple(theta))


def test_a_kind_of_patient_that_does_not_exist_is_refused():
    with pytest.raises(explaind.ExplaindError, match=r"unknown kind of patient.*'moved'"):
        Patient("moved", 3, (), 0)


def test_transplant_on_the_command_line(bench, capsys):
    run = bench.run.path
    status, text = asked(capsys, "transplant", run, "--from", "3", "--layers", "decoder,linear*", "--json")
    found = json.loads(text)
    assert status == 0
    assert found["layers"] == ["linear1.weight", "linear1.bias", "linear2.weight", "linear2.bias", "decoder.weight"]
    assert found["evaluated"]["host"]["kl_from_host"] == 0.0 < found["evaluated"]["transplant"]["kl_from_host"]
    assert found["evaluated"]["donor"]["val_loss"] == bench.measured(bench.run.theta(3))["val_loss"]
    training = ("transplant", run, "--from", "last", "--layers", "decoder", "--into", "init", "--train", "4", "--seeds", "2")
    status, text = asked(capsys, *training)
    assert status == 0
    assert "seed 1: validation not 0.95" in text
    recorded = explaind.open(run / "transplants" / "last-into-init" / "seed-1")
    assert recorded.steps == 4
    all_same(recorded.theta(0), Patient("transplant", 12, ("decoder.weight",), 1).theta(bench))
    before = (recorded.path / "commit.json").stat().st_mtime_ns
    assert asked(capsys, *training)[1] == text
    assert (recorded.path / "commit.json").stat().st_mtime_ns == before
    assert main(["decompose", str(recorded.path), "--queries", "val:0:2"]) == 0
    capsys.readouterr()
    assert "another transplant has that name" in refused(capsys, *training[:5], "mix", *training[6:])
    assert "names what is not there" in refused(capsys, "transplant", run, "--from", "3", "--layers", "decodr")
    assert "no such state" in refused(capsys, "transplant", run, "--from", "99", "--layers", "decoder")
    for option in (("--seeds", "2"), ("--name", "mine")):
        assert "an option of a training, and nothing is trained; got " + " ".join(option) in refused(capsys, *training[:6], *option)


def test_a_transplant_goes_on_wherever_its_run_lies_and_however_it_is_called(bench, tmp_path, capsys, monkeypatch):
    run, wanted = shutil.copytree(bench.run.path, tmp_path / "one"), ("--layers", "decoder", "--train", "2", "--name", "mine")
    assert asked(capsys, "transplant", run, "--from", f"{run}@3", *wanted)[0] == 0
    done = run / "transplants" / "mine" / "seed-0" / "commit.json"
    before = done.stat().st_mtime_ns
    claim, file = json.loads((done.parents[1] / "transplant.json").read_text()), done.parents[1] / "transplant.json"
    assert str(tmp_path) not in file.read_text()
    monkeypatch.chdir(tmp_path)
    assert asked(capsys, "transplant", "one", "--from", "one@3", *wanted)[0] == 0
    run.rename("two")
    monkeypatch.chdir("two")
    assert asked(capsys, "transplant", ".", "--from", "../two@3", *wanted)[0] == 0
    assert "another transplant has that name" in refused(capsys, "transplant", ".", "--from", "../two@4", *wanted)
    done = tmp_path / "two" / "transplants" / "mine" / "seed-0" / "commit.json"
    older = {"run": "elsewhere/one", **{key: claim[key] for key in claim if key != "identity"}, "from": "../two@3"}
    (done.parents[1] / "transplant.json").write_text(json.dumps(older))  # claims that are not by identity stay readable
    assert asked(capsys, "transplant", ".", "--from", "../two@3", *wanted)[0] == 0
    assert "another transplant has that name" in refused(capsys, "transplant", ".", "--from", "3", *wanted)
    assert done.stat().st_mtime_ns == before
