"""The built-in tasks, their measures, and finding a task by name."""

import sys

import pytest
import torch
from torch.func import functional_call, grad, jvp, vmap
from torch.nn import functional as F
from torch.utils.data import default_collate

from explaind.errors import ConfigError
from explaind.tasks import Digits, ModularArithmetic, classification, load

TASKS = {
    "paper": ModularArithmetic(p=11, width=8, heads=2, mlp=12, train_fraction=0.6),
    "paper-gelu": ModularArithmetic(p=11, width=8, heads=2, mlp=12, train_fraction=0.6, activation="gelu"),
    "nanda": ModularArithmetic(p=11, width=8, heads=2, mlp=12, network="nanda", pairs="ordered", operation="subtract"),
    "mlp": Digits(hidden=6),
    "cnn": Digits(hidden=4, network="cnn", activation="tanh"),
}
ANSWERS = {
    "add": lambda a, b: (a + b) % 7,
    "subtract": lambda a, b: (a - b) % 7,
    "multiply": lambda a, b: a * b % 7,
    "square_sum": lambda a, b: (a**2 + b**2) % 7,
}


@pytest.fixture(params=TASKS)
def task(request):
    return TASKS[request.param]


def queries(task, count=5):
    return default_collate([task.data("val")[i] for i in range(count)])


def parameters(task):
    return {name: p.detach() for name, p in task.model().named_parameters()}


def test_the_default_is_the_papers_run():
    task = ModularArithmetic()
    model = task.model()
    assert sum(p.numel() for p in model.parameters()) == 89_664
    assert (len(task.data("train")), len(task.data("val"))) == (4000, 2441)
    assert model.heads[0].encode.weight.shape == (16, 64)
    assert len(task.outputs()) == 115


def test_nandas_run():
    task = ModularArithmetic(network="nanda", pairs="ordered", train_fraction=0.3, width=128)
    model = task.model()
    assert sum(p.numel() for p in model.parameters()) == 226_688
    assert (len(task.data("train")), len(task.data("val"))) == (3831, 8938)
    assert model.embedding.weight.std().item() == pytest.approx(128**-0.5, rel=0.05)
    assert not model.linear1.bias.any()
    assert len(task.outputs()) == 113


@pytest.mark.parametrize("operation", ANSWERS)
def test_answers_of_every_operation(operation):
    task = ModularArithmetic(p=7, operation=operation, pairs="ordered", train_examples=30)
    rows = [row for split in ("train", "val") for row in task.data(split)]
    assert sorted((int(t[0]), int(t[2])) for t, _ in rows) == [(a, b) for a in range(7) for b in range(7)]
    assert all(int(answer) == ANSWERS[operation](int(t[0]), int(t[2])) for t, answer in rows)
    assert all((int(t[1]), int(t[3])) == (7, 8) and t.dtype == torch.int64 for t, _ in rows)


def test_unordered_pairs_come_once():
    task = ModularArithmetic(p=7, train_examples=20, val_examples=5)
    train, val = ({(int(t[0]), int(t[2])) for t, _ in task.data(split)} for split in ("train", "val"))
    assert (len(train), len(val)) == (20, 5)
    assert not train & val
    assert all(a >= b for a, b in train | val)


def test_descriptions():
    assert ModularArithmetic(p=2, train_examples=2, pairs="ordered").describe("val", 0) in {
        f"{a} + {b} = {a ^ b}" for a in (0, 1) for b in (0, 1)
    }
    assert TASKS["nanda"].describe("train", 0).count("−") == 1
    assert TASKS["mlp"].describe("val", 0) == f"a {int(TASKS['mlp'].data('val')[0][1])}"


def test_equal_options_give_equal_data(task):
    again, other = type(task)(**vars_of(task)), type(task)(**vars_of(task) | {"split_seed": 1})
    assert again == task
    for mine, same, moved in zip(task.data("train").tensors, again.data("train").tensors, other.data("train").tensors, strict=True):
        assert torch.equal(mine, same)
        assert not torch.equal(mine, moved)


def vars_of(task):
    return {name: getattr(task, name) for name in task.__dataclass_fields__}


def test_the_seed_gives_the_model(task):
    first, second = (torch.nn.utils.parameters_to_vector((torch.manual_seed(3), task.model())[1].parameters()) for _ in range(2))
    assert torch.equal(first, second)


def test_the_task_fits_together(task):
    model, batch = task.model(), queries(task)
    logits = task.measures()["logits"](model, batch)
    assert logits.shape == (5, len(task.outputs()))
    assert torch.equal(task.predict(model, batch), logits.argmax(1))
    assert torch.equal(task.target(batch), batch[1])
    torch.testing.assert_close(task.losses(model, batch), F.cross_entropy(logits, batch[1], reduction="none"))
    with pytest.raises(ConfigError, match="unknown split"):
        task.data("test")


def test_measures_against_plain_torch():
    logits, target = torch.randn(6, 4, dtype=torch.float64), torch.tensor([0, 1, 2, 3, 0, 1])
    values = {
        name: measure(None, (logits, target)) for name, measure in classification(lambda _, batch: batch[0], lambda batch: batch[1]).items()
    }
    margin = [row[t] - max(x for i, x in enumerate(row) if i != t) for row, t in zip(logits.tolist(), target.tolist(), strict=True)]
    assert next(iter(values)) == "target_log_probability"
    torch.testing.assert_close(values["loss"], F.cross_entropy(logits, target, reduction="none"))
    torch.testing.assert_close(values["target_log_probability"], -values["loss"])
    torch.testing.assert_close(values["mean_loss"].sum(), F.cross_entropy(logits, target))
    torch.testing.assert_close(values["log_probabilities"].exp(), logits.softmax(1))
    torch.testing.assert_close(values["margin"], torch.tensor(margin, dtype=torch.float64))
    assert torch.equal(values["logits"], logits)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # torch's own, when it first meets a jvp
