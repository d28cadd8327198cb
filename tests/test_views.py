"""What a recorder looks at where it stands: nothing is missed that changes, moves or is too large for a norm."""

import numpy as np
import pytest
import torch
from torch import nn, optim

import explaind
from explaind.errors import RecordError, RuleError
from explaind.record.views import Views
from explaind.rules.rule import Moment
from explaind.store.manifest import Layer
from explaind.store.row import Pieces, between
from explaind.store.schema import Column
from explaind.store.span import filled
from tests.closeness import same

LAYERS = (Layer("a", (2, 3), 0, 6), Layer("b", (4,), 6, 4))


def flat(tensors):
    return torch.cat([t.detach().reshape(-1).float() for t in tensors]).numpy()


def test_views_follow_tensors_that_change_move_or_are_turned_round():
    a, b = torch.arange(6.0).reshape(2, 3), torch.arange(4.0)
    views = Views(LAYERS, torch.float32, torch.device("cpu"))
    seen = views.lasting([a, b], "room")
    assert np.shares_memory(seen.parts[0], a.numpy()), "nothing is copied"
    a += 1
    same(np.asarray(seen), flat([a, b]))
    a.data = a.data.clone() + 1
    same(np.asarray(views.lasting([a, b], "room")), flat([a, b]))
    a.data = a.data.as_strided((2, 3), (1, 2))  # the same place, another order
    same(np.asarray(views.lasting([a, b], "room")), flat([a, b]))
    half = b.to(torch.bfloat16)
    for _ in range(2):
        half += 1
        same(np.asarray(views.lasting([a, half], "room")), flat([a, half]))
    same(np.asarray(views.pieces([None, b], "other")), flat([torch.zeros(6), b]))


@pytest.mark.parametrize("span", [(0, 10), (0, 0), (2, 5), (5, 7), (6, 10), (9, 10)])
def test_part_of_a_vector_in_pieces(span):
    whole = np.arange(10.0)
    same(between(Pieces([whole[:6], whole[6:6], whole[6:]]), *span), whole[slice(*span)])
    same(between(whole, *span), whole[slice(*span)])


def test_vectors_are_filled_up_to_one_width():
    same(filled([np.array([1, 2]), np.array([], np.int64), np.array([3])], 3, -1), np.array([[1, 2, -1], [-1, -1, -1], [3, -1, -1]]))


def test_chunks_have_one_width():
    column = Column("theta", ("state", "param"), "float32", (150_000,))
    assert column.chunks(16) == (16, 50_000)
    assert Column("hyper", ("step", "layer", "option"), "float64", (4, 0)).chunks(16) == (16, 4, 1)


def loop(path, steps, act, size=1.0):
    model = nn.Linear(3, 1)
    optimizer = optim.AdamW(model.parameters(), lr=0.1)
    with explaind.record(optimizer, model, path) as recorder:
        for step in range(steps):
            act(step, model, optimizer)
            recorder.examples([0])
            optimizer.zero_grad()
            (size * model(torch.ones(1, 3))).sum().backward()
            optimizer.step()
    return explaind.open(path), model


def test_a_change_behind_the_back_of_autograd_is_seen(tmp_path):
    def nudged(step, model, optimizer):
        if step == 2:
            model.bias.data.add_(1e-6)  # no version counter tells

    with pytest.raises(RecordError, match=r"changed between two steps.*before step 2: bias"):
        loop(tmp_path / "run", 4, nudged)
    assert explaind.open(tmp_path / "run").steps == 2


def test_parameters_that_move_to_another_place_are_recorded_there(tmp_path):
    def moved(step, model, optimizer):
        model.weight.data = model.weight.data.clone()
        optimizer.load_state_dict(optimizer.state_dict())

    torch.manual_seed(0)
    run, model = loop(tmp_path / "moved", 5, moved)
    torch.manual_seed(0)
    still, _ = loop(tmp_path / "still", 5, lambda *args: None)
    same(run.states(0, 6), still.states(0, 6))
    same(run.states(5, 6)[0], flat([model.weight, model.bias]))
    for mine, other in zip(run.block(0, 5).rows, still.block(0, 5).rows, strict=True):
        same(mine.preconditioner, other.preconditioner)


def test_gradients_too_large_for_a_norm_are_finite(tmp_path):
    run, _ = loop(tmp_path / "run", 2, lambda *args: None, size=1e30)
    assert (run.steps, run.damage()) == (2, [])


def test_a_rule_that_says_it_does_not_read_parameters_gets_none():
    with pytest.raises(RuleError, match="reads_theta = True"):
        _ = Moment(None, torch.zeros(1), {}, {}, {}).theta


def test_options_are_read_anew_where_parameters_change_places_between_groups(tmp_path):
    model = nn.Linear(3, 2)
    optimizer = optim.SGD([{"params": [model.weight], "lr": 0.1}, {"params": [model.bias], "lr": 0.2}])
    with explaind.record(optimizer, model, tmp_path / "run") as recorder:
        for step in range(2):
            if step:
                one, other = optimizer.param_groups
                one["params"], other["params"] = other["params"], one["params"]
            recorder.examples([0, 1])
            optimizer.zero_grad()
            model(torch.ones(2, 3)).mean().backward()
            optimizer.step()
    rows = explaind.open(tmp_path / "run").block(0, 2).rows
    assert [row.hyper[:, 0].tolist() for row in rows] == [[0.1, 0.2], [0.2, 0.1]]


@pytest.mark.parametrize("how", ["closure", "hook", "between"])
def test_a_group_that_is_given_in_the_middle_of_a_step_is_recorded_in_it(how, tmp_path):
    """Within a closure, by another hook of the optimizer, and between the steps of two optimizers."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))
    first = optim.SGD(model[0].parameters(), lr=0.1)
    second = optim.SGD([model[1].weight], lr=0.2)
    grown, given = (first, [*model[1].parameters()]) if how != "between" else (second, [model[1].bias])
    optimizers = [first] if how != "between" else [second, first]
    with explaind.record(optimizers, model, tmp_path / "run", watch=["1.*"]) as recorder:
        for step in range(4):
            recorder.examples([0, 1])

            def gradient():
                model.zero_grad()
                loss = (model(torch.ones(2, 3)) - 1).square().mean()
                loss.backward()
                return loss

            def more(*args, step=step):
                if step == 2 and len(grown.param_groups) == 1:
                    grown.add_param_group({"params": given, "lr": 0.05})

            if how == "closure":
                first.step(lambda: (more(), gradient())[1])
                continue
            gradient()
            hook = first.register_step_pre_hook(more) if how == "hook" else None
            first.step()
            if hook is None:
                more()
                second.step()
            else:
                hook.remove()
    run = explaind.open(tmp_path / "run")
    assert run.damage() == []
    rows, place = run.block(0, 4).rows, [layer.name for layer in run.manifest.layers].index("1.bias")
    assert [row.age[place] for row in rows] == [-1, -1, 0, 0]
    assert [row.hyper[place, 0] for row in rows[2:]] == [0.05, 0.05]
