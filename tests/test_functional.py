"""The user's model, losses and measure as functions of their parameters: what is wrong with them is told in one line."""

import re
import threading

import pytest
import torch
from torch import nn

import explaind
from explaind.errors import RecordError, ReplayError
from explaind.ledger.verify_run import verify_run
from explaind.replay.functional import Functional, Untransformable
from tests.test_awkward import TOKENS, Packed, Padded, decomposed, losses, recorded


def test_what_cannot_be_transformed_is_told_with_its_module(tmp_path):
    run, _ = recorded(tmp_path / "run", Packed)
    function = Functional(Packed(), lambda model, tokens: model(tokens), torch.device("cpu"), torch.float64)
    parameters = {name: torch.from_numpy(values) for name, values in run.theta(0).items()}
    with pytest.raises(Untransformable, match=r"torch\.func \(Packed.*storage; leave products='auto'.*pad and mask") as caught:
        torch.func.jacrev(lambda p: function(p, TOKENS))(parameters)
    assert "\n" not in str(caught.value)
    with pytest.raises(RuntimeError, match="size"):  # a mistake of the user's own stays what it is
        function({**parameters, "out.bias": torch.zeros(7, dtype=torch.float64)}, TOKENS)


def test_a_model_that_cannot_be_copied_is_one_line(tmp_path):
    run, data = recorded(tmp_path / "run", Padded)
    model = Padded().double()
    model.lock = threading.Lock()
    with pytest.raises(ReplayError, match=r"cannot be copied \(Padded\); got TypeError.*deepcopy"):
        decomposed(run, data, lambda: model)


def test_a_lazy_module_before_its_first_batch_is_refused(tmp_path):
    run, data = recorded(tmp_path / "run", Padded)
    model = nn.Sequential(nn.Flatten(), nn.LazyLinear(2))
    words = r"a lazy module has no parameters yet \(1.weight\); run one batch"
    with pytest.raises(RecordError, match=words):
        explaind.record(torch.optim.SGD(model.parameters(), lr=0.1), model, tmp_path / "lazy")
    with pytest.raises(ReplayError, match=words):
        decomposed(run, data, lambda: model)


LOSSES = {
    "a single number": lambda model, batch: losses(model, batch).mean(),
    r"torch.float64 of shape \(\d, 1\)": lambda model, batch: losses(model, batch)[:, None],
    r"of shape \(\d,\); got torch.float64 of shape \(\d,\)": lambda model, batch: losses(model, batch).repeat(2),
    "a tuple": lambda model, batch: (losses(model, batch),),
    "a float": lambda model, batch: 3.0,
    "a list": lambda model, batch: losses(model, batch).tolist(),
    "torch.int64": lambda model, batch: model(batch[0]).argmax(1),
}


@pytest.mark.parametrize("thin", [None, 2])
@pytest.mark.parametrize("got", LOSSES)
def test_losses_that_are_not_one_number_an_example_are_refused_in_one_line(got, thin, tmp_path):
    run, data = recorded(tmp_path / "run", Padded, thin=thin)
    wrong = LOSSES[got]
    want = rf"losses must return one number an example; expected .*{got}.*reduction='none'"
    for products in ("auto", "jvp"):
        with pytest.raises(ReplayError, match=want) as caught:
            decomposed(run, data, Padded, wrong, products=products)
        assert "\n" not in str(caught.value)
    for found in (
        explaind.doctor(run, Padded().double(), data=data, losses=wrong, queries=TOKENS[:3], measure=lambda m, q: m(q)).refused,
        verify_run(run, Padded().double(), data, wrong).reasons,
    ):
        assert len(found) == 1
        assert re.search(want, found[0])