def test_measures_through_torch_func(task):
    """Per-query gradients by vmap(grad) in batches of one equal a loop's, and the jvp equals gradient · direction."""
    model, batch = task.model().double().eval(), doubled(queries(task))
    theta = {name: p.detach() for name, p in model.named_parameters()}
    direction = {name: torch.randn_like(p) for name, p in theta.items()}
    for name, measure in task.measures().items():

        def value(theta, query, measure=measure):
            one = [x.unsqueeze(0) for x in query]
            return functional_call(Asked(model, measure), {f"model.{k}": v for k, v in theta.items()}, (one,)).sum()

        gradients = vmap(grad(value), (None, 0))(theta, batch)
        assert all(g.isfinite().all() for g in gradients.values()), name
        rate = torch.stack(
            [jvp(lambda theta, i=i, value=value: value(theta, [x[i] for x in batch]), (theta,), (direction,))[1] for i in range(5)]
        )
        torch.testing.assert_close(sum((gradients[k] * direction[k]).flatten(1).sum(1) for k in theta), rate)


class Asked(torch.nn.Module):
    """A measure as a module, so that functional_call can place the parameters."""

    def __init__(self, model, measure):
        super().__init__()
        self.model, self.measure = model, measure

    def forward(self, batch):
        return self.measure(self.model, batch)


def doubled(batch):
    return [x.double() if x.is_floating_point() else x for x in batch]


def test_digits_are_all_there():
    task = Digits()
    images = torch.cat([task.data(split).tensors[0] for split in ("train", "val")])
    assert images.shape == (1797, 1, 8, 8)
    assert images.dtype == torch.float32
    assert (images.min(), images.max()) == (0, 1)
    assert len(images.unique(dim=0)) == 1797
    assert task.true_labels() == {}


def test_flipped_labels_are_named():
    plain, flipped = Digits(), Digits(flipped=0.1)
    true, before, after = flipped.true_labels(), plain.data("train").tensors[1], flipped.data("train").tensors[1]
    assert len(true) == 120
    assert (before != after).nonzero().squeeze(1).tolist() == list(true)
    assert all(int(before[i]) == label for i, label in true.items())
    assert Digits(flipped=0.1, flip_seed=1).true_labels() != true
    first = next(iter(true))
    assert flipped.describe("train", first) == f"a {true[first]} labelled {int(after[first])}"


def test_missing_scikit_learn(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ConfigError, match=r"pip install explaind-ledger\[digits\]"):
        Digits().data("train")


@pytest.mark.parametrize(
    ("kind", "options", "words"),
    [
        (ModularArithmetic, {"operation": "subtract"}, "unordered with subtract"),
        (ModularArithmetic, {"operation": "divide"}, "add | subtract"),
        (ModularArithmetic, {"heads": 5}, "a divisor of width 64"),
        (ModularArithmetic, {"p": 1}, "at least 2"),
        (ModularArithmetic, {"train_fraction": 0.5, "train_examples": 3}, "give one of them"),
        (ModularArithmetic, {"train_fraction": 1.0}, "6441 train and 0 val"),
        (ModularArithmetic, {"train_examples": 6000, "val_examples": 500}, "at most 6441 together"),
        (ModularArithmetic, {"train_fraction": float("nan")}, "not a share"),
        (Digits, {"network": "vit"}, "mlp | cnn"),
        (Digits, {"hidden": 0}, "at least 1"),
        (Digits, {"train_examples": 1300}, "at most 1797 together"),
        (Digits, {"flipped": float("nan")}, "0 to 1"),
    ],
)
def test_options_that_make_no_sense(kind, options, words):
    with pytest.raises(ConfigError) as caught:
        kind(**options)
    assert words in str(caught.value)


def test_load():
    assert load("modular", {"p": 7, "train_fraction": 0.5}) == ModularArithmetic(p=7, train_fraction=0.5)
    assert load("digits", {"flipped": 0}) == Digits()
    assert load("explaind.tasks.digits:Digits", {"hidden": 8}) == Digits(hidden=8)


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("modul", {}, "expected modular, or package.module:Name; got 'modul'"),
        ("explaind.nowhere:Task", {}, "No module named 'explaind.nowhere'"),
        ("explaind.tasks.digits:Digit", {}, "expected Digits; got 'Digit'"),
        ("explaind.tasks.digits:mlp", {}, "expected a frozen dataclass"),
        ("modular", {"widht": 3}, "expected width; got 'widht'"),
        ("modular", {"width": 3.5}, "(task modular.width); expected int; got 3.5"),
        ("modular", {"width": True}, "expected int; got True"),
        ("modular", {"train_fraction": "half"}, "expected float | None; got 'half'"),
        ("modular", {"activation": "tanh"}, "expected relu | gelu; got 'tanh'"),
        ("digits", {"flipped": True}, "expected float; got True"),
    ],
)
def test_load_errors(name, options, words):
    with pytest.raises(ConfigError) as caught:
        load(name, options)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
