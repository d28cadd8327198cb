"""Training under autocast: the replay rounds where the training did, credits are exact, and what rounding did is told apart."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import explaind
from explaind.ledger.verify_run import verify_run
from tests import cases
from tests.closeness import algebra
from tests.test_loops import BATCHES


@pytest.fixture(autouse=True)
def short_blocks(monkeypatch):
    cases.shorten_blocks(monkeypatch)


def under_autocast(path, where, dtype=torch.bfloat16, scaled=False, **options):
    """A float32 training whose forward passes are computed in another precision."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(3, 16), nn.ReLU(), nn.Linear(16, 2)).float()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    scaler = torch.amp.GradScaler("cpu", enabled=scaled)
    with explaind.record(optimizer, model, path, **options) as recorder:
        for ids in BATCHES * 4:
            x, y = cases.DATA[torch.tensor(ids)]
            optimizer.zero_grad()
            if where != "around":
                recorder.examples(ids)
            with torch.autocast("cpu", dtype):
                if where == "around":
                    recorder.examples(ids)
                logits = (
                    torch.func.functional_call(model, dict(model.named_parameters()), (x.float(),)) if where == "told" else model(x.float())
                )
                loss = nn.functional.cross_entropy(logits.float(), y)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
    return explaind.open(path)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("where", "scaled"), [("inside", False), ("around", True), ("told", False)])
def test_training_under_autocast_closes_and_its_rounding_is_told_apart(where, scaled, dtype, tmp_path):
    run = under_autocast(tmp_path / "run", where, dtype, scaled, precision=dtype if where == "told" else None)
    assert {row.precision for row in run.block(0, run.steps).rows} == {torch.finfo(dtype).eps}
    blank = nn.Sequential(nn.Linear(3, 16), nn.ReLU(), nn.Linear(16, 2))
    ledger = explaind.decompose(
        run,
        blank,
        data=cases.DATA,
        losses=lambda m, b: cases.losses(m, b),
        queries=cases.QUERIES,
        measure=cases.measure,
    )
    verdict = ledger.verify()
    assert verdict.ok, verdict.reasons
    assert verdict.maxima["closure"] <= 1e-9
    share = verdict.maxima["arithmetic_share"]
    assert torch.finfo(dtype).eps / 100 < share < 32 * torch.finfo(dtype).eps
    # A loss that is another one is still found.
    assert not verify_run(run, blank, cases.DATA, lambda m, b: 2 * cases.losses(m, b)).ok


class Encoder(nn.Module):
    """Tokens [batch, time] -> [batch, 2], by a TransformerEncoderLayer."""

    def __init__(self):
        super().__init__()
        self.embed, self.out = nn.Embedding(9, 8), nn.Linear(8, 2)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True)

    def forward(self, tokens):
        return self.out(self.layer(self.embed(tokens)).mean(1))


def perceptron():
    return nn.Sequential(nn.Linear(6, 16), nn.LayerNorm(16), nn.GELU(), nn.Linear(16, 2))


def normalised():
    return nn.Sequential(nn.Conv1d(1, 4, 3), nn.BatchNorm1d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2))


LABELS = torch.arange(24) % 2
NETWORKS = {
    "mlp": (perceptron, cases.normal(24, 6, seed=8).float()),
    "batch norm": (normalised, cases.normal(24, 1, 6, seed=9).float()),
    "transformer": (Encoder, torch.randint(0, 9, (24, 5), generator=torch.Generator().manual_seed(1))),
}


def trained(path, name, dtype=torch.bfloat16, labels=LABELS):
    """Micro-batches of unequal sizes, clipping, and a GradScaler where the precision wants one."""
    make, inputs = NETWORKS[name]
    torch.manual_seed(1)
    model, data = make(), TensorDataset(inputs, labels)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    scaler = torch.amp.GradScaler("cpu", enabled=dtype == torch.float16)
    with explaind.record(optimizer, model, path) as recorder:
        for step in range(6):
            optimizer.zero_grad()
            for ids in (torch.arange(step, step + 7), torch.arange(step + 9, step + 13)):
                recorder.examples(ids)
                with torch.autocast("cpu", dtype):
                    loss = cases.losses(model, data[ids]).mean()
                scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            scaler.step(optimizer)
            scaler.update()
    return explaind.open(path), make, data


def decomposed(run, make, data, **options):
    asked = {"losses": cases.losses, "queries": data[:2][0], "measure": lambda m, x: m(x), "rule": "secant", **options}
    return explaind.decompose(run, make(), data=data, **asked)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("name", NETWORKS)
def test_the_replay_rounds_where_the_training_did(name, dtype, tmp_path):
    """Its updates are rebuilt to float32's rounding; in exact arithmetic they are some hundredths off, and that is arithmetic."""
    run, make, data = trained(tmp_path / "run", name, dtype)
    assert run.steps == 6
    ledger = decomposed(run, make, data, keep=("query", "output", "example", "layer", "step"))
    found = ledger.verify()
    assert found.replay_error.max() <= 1e-5
    assert found.maxima["closure"] <= 1e-9 * found.maxima["movement"]
    assert found.maxima["arithmetic_share"] > torch.finfo(dtype).eps / 100
    assert not [words for words in found.reasons if "replay" in words]
    whole = decomposed(run, make, data, keep=("query", "output", "layer", "step"))
    for row in ("data", "arithmetic"):
        kept = ledger.sum("example")[row] if row == "data" else ledger[row]
        algebra(kept, whole[row], row, float(np.abs(ledger["data"]).sum()))
    algebra(whole.verify().replay_error, found.replay_error, "replay error")
    assert verify_run(run, make(), data, cases.losses).ok


@pytest.mark.parametrize("name", NETWORKS)
def test_one_wrong_example_is_not_taken_for_rounding(name, tmp_path):
    """One label of eleven, in one step of six: off by less than rounding in a low precision may be where the replay cannot follow it."""
    _, inputs = NETWORKS[name]
    other = LABELS.clone()
    other[17] = 1 - other[17]  # in the last step alone
    run, make, _ = trained(tmp_path / "run", name)
    assert 17 in run.block(5, 6).rows[0].batch
    verdict = verify_run(run, make(), TensorDataset(inputs, other), cases.losses)
    assert not verdict.ok
    assert "step 5" in verdict.reasons[0]


def test_another_precision_than_the_training_s_is_found(tmp_path, monkeypatch):
    """The record says autocast; a replay that rounds elsewhere is off by more than the last number."""
    run, make, data = trained(tmp_path / "run", "mlp")
    monkeypatch.setattr("explaind.replay.functional.autocast_dtype", lambda precision: None)
    assert verify_run(run, make(), data, cases.losses).replay_error.max() > 1e-3
