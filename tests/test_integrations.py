"""Loops that libraries run, or that run on what libraries wrap: the same record as the plain loop on the same batches."""

import numpy as np
import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, WeightedRandomSampler

import explaind
from tests import cases
from tests.closeness import same

accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed: pip install 'explaind-ledger[integrations]'")


@pytest.fixture(autouse=True)
def short_blocks(monkeypatch):
    cases.shorten_blocks(monkeypatch)


def loaded(**options):
    return DataLoader(explaind.indexed(cases.DATA), generator=torch.Generator().manual_seed(0), **options)


def made():
    model = cases.PLAIN.model()
    return model, torch.optim.AdamW(model.parameters(), lr=0.03)


def check_same(got, want):
    assert got.steps == want.steps > 3
    same(got.states(0, got.steps + 1), want.states(0, want.steps + 1))
    rows = [run.block(0, run.steps).rows for run in (got, want)]
    assert [row.batch.tolist() for row in rows[0]] == [row.batch.tolist() for row in rows[1]]
    assert [layer.name for layer in got.manifest.layers] == [layer.name for layer in want.manifest.layers]
    ledgers = [cases.decomposed(run) for run in (got, want)]
    for name in ledgers[1].rows:
        same(ledgers[0][name], ledgers[1][name], name)
    assert ledgers[0].verify().ok


def plain(path, loader, accumulate=1, epochs=2):
    model, optimizer = made()
    with explaind.record(optimizer, model, path) as recorder:
        for _ in range(epochs):
            for i, (ids, x, y) in enumerate(loader):
                recorder.examples(ids, np.full(len(ids), 1 / len(ids) / accumulate))
                (cases.losses(model, (x, y)).mean() / accumulate).backward()
                if (i + 1) % accumulate == 0:
                    optimizer.step()
                    optimizer.zero_grad()
    return explaind.open(path)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_accelerate(accumulate, tmp_path):
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=accumulate)
    model, optimizer, loader = accelerator.prepare(*made(), loaded(batch_size=2, shuffle=True))
    with explaind.record(optimizer, model, tmp_path / "run") as recorder:
        for _ in range(2):
            for ids, x, y in loader:
                recorder.examples(ids, np.full(len(ids), 1 / len(ids) / accumulate))
                with accelerator.accumulate(model):
                    accelerator.backward(cases.losses(model, (x, y)).mean())
                    optimizer.step()
                    optimizer.zero_grad()
    check_same(explaind.open(tmp_path / "run"), plain(tmp_path / "plain", loaded(batch_size=2, shuffle=True), accumulate))


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")  # of torch's own compiler
@pytest.mark.parametrize("wrap", [torch.compile, torch.nn.DataParallel], ids=["compiled", "parallel"])
def test_what_is_around_a_model_is_looked_through(wrap, tmp_path):
    model, optimizer = made()
    inside, loader = model, loaded(batch_size=3)
    with explaind.record(optimizer, wrap(model), tmp_path / "run") as recorder:
        for _ in range(2):
            for ids, x, y in loader:
                recorder.examples(ids)
                cases.losses(inside, (x, y)).mean().backward()
                optimizer.step()
                optimizer.zero_grad()
    check_same(explaind.open(tmp_path / "run"), plain(tmp_path / "plain", loaded(batch_size=3)))


@pytest.mark.parametrize("workers", [0, 2])
def test_loaders_with_workers_and_samplers_of_ones_own(workers, tmp_path):
    def drawn():
        return WeightedRandomSampler(torch.arange(1.0, 9.0), 8, generator=torch.Generator().manual_seed(3))  # with replacement

    got = plain(tmp_path / "run", loaded(batch_sampler=BatchSampler(drawn(), 3, drop_last=False), num_workers=workers))
    sampler = drawn()
    for row, want in zip(got.block(0, got.steps).rows, [*_batches(list(sampler)), *_batches(list(sampler))], strict=True):
        assert row.batch.tolist() == want
    assert cases.decomposed(got).verify().ok


def _batches(ids):
    return [ids[i : i + 3] for i in range(0, len(ids), 3)]
