"""The files, arrays and attributes of a run, as anybody may rely on: a change here is a new schema version and a step in upgrading.py.

Unless it is something that a run may do without, as those that were recorded before do.
"""

import json

import numpy as np
import pytest
import torch
from torch import nn

import explaind
from explaind.store import schema
from tests import cases
from tests.closeness import same

SCHEMA = 3
EVERY = {
    "theta": "float64 state param",
    "batch": "int64 step slot",
    "part": "int32 step slot",
    "weight": "float64 step slot",
    "hyper": "float64 step layer option",
    "age": "int32 step layer",
    "mode": "int32 step",
    "gap": "int64 step",
    "precision": "float64 step",
    "consumed": "float64 step layer size",
    "random": "uint8 step byte",
    "checksum_theta": "uint32 state layer",
    "checksum_step": "uint32 step",
    "fingerprint": "uint32 example",
    "constant/0.bias": "float64 0.bias.0",
}
FULL = EVERY | {"momentum": "float64 anchor param", "preconditioner": "float64 step param"}
LISTINGS = {
    "sgd": ({}, "sgd", EVERY | {"momentum": "float64 anchor param"}),
    "adamw": ({}, "adamw", FULL),
    "standard": ({"codec": "standard"}, "adamw", FULL),
    "nadam": ({}, "nadam", FULL | {"scalar": "float64 step layer scalar"}),
    "gradients": ({"gradients": "store"}, "adamw", FULL | {"gradient": "float64 step slot param", "checksum_gradient": "uint32 step"}),
    "filter": ({"gradient_filter": explaind.GrokfastMA(2, 0.5)}, "adamw", FULL | {"filtered": "float64 anchor entry"}),
    "thin": (
        {"thin": 3},
        "adamw",
        EVERY | {"theta": "float64 stored param", "state": "uint32 anchor word", "groups": "uint8 step character"},
    ),
}
SMALL, PLAIN = ["explaind.bitdelta"], ["bytes", "blosc"]
MANIFEST = {
    *("optimizers", "layers", "dtype", "block", "together", "reduction", "model", "modules", "examples", "seed", "random_bytes"),
    *("threads", "device", "versions", "config", "gradient_filter", "filter_seen", "thin", "gradients"),
}


@pytest.mark.parametrize("name", LISTINGS)
def test_a_run_holds_these_files_arrays_and_attributes(name, tmp_path):
    options, optimizer, listing = LISTINGS[name]
    problem = cases.problem_named("frozen parameter")
    run = cases.recorded(tmp_path / "run", problem, cases.optimizer_named(optimizer), data=cases.DATA, **options)
    files = [path.relative_to(run.path) for path in run.path.rglob("*") if path.is_file()]
    described = {str(path.parent): json.loads((run.path / path).read_text()) for path in files if path.name == "zarr.json"}
    group = described.pop(".")
    assert described.pop("constant")["node_type"] == "group"
    found = {key: " ".join([told["data_type"], *told["dimension_names"]]) for key, told in described.items()}
    assert found == listing
    for key, told in described.items():
        small = key in ("theta", "momentum", "preconditioner") and not {"codec", "thin"} & options.keys()
        assert [codec["name"] for codec in told["codecs"]] == (SMALL if small else PLAIN), key
        assert told["chunk_key_encoding"] == {"name": "default", "configuration": {"separator": "/"}}
    others = {str(path) for path in files if path.name != "zarr.json" and "c" not in path.parts}
    assert others == {"commit.json", "metadata.json"}
    assert group["attributes"].keys() == {"explaind", "manifest", "recording"}
    assert group["attributes"]["explaind"] == {"kind": "run", "schema": SCHEMA}
    assert group["attributes"]["manifest"].keys() == MANIFEST
    assert json.loads((run.path / "commit.json").read_text()).keys() == {"steps", "complete", "modes", "checksums", "crc"}


def test_a_ledger_holds_these_arrays_and_attributes(tmp_path):
    cases.decomposed(cases.recorded(tmp_path / "run"), save=tmp_path / "ledger")
    arrays = {str(path.parent.relative_to(tmp_path / "ledger")) for path in (tmp_path / "ledger").rglob("zarr.json")}
    rows = {"initial", "data", "decay", "momentum0", "arithmetic", "path", "final"}
    checks = {f"check/{name}" for name in ("movement", "path", "arithmetic", "by_step", "replay_error", "recipes")}
    assert arrays == {".", "check", *rows, *checks, "query", "output", "example", "layer", "step"}
    attributes = json.loads((tmp_path / "ledger" / "zarr.json").read_text())["attributes"]
    assert attributes.keys() == {"explaind", "settings", "layers", "check_dims", "doubts", "rows"}
    assert attributes["explaind"] == {"kind": "ledger", "schema": schema.VERSIONS["ledger"]}


HALVES = {torch.bfloat16: 16, torch.float16: 16}


@pytest.mark.parametrize("codec", schema.CHOICES)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_every_finite_pattern_of_a_half_parameter_comes_back_from_a_recording(dtype, codec, tmp_path):
    """Zeros of both signs and denormals too; torch refuses what is not finite in a training before it is recorded."""
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    patterns = patterns[patterns.isfinite()]
    model = nn.Module()
    model.weight = nn.Parameter(patterns.clone())
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    seen = [model.weight.detach().clone()]
    with explaind.record(optimizer, model, tmp_path / "run", codec=codec) as recorder:
        for step in range(3):
            recorder.examples([0])
            model.weight.grad = (0.125 * (step + 1) * model.weight.detach().sign()).to(dtype)
            optimizer.step()
            seen.append(model.weight.detach().clone())
    run = explaind.open(tmp_path / "run")
    assert run.damage() == []
    for step, want in enumerate(seen):
        stored = run.theta(step)["weight"]
        same(torch.from_numpy(stored).to(dtype).view(torch.int16).numpy(), want.view(torch.int16).numpy(), f"state {step}")


@pytest.mark.parametrize("codec", sorted(schema.CODECS))
def test_every_pattern_of_bfloat16_as_float32_comes_back_through_every_codec(codec):
    """A bfloat16 is the upper half of a float32: infinities and the payloads of NaN as well."""
    bits = (np.arange(2**16, dtype=np.uint32) << 16).reshape(64, 1024)
    values = bits.view(np.float32)
    array = schema.zarr.create_array(
        schema.zarr.storage.MemoryStore(), shape=values.shape, chunks=(16, 1024), dtype="float32", fill_value=0, **schema.CODECS[codec]
    )
    array[...] = values
    same(array[...].view(np.uint32), bits)
