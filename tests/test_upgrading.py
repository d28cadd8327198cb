"""A run that an older explaind recorded is refused with what to do, and upgraded to one of today's, bitwise."""

import errno
import itertools
import json
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr
from torch import nn
from torch.utils.data import TensorDataset

import explaind
from explaind.cli import main
from explaind.errors import StoreError
from explaind.ledger.verify_run import verify_run
from explaind.store import schema, upgrading
from explaind.store.repair import repair
from explaind.store.upgrading import Upgraded, upgrade
from tests import cases
from tests.closeness import same

OLD = Path(__file__).parent / "data" / "schema-2.zip"
"""Twenty steps of AdamW with a frozen parameter, recorded by the first explaind that wrote schema 2: it had no gaps, no autocast."""
ADDED = {"gap", "precision"}


@pytest.fixture
def old(tmp_path):
    with zipfile.ZipFile(OLD) as archive:
        archive.extractall(tmp_path / "run")
    return tmp_path / "run"


def arrays(path):
    group = zarr.open_group(path, mode="r", zarr_format=3)
    return {name: array[...] for name, array in group.members(max_depth=None) if isinstance(array, zarr.Array)}


@pytest.mark.filterwarnings("ignore:Object at")  # zarr remarks on any file that is not its own
def test_an_old_run_is_upgraded_and_all_that_was_recorded_stays(old, capsys):
    before = arrays(old)
    with pytest.raises(StoreError, match=f"an older schema version of a run.*expected 3; got 2; explaind upgrade {old}"):
        explaind.open(old)
    assert main(["upgrade", str(old)]) == 0
    assert capsys.readouterr().out == f"run {old}: schema 2 → 3, 20 steps\n"
    after = arrays(old)
    assert after.keys() - before.keys() == ADDED
    for name, values in before.items():
        same(after[name], values, name)
    run = explaind.open(old)
    assert (run.steps, run.complete, run.damage(), run.gaps.any()) == (20, True, [], False)
    assert upgrade(old) == Upgraded(3, 3, 20)


def test_an_upgrade_that_is_interrupted_is_made_again(old, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(schema, "extend", interrupted)
        with pytest.raises(KeyboardInterrupt):
            upgrade(old)
    assert upgrade(old) == Upgraded(2, 3, 20)
    assert explaind.open(old).damage() == []


def test_an_upgraded_run_is_replayed_and_gone_on_with(old):
    upgrade(old)
    x = torch.randn(8, 3, generator=torch.Generator().manual_seed(1))
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    verdict = verify_run(explaind.open(old), model, TensorDataset(x, (x.sum(1) > 0).long()), cases.losses)
    assert verdict.ok, verdict.reasons
    theta = zarr.open_array(old / "theta", mode="r+")
    theta[18, 0] = 7.0
    assert repair(old).after == 17
    assert explaind.open(old).damage() == []


def test_damage_of_an_old_run_is_still_found(old):
    theta = zarr.open_array(old / "theta", mode="r+")
    theta[5, 0] = 7.0
    upgrade(old)
    assert explaind.open(old).damage() == ["theta before step 5 is not what was recorded: 0.weight changed on disk"]


def test_an_upgrade_that_was_interrupted_is_made_again(old, monkeypatch):
    replaced = schema.replace_file
    for left in (0, 1):

        def fail(path, text, left=left):
            if path.name == ("commit.json", "zarr.json")[left]:
                raise schema.unwritable(path, OSError(28, "No space left on device"))
            replaced(path, text)

        with monkeypatch.context() as patch:
            patch.setattr(schema, "replace_file", fail)
            with pytest.raises(StoreError, match="No space left on device"):
                upgrade(old)
        with pytest.raises(StoreError, match="explaind upgrade"):
            explaind.open(old)
    assert upgrade(old) == Upgraded(2, 3, 20)
    assert explaind.open(old).damage() == []


def test_an_upgrade_that_a_full_disk_has_cut_off_is_made_again(old, monkeypatch):
    write = os.write
    for left in range(3):
        calls = itertools.count()

        def half(number, text, calls=calls, left=left):
            if next(calls) < left:
                return write(number, text)
            write(number, bytes(text)[:10])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        with monkeypatch.context() as patch:
            patch.setattr(os, "write", half)
            with pytest.raises(StoreError, match="cannot write: No space left on device"):
                upgrade(old)
    assert upgrade(old) == Upgraded(2, 3, 20)
    assert explaind.open(old).damage() == []


def with_schema(path, version):
    told = json.loads((path / "zarr.json").read_text())
    told["attributes"]["explaind"]["schema"] = version
    (path / "zarr.json").write_text(json.dumps(told))


@pytest.mark.parametrize("version", [1, 4, "3", None])
def test_another_schema_is_refused(version, old, capsys):
    with_schema(old, version)
    assert main(["upgrade", str(old)]) == 2
    assert "unknown schema version of a run" in capsys.readouterr().err


def test_what_is_no_run_in_a_folder_is_refused(old, tmp_path):
    with zipfile.ZipFile(tmp_path / "old.zip", "w") as archive:
        for file in old.rglob("*"):
            archive.write(file, file.relative_to(old))
    with pytest.raises(StoreError, match="in one file is not upgraded"):
        upgrade(tmp_path / "old.zip")
    with pytest.raises(StoreError, match=r"no run was exported to this zip.*packed.*unpack it"):
        upgrade(OLD)
    (old / "commit.json").write_text("{}")
    with pytest.raises(StoreError, match="cannot be upgraded"):
        upgrade(old)
    cases.decomposed(cases.recorded(tmp_path / "new"), save=tmp_path / "ledger")
    with pytest.raises(StoreError, match="only runs are upgraded"):
        upgrade(tmp_path / "ledger")
    with_schema(tmp_path / "ledger", 1)
    with pytest.raises(StoreError, match=r"an older schema version of a ledger.*decompose again"):
        explaind.open_ledger(tmp_path / "ledger")


def test_a_run_that_is_being_recorded_is_not_upgraded(tmp_path):
    model = cases.PLAIN.model()
    recorder = explaind.record(torch.optim.SGD(model.parameters(), lr=0.1), model, tmp_path / "run")
    with pytest.raises(StoreError, match="being recorded"):
        upgrade(tmp_path / "run")
    recorder.close()


def test_there_is_a_step_between_any_two_versions():
    assert sorted(upgrading.STEPS) == list(range(min(upgrading.STEPS), schema.VERSIONS["run"]))
    assert np.all(np.diff(sorted(upgrading.STEPS)) == 1)
