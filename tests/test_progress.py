"""Fourier analyses of addition mod p, against functions whose frequencies are known."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import explaind
from explaind.analysis import progress as of_progress
from explaind.analysis.clock import clock_or_pizza, distance_irrelevance, gradient_symmetricity, mirror
from explaind.analysis.fourier import amplitudes, by_neuron, gini, power, waves
from explaind.analysis.progress import Square, along, key_frequencies, losses_without_waves, progress
from explaind.errors import RequestError
from explaind.tasks.modular import ModularArithmetic
from tests.closeness import algebra, rounding

P = 7
A, B = np.meshgrid(np.arange(P), np.arange(P), indexing="ij")
TASK = ModularArithmetic(p=P, network="nanda", width=8, heads=2, mlp=12, train_fraction=0.7)
PAPER = ModularArithmetic(p=P, operation="subtract", pairs="ordered", width=8, heads=2, mlp=12, train_fraction=0.7)


def recorded(task, path, steps=3):
    torch.manual_seed(0)
    model = task.model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    data = task.data("train")
    ids = torch.arange(len(data))
    with explaind.record(optimizer, model, path, data=data) as recorder:
        for _ in range(steps):
            recorder.examples(ids)
            optimizer.zero_grad()
            task.losses(model, data[ids]).mean().backward()
            optimizer.step()
    return explaind.open(path), model


@pytest.fixture(scope="module", params=[TASK, PAPER], ids=["nanda, add", "paper, subtract"])
def trained(request, tmp_path_factory):
    return request.param, *recorded(request.param, tmp_path_factory.mktemp("progress") / "run")


def test_waves_and_the_constant_are_an_orthonormal_basis():
    whole = np.concatenate([np.full((1, P), P**-0.5), waves(P).reshape(-1, P)])
    algebra(whole @ whole.T, np.eye(P))
    with pytest.raises(RequestError, match="an odd p"):
        waves(8)


def test_power_is_where_the_wave_is():
    column = 3.0 + 2.0 * np.cos(2 * np.pi * 2 * np.arange(P) / P + 0.3)
    matrix = np.stack([column, -column], axis=1)
    algebra(power(matrix), np.array([0.0, 1.0, 0.0]))
    algebra(np.square(amplitudes(matrix)).sum(), np.square(matrix - matrix.mean(0)).sum())
    assert power(np.ones((P, 2))).tolist() == [0.0] * 3


def test_gini_of_one_of_many_and_of_equals():
    assert gini(np.ones(5)) == pytest.approx(0.0, abs=1e-15)
    assert gini(np.array([0.0, 0.0, 0.0, 7.0])) == pytest.approx(0.75)
    assert gini(np.array([1.0, 3.0])) == pytest.approx(0.25)
    assert gini(np.zeros(3)) == 0.0


def test_a_neuron_has_the_frequency_that_explains_it():
    turn = 2 * np.pi / P
    one = np.cos(turn * 3 * A) * np.sin(turn * 3 * B) + 5.0
    mixed = np.cos(turn * A) + 0.5 * np.sin(turn * 2 * B)  # 1 : 1/4
    frequency, share = by_neuron(np.stack([one, mixed, np.ones((P, P))], axis=-1))
    assert frequency[:2].tolist() == [3, 1]
    algebra(share, np.array([1.0, 0.8, 0.0]))


def test_waves_along_a_direction_are_a_projection_that_leaves_the_other_alone():
    logits = torch.randn(P * P, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    total, other = (torch.from_numpy(((A + sign * B) % P).reshape(-1)) for sign in (1, -1))
    part = along(logits, total, P, [1, 3])
    algebra(along(part, total, P, [1, 3]), part)
    algebra(along(part, other, P, [1, 2, 3]), torch.zeros_like(part), scale=1.0)
    algebra(along(part, total, P, [2]), torch.zeros_like(part), scale=1.0)
    whole = along(logits, total, P, [1, 2, 3]) + logits.mean(0)
    by_sum = torch.stack([logits[total == s].mean(0) for s in range(P)])
    algebra(whole, by_sum[total])


def test_restricted_and_excluded_loss_of_a_network_that_adds_with_two_frequencies(trained):
    task, run, _ = trained
    square = Square(run, task)
    numbers = square.sum if task.operation == "add" else square.difference
    control = square.difference if task.operation == "add" else square.sum
    turn = 2 * torch.pi * (numbers[:, None] - torch.arange(P)).double() / P
    logits = 4 * torch.cos(turn) + 2 * torch.cos(3 * turn)
    full = float(F.cross_entropy(logits, square.answers))
    restricted, excluded = losses_without_waves(logits, square, numbers, [1, 3])
    assert restricted == pytest.approx(full, abs=1e-12)
    assert excluded == pytest.approx(np.log(P), abs=1e-12)
    restricted, excluded = losses_without_waves(logits, square, control, [1, 3])
    assert restricted == pytest.approx(np.log(P), abs=1e-12)
    assert excluded == pytest.approx(
        float(F.cross_entropy(logits[square.masks["train"]], square.answers[square.masks["train"]])), abs=1e-12
    )


def test_the_square_holds_every_example_once_or_in_both_orders(trained):
    task, run, _ = trained
    square = Square(run, task)
    for split, mask in square.masks.items():
        data = task.data(split).tensors
        both = task.pairs == "unordered"
        diagonal = int((data[0][:, 0] == data[0][:, -2]).sum())
        assert int(mask.sum()) == (2 * len(data[0]) - diagonal if both else len(data[0]))
    assert not (square.masks["train"] & square.masks["val"]).any()
    a, b = torch.from_numpy(A.reshape(-1)), torch.from_numpy(B.reshape(-1))
    assert torch.equal(square.answers, (a + b) % P if task.operation == "add" else (a - b) % P)


def test_progress_along_a_run_is_what_the_model_gives(trained):
    task, run, model = trained
    found = progress(run, task, chosen=[1, 2], states=3)
    assert found["step"].tolist() == [0, 2, 3]
    with torch.no_grad():
        logits = {split: model.eval()(task.data(split).tensors[0]) for split in ("train", "val")}
    for split in logits:
        if task.pairs == "ordered":  # where each pair counts once
            want = float(F.cross_entropy(logits[split].double(), task.data(split).tensors[1]))
            assert found[f"{split}_loss"][-1] == pytest.approx(want, abs=1e-6)
    assert found["squared_weights"][-1] == pytest.approx(
        sum(float(t.detach().double().square().sum()) for t in model.parameters()), rel=1e-6
    )
    assert 0 < found["gini_embedding"][-1] < 1
    everything = progress(run, task, chosen=[1, 2, 3], states=2)
    assert (everything["excluded"] != found["excluded"][:2]).all()


def test_key_frequencies_are_those_of_enough_neurons(trained, monkeypatch):
    task, run, _ = trained
    turn = 2 * np.pi / P
    neurons = np.stack(
        [np.cos(turn * 2 * A), np.cos(turn * 2 * (A + B)), np.sin(turn * 3 * B), np.cos(turn * A) + np.cos(turn * 2 * B)], -1
    )
    monkeypatch.setattr(Square, "hidden", lambda self: torch.from_numpy(neurons))
    found = key_frequencies(run, task)
    assert found["neurons"].tolist() == [0.0, 0.5, 0.25]
    assert found["key"].tolist() == [False, True, True]
    assert found["embedding"].sum() == pytest.approx(1.0)
    monkeypatch.setattr(of_progress, "LIVE", 0.3)
    assert key_frequencies(run, task)["key"].tolist() == [False, True, False]


def test_hidden_neurons_are_what_enters_the_second_linear_map(trained):
    task, run, model = trained
    square = Square(run, task)
    square.at(run.steps)
    hidden = square.hidden()
    assert tuple(hidden.shape) == (P, P, 12)
    assert (hidden >= 0).all()  # ReLU
    found = []
    handle = model.linear2.register_forward_pre_hook(lambda module, given: found.append(given[0]))
    first, second = (3, 2) if task.pairs == "unordered" else (2, 3)
    with torch.no_grad():
        model.eval()(task.tokens(torch.tensor([first]), torch.tensor([second])))
    handle.remove()
    rounding(hidden[2, 3], found[0][0].double(), scale=1.0)


class Pizza(nn.Module):
    """A function of E_a + E_b alone."""

    def __init__(self, second):
        super().__init__()
        self.embedding = nn.Embedding(P + 1, 4)
        self.second, self.out = second, nn.Linear(4, P)

    def forward(self, tokens):
        embedded = self.embedding(tokens)
        return self.out(torch.tanh(embedded[:, 0] + self.second * embedded[:, 1]))


@pytest.mark.parametrize(("second", "cosine"), [(1.0, 1.0), (-1.0, -1.0), (0.5, 1.0)])
def test_gradients_are_symmetric_where_the_embeddings_are_added(second, cosine, tmp_path):
    run, _ = recorded(TASK, tmp_path / "run")
    square = Square(run, TASK)
    square.model = Pizza(second)
    assert gradient_symmetricity(square, 50, 0) == pytest.approx(cosine, abs=1e-6)


def test_distance_is_irrelevant_to_a_clock_and_all_that_matters_to_a_pizza():
    generator = np.random.default_rng(0)
    pizza = np.abs(np.cos(np.pi * (A - B) / P))
    assert distance_irrelevance(pizza) == pytest.approx(0.0, abs=1e-12)
    assert 0.8 < distance_irrelevance(generator.normal(size=(P, P))) < 1.0
    by_sum = generator.normal(size=P)[(A + B) % P]
    assert distance_irrelevance(by_sum) == pytest.approx(1.0, abs=1e-12)  # p is odd: every sum comes at every distance
    assert np.isnan(distance_irrelevance(np.ones((P, P))))


def test_distances_of_a_difference_are_sums():
    generator = np.random.default_rng(0)
    pizza = np.abs(np.cos(np.pi * (A + B) / P))  # a and −b are added: their distance is a + b
    clock = generator.normal(size=P)[(A - B) % P]
    assert distance_irrelevance(pizza, sign=-1) == pytest.approx(0.0, abs=1e-12)
    assert distance_irrelevance(clock, sign=-1) == pytest.approx(1.0, abs=1e-12)


class Circle(nn.Module):
    """Subtraction on one circle: E_n = (cos, sin) of 2πn / p and a column that is neither; logits of a clock or of a pizza."""

    def __init__(self, pizza):
        super().__init__()
        turn = 2 * torch.pi * torch.arange(P + 1).double() / P
        self.embedding = nn.Embedding.from_pretrained(torch.stack([turn.cos(), turn.sin(), torch.zeros(P + 1)], 1).double())
        self.pizza = pizza

    def forward(self, tokens):
        a, b = (self.embedding(tokens)[:, at, :2] for at in (0, 1))
        b = b * torch.tensor([1.0, -1.0])  # E_−b
        classes = self.embedding.weight[:P, :2].T
        if self.pizza:  # |cos| of half the distance times the answer
            middle = a + b
            square = torch.stack([middle[:, 0] ** 2 - middle[:, 1] ** 2, 2 * middle[:, 0] * middle[:, 1]], 1)  # the angle twice
            return square / middle.norm(dim=1, keepdim=True) @ classes
        return torch.stack([a[:, 0] * b[:, 0] - a[:, 1] * b[:, 1], a[:, 0] * b[:, 1] + a[:, 1] * b[:, 0]], 1) @ classes


@pytest.mark.parametrize("pizza", [True, False])
def test_a_network_that_subtracts_is_a_pizza_or_a_clock(pizza, tmp_path):
    run, _ = recorded(PAPER, tmp_path / "run")
    square = Square(run, PAPER)
    square.tokens, square.model = square.tokens[:, [0, 2, 1]], Circle(pizza)
    logits = square.logits()
    assert torch.equal(logits.argmax(1), square.answers)
    correct = logits[torch.arange(P * P), square.answers].reshape(P, P).numpy()
    symmetricity = gradient_symmetricity(square, 2000, 0)
    if pizza:
        assert distance_irrelevance(correct, -1) == pytest.approx(0.0, abs=1e-9)
        assert symmetricity == pytest.approx(1.0, abs=1e-9)
    else:
        assert np.ptp(correct) < 1e-12  # of an ideal clock nothing is left to vary
        assert abs(symmetricity) < 0.2


def test_a_difference_of_embeddings_is_symmetric_where_the_answer_is_one(tmp_path):
    run, _ = recorded(PAPER, tmp_path / "run")
    square = Square(run, PAPER)
    square.tokens, square.model = square.tokens[:, [0, 2, 1]], Pizza(-1.0)
    assert gradient_symmetricity(square, 50, 0) == pytest.approx(1.0, abs=1e-6)


def test_the_mirror_takes_a_number_to_its_negative():
    generator = torch.Generator().manual_seed(2)
    turns = 2 * torch.pi * torch.arange(P).double()[:, None] * torch.tensor([1.0, 3.0]) / P
    table = torch.cat([turns.cos(), turns.sin(), torch.ones(P, 1)], 1) @ torch.linalg.qr(torch.randn(5, 5, generator=generator).double())[0]
    found = mirror(table)
    algebra(table @ found, table[-torch.arange(P) % P])
    algebra(found @ found.T, torch.eye(5, dtype=torch.float64))


def test_clock_or_pizza_of_a_run(trained):
    task, run, _ = trained
    found = clock_or_pizza(run, task, triples=20)
    assert found["step"].tolist() == [0, 1, 2, 3]
    assert (found["distance_irrelevance"] > 0).all()
    assert (np.abs(found["gradient_symmetricity"]) <= 1).all()
    last = clock_or_pizza(run, task, steps=[3], triples=20)
    assert [last[name].tolist() for name in last.columns] == [found[name][3:].tolist() for name in found.columns]


def test_other_operations_and_tasks_are_refused(trained):
    _, run, _ = trained
    with pytest.raises(RequestError, match=r"add or subtract; got multiply"):
        progress(run, ModularArithmetic(p=P, operation="multiply", width=8, heads=2, mlp=12))
    with pytest.raises(RequestError, match="an odd p"):
        Square(run, ModularArithmetic(p=8, network="nanda", width=8, heads=2, mlp=12))
