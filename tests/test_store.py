"""What is recorded comes back bitwise, in files that anyone can read, and a recording that is killed loses only its open block."""

import json
import shutil
import signal
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import xarray
import zarr

import explaind
from explaind.errors import StoreError
from explaind.store import schema
from explaind.store.manifest import Layer, Manifest, Optimized
from explaind.store.row import StepRow
from explaind.store.writer import RunWriter
from tests import cases
from tests.closeness import same

LAYERS = (Layer("a", (2, 3), 0, 6), Layer("b", (), 6, 1, 1), Layer("c", (4,), 7, 4, -1))
OPTIMIZERS = (
    Optimized("NAdam", "torch.optim.NAdam", ({"foreach": True}, {}), ("lr", "eps"), ("mu_product",)),
    Optimized("SGD", "torch.optim.SGD", ({},), ("lr",), ()),
)
RANDOM = 5
"""Bytes of a random state."""
MODES = ((True, False), (False, False))


def manifest(block, dtype):
    return Manifest(
        optimizers=OPTIMIZERS, layers=LAYERS, dtype=dtype, block=block, reduction="mean", model="m", modules=("", "child"), examples=9,
        seed=1, random_bytes=RANDOM, threads=1, device="cpu", versions={"torch": "2"}, config={"a": [1]},
    )  # fmt: skip


def odd_numbers(rng, shape, dtype):
    """Any bit pattern that is a float: signed zeros, denormals, infinities and NaN among them."""
    values = rng.integers(0, 256, (*shape, np.dtype(dtype).itemsize), dtype=np.uint8).view(dtype)[..., 0]
    values.flat[:4] = (-0.0, np.inf, np.nan, np.finfo(dtype).smallest_subnormal)
    return values


def step_row(rng, step, block, dtype):
    slots = int(rng.integers(1, 6))
    part = np.sort(rng.integers(0, 3, slots)).astype(np.int32)
    states = rng.integers(1, 256, (1 + int(part.max())) * RANDOM, dtype=np.uint8) if step % 3 else None
    return StepRow(
        rng.integers(0, 9, slots), part, rng.random(slots), rng.random((3, 2)),
        rng.integers(-1, 9, 3).astype(np.int32), MODES[step % 2], odd_numbers(rng, (11,), dtype),
        odd_numbers(rng, (11,), dtype) if step % block == 0 else None, rng.random((3, 1)),
        rng.random((3, 2)) if step % 2 else None, states,
    )  # fmt: skip


@pytest.mark.parametrize("codec", schema.CHOICES)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("block", [1, 3, 4])
@pytest.mark.parametrize("steps", [0, 1, 3, 4, 8])
def test_every_number_comes_back_bitwise(steps, block, dtype, codec, tmp_path):
    rng = np.random.default_rng(steps + 10 * block)
    theta = odd_numbers(rng, (steps + 1, 11), dtype)
    rows = [step_row(rng, step, block, dtype) for step in range(steps)]
    constants, prints = {"still.x": odd_numbers(rng, (2, 2), dtype)}, rng.integers(0, 2**32, 9, dtype=np.uint32)
    writer = RunWriter(tmp_path / "run", manifest(block, dtype), theta[0], constants, prints, True, True, codec)
    for row, after in zip(rows, theta[1:], strict=True):
        writer.add(row, after)
    writer.close()
    run = explaind.open(tmp_path / "run")
    assert (run.manifest, run.steps, run.complete, run.damage()) == (manifest(block, dtype), steps, True, [])
    same(run.states(0, steps + 1), theta)
    same(run.constants["still.x"], constants["still.x"])
    same(run.fingerprint, prints)
    back = [row for start in range(0, steps, block) for row in run.block(start, min(start + block, steps)).rows]
    for want, got in zip(rows, back, strict=True):
        assert got.mode == want.mode
        for name in (f.name for f in fields(StepRow) if f.name != "mode"):
            assert (getattr(got, name) is None) == (getattr(want, name) is None), name
            if getattr(want, name) is not None:
                same(getattr(got, name), getattr(want, name), name)


def test_a_state_is_read_by_layer_name_and_shape(tmp_path):
    run = cases.recorded(tmp_path / "run")
    model = cases.PLAIN.model()
    for name, p in model.named_parameters():
        same(run.theta(0)[name], p.detach(), name)
    with pytest.raises(explaind.ExplaindError, match=r"no such state.*0 … 7; got 8"):
        run.theta(8)


