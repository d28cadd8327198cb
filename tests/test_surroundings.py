"""What is set up around the kernel, and put back: how products of float32 round."""

import pytest
import torch

from explaind.replay.surroundings import as_in_training, differentiable, float32_products
from tests import cases


@pytest.fixture
def fast():
    """As somebody has it who trains with TF32."""
    before = float32_products()
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = True
    yield
    torch.set_float32_matmul_precision(before[0])
    torch.backends.cudnn.allow_tf32 = before[1]


@pytest.mark.usefixtures("fast")
@pytest.mark.parametrize(("tf32", "within"), [(False, ("highest", False)), (True, ("high", True))])
def test_products_take_tf32_only_where_that_is_asked_for(tf32, within):
    with differentiable(tf32):
        assert float32_products() == within
        with as_in_training(torch.get_num_threads()):
            assert float32_products() == ("high", True), "a step is lived again as it was made"
        with differentiable():
            assert float32_products() == ("highest", False)
        assert float32_products() == within
    assert float32_products() == ("high", True)


@pytest.mark.usefixtures("fast")
def test_a_decomposition_says_how_its_products_rounded(tmp_path):
    run, seen = cases.recorded(tmp_path / "run"), set()

    def measure(model, queries):
        seen.add(float32_products())
        return cases.measure(model, queries)

    for tf32, within in ((False, ("highest", False)), (True, ("high", True))):
        seen.clear()
        ledger = cases.decomposed(run, measure=measure, tf32=tf32)
        assert ledger.settings["tf32"] is tf32
        assert seen == {within}
    assert float32_products() == ("high", True)
