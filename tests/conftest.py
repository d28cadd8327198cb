"""Every test can run on a GPU when there is one: tests take ``device`` where the code depends on it."""

import pytest
import torch

import tests.typed  # noqa: F401 — loaded before jaxtyping's hook asks for it


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"))])
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)