KILLED = """
import os, signal, sys
import explaind, pytest
from tests import cases
cases.shorten_blocks(pytest.MonkeyPatch())
model = cases.PLAIN.model()
case = cases.optimizer_named("adamw")
optimizer = case.make(cases.trainable(model))
recorder = explaind.record(optimizer, model, sys.argv[1])
cases.train(cases.PLAIN, model, optimizer, case, recorder)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_recording_opens_at_its_last_commit(tmp_path, monkeypatch):
    cases.shorten_blocks(monkeypatch)
    root = Path(__file__).parents[1]
    killed = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "killed")], cwd=root, check=False)
    assert killed.returncode == -signal.SIGKILL
    run, whole = explaind.open(tmp_path / "killed"), cases.recorded(tmp_path / "whole", case=cases.optimizer_named("adamw"))
    # Two blocks of three are full, the second perhaps still on its way to disk. The state that a block leads to opens the next one.
    assert run.steps in (2, 5)
    assert (run.steps + run.logged, run.complete, run.damage()) == (7, False, [])
    same(run.states(0, run.steps + 1), whole.states(0, run.steps + 1))
    ledger = cases.decomposed(run)
    assert ledger.verify().ok
    assert ledger.coords["step"].tolist() == list(range(run.steps))


def edit_json(path, function):
    path.write_text(json.dumps(function(json.loads(path.read_text()))))
    cases.resealed(path.parent)


def of_a_later_schema(path):
    edit_json(path / "zarr.json", lambda meta: {**meta, "attributes": {**meta["attributes"], "explaind": {"kind": "run", "schema": 99}}})


def with_half_a_manifest(path):
    edit_json(path / "zarr.json", lambda meta: {**meta, "attributes": {**meta["attributes"], "manifest": {"modules": [], "layers": []}}})


def without_its_mark(path):
    edit_json(path / "zarr.json", lambda meta: {**meta, "attributes": {}})


def with_half_a_commit(path):
    (path / "commit.json").write_text((path / "commit.json").read_text()[:12])


def with_a_longer_commit(path):
    edit_json(path / "commit.json", lambda commit: {**commit, "steps": commit["steps"] + 1})


BROKEN = (
    (shutil.rmtree, "there is no run here"),
    (of_a_later_schema, "unknown schema version of a run.*expected 3; got 99; update explaind"),
    (with_half_a_manifest, "attributes are damaged.*optimizers"),
    (without_its_mark, "not a run.*explaind did not write"),
    (with_half_a_commit, "commit marker is missing or damaged.*commit.json"),
    (lambda path: (path / "commit.json").unlink(), "commit marker is missing or damaged"),
    (with_a_longer_commit, "rows of theta are missing.*expected 9 for 8 committed steps; got 8"),
    (lambda path: shutil.rmtree(path / "theta"), "an array of the run is missing.*theta"),
    (lambda path: (path / "zarr.json").unlink(), "not a run"),
    (lambda path: (path / "zarr.json").write_text("{"), "not a run"),
)


@pytest.mark.parametrize(("spoil", "message"), BROKEN, ids=[message.split(".*")[0] for _, message in BROKEN])
def test_a_run_that_cannot_be_read_is_refused_in_one_line(spoil, message, tmp_path):
    run = cases.recorded(tmp_path / "run")
    spoil(run.path)
    with pytest.raises(StoreError, match=message) as caught:
        explaind.open(run.path)
    assert "\n" not in str(caught.value)


def test_an_unreadable_chunk_is_one_line(tmp_path):
    run = cases.recorded(tmp_path / "run")
    chunk = next(path for path in (run.path / "theta" / "c").rglob("*") if path.is_file())
    chunk.write_bytes(b"short")
    with pytest.raises(StoreError, match=r"a chunk cannot be read.*theta") as caught:
        explaind.open(run.path).theta(0)
    assert "\n" not in str(caught.value)


def test_a_run_is_not_a_ledger_and_a_ledger_is_not_a_run(tmp_path):
    run = cases.recorded(tmp_path / "run")
    cases.decomposed(run, save=tmp_path / "ledger")
    with pytest.raises(StoreError, match=r"this is not a run.*got ledger"):
        explaind.open(tmp_path / "ledger")
    with pytest.raises(StoreError, match=r"this is not a ledger.*got run"):
        explaind.open_ledger(run.path)
    with pytest.raises(StoreError, match="not a run"):
        explaind.open(__file__)


@pytest.mark.parametrize("kind", ["run", "ledger"])
def test_a_folder_holds_zarr_chunks_and_json_and_no_codec_that_runs_code(kind, tmp_path):
    problem = cases.problem_named("branch unused in some steps")
    cases.decomposed(cases.recorded(tmp_path / "run", problem, data=cases.DATA), problem, save=tmp_path / "ledger")
    files = [path.relative_to(tmp_path / kind) for path in (tmp_path / kind).rglob("*") if path.is_file()]
    chunks = [path for path in files if "c" in path.parts]
    copy = {"metadata.json"} if kind == "run" else set()
    assert {path.name for path in files if path not in chunks} == {"zarr.json", "commit.json"} | copy
    codecs = set()
    for path in files:
        if path.name == "zarr.json":
            codecs |= {codec["name"] for codec in json.loads((tmp_path / kind / path).read_text()).get("codecs", ())}
    assert codecs <= {"bytes", "blosc", "zstd", "vlen-utf8", "explaind.bitdelta"}


def test_xarray_and_plain_zarr_open_a_run_with_named_dims(tmp_path):
    run = cases.recorded(tmp_path / "run", case=cases.optimizer_named("adamw"), data=cases.DATA)
    with pytest.warns(UserWarning, match=r"(commit|metadata).json is not recognized"):  # zarr remarks on any file that is not its own
        dataset = xarray.open_zarr(run.path, consolidated=False)
    assert dict(dataset.sizes) == {
        "state": 8, "param": 26, "step": 7, "slot": 5, "option": 8, "layer": 4, "anchor": 1, "example": 8, "byte": 1, "size": 2,
    }  # fmt: skip
    dims = {"theta": ("state", "param"), "batch": ("step", "slot"), "hyper": ("step", "layer", "option"), "momentum": ("anchor", "param")}
    assert {name: dataset[name].dims for name in dims} == dims
    same(dataset["theta"].values, run.states(0, 8))
    same(zarr.open_group(run.path, mode="r")["theta"][...], run.states(0, 8))
