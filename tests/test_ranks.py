"""Several processes that train one model together: one record, the ledger of the plain loop on all their batches."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import explaind
from tests import cases
from tests.closeness import algebra

LOOP = """
import os, sys, torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
import explaind
from tests import cases, test_ranks

rank, (path, kind) = int(os.environ["RANK"]), sys.argv[1:]
dist.init_process_group("gloo", init_method="file://" + path + ".rendezvous", rank=rank, world_size=2)
torch.set_num_threads(1)
network, accumulate, sync = test_ranks.KINDS[kind]
model = DistributedDataParallel(cases.Problem("ranks", network).model())
optimizer = torch.optim.AdamW(model.parameters(), lr=0.03)
try:
    with explaind.record(optimizer, model, path + "/run", data=cases.DATA, overwrite=kind == "again") as recorder:
        for step in range(5):
            optimizer.zero_grad()
            for part in range(accumulate):
                ids = test_ranks.ids_of(step, part, rank)
                torch.manual_seed(1000 * step + 10 * part + rank)
                last = part == accumulate - 1
                with model.no_sync() if not (last or sync) else torch.enable_grad():
                    if not (kind == "silent" and rank == 1 and step == 2):
                        recorder.examples(ids, torch.full((len(ids),), 1 / len(ids) / accumulate, dtype=torch.float64))
                    x, y = cases.DATA[ids]
                    (cases.losses(model, (x, y)).mean() / accumulate).backward()
            if kind == "clipped":
                torch.nn.utils.clip_grad_norm_(model.parameters(), 0.05)
            optimizer.step()
        print(recorder.steps)
except explaind.ExplaindError as error:
    print("refused:", error)
torch.save(model.module.state_dict(), path + f"/rank{rank}.pt")
dist.barrier()  # gloo at times aborts a process that leaves before the others
dist.destroy_process_group()
"""
KINDS = {
    "clipped": (cases.mlp, 1, False),
    "accumulated": (cases.mlp, 2, False),
    "accumulated in step": (cases.mlp, 2, True),
    "dropout": (cases.dropping, 1, False),
    "batch norm": (cases.normalised, 1, False),
    "taken": (cases.mlp, 1, False),
    "silent": (cases.mlp, 1, False),
    "again": (cases.mlp, 1, False),
}


def ids_of(step, part, rank):
    """A process has two or three examples of its own."""
    first = 3 * step + 2 * part + 4 * rank
    return torch.arange(first, first + 3 + (step + rank) % 2) % 8


def ran(tmp_path, kind):
    command = [sys.executable, "-c", LOOP, str(tmp_path), kind]
    root = str(Path(__file__).parents[1])
    both = [
        subprocess.Popen(
            command,
            cwd=root,
            env={**os.environ, "RANK": str(rank), "PYTHONPATH": root},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for rank in range(2)
    ]
    found = [process.communicate(timeout=120) for process in both]
    assert [process.returncode for process in both] == [0, 0], found
    return [out for out, _ in found]


def plain(tmp_path, kind):
    """The gradient of all, in one process."""
    network, accumulate, _ = KINDS[kind]
    model = cases.Problem("ranks", network).model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.03)
    with explaind.record(optimizer, model, tmp_path / "plain", data=cases.DATA) as recorder:
        for step in range(5):
            optimizer.zero_grad()
            for rank in range(2):
                for part in range(accumulate):
                    ids = ids_of(step, part, rank)
                    torch.manual_seed(1000 * step + 10 * part + rank)
                    recorder.examples(ids, torch.full((len(ids),), 1 / len(ids) / accumulate / 2, dtype=torch.float64))
                    x, y = cases.DATA[ids]
                    (cases.losses(model, (x, y)).mean() / accumulate / 2).backward()
            if kind == "clipped":
                torch.nn.utils.clip_grad_norm_(model.parameters(), 0.05)
            optimizer.step()
    return explaind.open(tmp_path / "plain")


@pytest.mark.parametrize("kind", ["clipped", "accumulated", "accumulated in step", "dropout"])
def test_two_processes_have_the_ledger_of_one(kind, tmp_path):
    assert ran(tmp_path, kind) == ["5\n", "5\n"]
    got, want = explaind.open(tmp_path / "run"), plain(tmp_path, kind)
    ends = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2)]
    for name, values in got.theta(got.steps).items():
        np.testing.assert_array_equal(values, ends[0][name].numpy())
        np.testing.assert_array_equal(values, ends[1][name].numpy())
    algebra(got.states(0, 6), want.states(0, 6))
    for mine, other in zip(got.block(0, 5).rows, want.block(0, 5).rows, strict=True):
        np.testing.assert_array_equal(mine.batch, other.batch)
        np.testing.assert_array_equal(mine.part, other.part)
        algebra(mine.weight, other.weight)
    problem = cases.Problem("ranks", KINDS[kind][0])
    ledgers = [cases.decomposed(run, problem) for run in (got, want)]
    verdict = ledgers[0].verify()
    assert verdict.ok, verdict.reasons
    assert verdict.maxima["arithmetic"] <= 1e-10 * verdict.maxima["movement"]
    scale = float(np.abs(ledgers[1]["data"]).max())
    for name in ledgers[1].rows:
        algebra(ledgers[0][name], ledgers[1][name], name, scale)


def test_batch_norm_of_each_process(tmp_path):
    """Each process normalises its own batch, and the running statistics are the first one's."""
    ran(tmp_path, "batch norm")
    ledger = cases.decomposed(explaind.open(tmp_path / "run"), cases.Problem("ranks", cases.normalised))
    verdict = ledger.verify()
    assert verdict.ok, verdict.reasons
    assert np.abs(ledger["buffers"]).max() > 0


def test_a_path_that_is_taken_is_refused_in_every_process(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "file").touch()
    assert all(out.startswith("refused:") and "something here already" in out for out in ran(tmp_path, "taken"))


def test_a_process_that_does_not_say_whose_gradient_it_has_stops_the_recording_in_all(tmp_path):
    assert all("nobody said on whose gradient" in out and "rank 1" in out for out in ran(tmp_path, "silent"))
    assert explaind.open(tmp_path / "run").steps == 2


def test_the_first_process_alone_removes_what_was_there(tmp_path):
    cases.recorded(tmp_path / "run")
    assert ran(tmp_path, "again") == ["5\n", "5\n"]
