"""The published implementation's credits, entry by entry (theory.md section 4)."""

from pathlib import Path

import numpy as np
import pytest
import torch

import explaind
from explaind.ledger.ledger import Ledger
from tests import peer


@pytest.fixture(scope="module")
def ledger(tmp_path_factory: pytest.TempPathFactory) -> Ledger:
    path: Path = tmp_path_factory.mktemp("peer") / "run"
    peer.write_run(path)
    queries = torch.from_numpy(peer.FILE["x_query"]), torch.from_numpy(peer.FILE["y_query"])
    return explaind.decompose(
        explaind.open(path),
        peer.network(),
        data=peer.data(),
        losses=peer.losses,
        queries=queries,
        measure=lambda model, batch: model(batch[0]).log_softmax(-1),
        keep=("query", "output", "example", "layer"),
        rule=f"midpoint:{peer.NODES}",
    )


def test_every_credit_equals_the_published_one(ledger: Ledger) -> None:
    names = ledger.coords["layer"].tolist()
    assert len(names) == 15
    data = ledger["data"]  # query, output, example, layer
    batch = peer.SETTINGS["batch"]
    for i, name in enumerate(names):
        # Their kernel leaves out the 1 / batch of the mean loss.
        published = peer.FILE[f"kernel/{peer.theirs(name)}"] / batch
        assert np.abs(data[..., i] - published).max() <= 1e-5, name


def test_its_largest_credit_is_far_above_the_tolerance(ledger: Ledger) -> None:
    assert np.abs(ledger["data"]).max() > 1e-2


def test_final_is_the_published_prediction(ledger: Ledger) -> None:
    assert np.abs(ledger["initial"] - peer.FILE["initial"]).max() <= 1e-5
    assert np.abs(ledger["final"] - peer.FILE["final"]).max() <= 1e-5


def test_the_sum_closes(ledger: Ledger) -> None:
    verdict = ledger.verify()
    assert verdict.ok, verdict.reasons
    assert verdict.maxima["closure"] <= 1e-10
    assert verdict.maxima["unexplained"] <= 1e-2
