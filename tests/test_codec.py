"""A run with either codec holds the same; with the small one it takes much less room."""

from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import torch

import explaind
from explaind.cli import main
from explaind.config import Train, read
from explaind.errors import ConfigError, RecordError, StoreError
from explaind.store import schema
from tests import cases
from tests.closeness import same

ROOT = Path(__file__).parents[1]
SMALL, PLAIN = ["BitDelta"], ["BytesCodec", "BloscCodec"]


def codecs_of(run):
    """Of its growing arrays, by name."""
    found = {name: array.metadata.codecs for name, array in schema.growing(run.path).items()}
    return {name: [type(codec).__name__ for codec in codecs] for name, codecs in found.items()}


@pytest.mark.parametrize("name", ["adamw", "sgd momentum", "adadelta"])
def test_a_run_holds_the_same_with_either_codec(name, tmp_path):
    """Its identity, a hash of all that was recorded, included."""

    def recorded(codec):
        torch.manual_seed(0)  # which a run keeps
        return cases.recorded(tmp_path / codec, case=cases.optimizer_named(name), codec=codec)

    small, plain = recorded("bitdelta"), recorded("standard")
    assert small.identity == plain.identity
    assert (small.damage(), plain.damage()) == ([], [])
    for array in codecs_of(small):
        same(small._read(array, slice(None)), plain._read(array, slice(None)), array)
    theirs = {name for name, codecs in codecs_of(small).items() if codecs == SMALL}
    assert theirs == {"theta", "momentum", "preconditioner"} & codecs_of(small).keys()
    assert all(codecs == PLAIN for codecs in codecs_of(plain).values())


def real_run(path, codec, steps=48):
    """A few hundred parameters would measure zarr's overhead: 9,000, in mini-batches, as in a real training."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 120), torch.nn.GELU(), torch.nn.Linear(120, 10))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    x, y = torch.randn(300, 64), torch.randint(0, 10, (300,))
    with explaind.record(optimizer, model, path, codec=codec) as recorder:
        for _ in range(steps):
            ids = torch.randperm(300)[:50]
            recorder.examples(ids)
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(x[ids]), y[ids]).backward()
            optimizer.step()
    return explaind.open(path)


def bytes_per_number(run, name):
    values = run._read(name, slice(None))
    return sum(file.stat().st_size for file in (run.path / name / "c").rglob("*") if file.is_file()) / values.size


def test_a_real_training_takes_much_less_room(tmp_path):
    small, plain = (real_run(tmp_path / codec, codec) for codec in ("bitdelta", "standard"))
    same(small.states(0, 49), plain.states(0, 49))
    for name, most, share in (("theta", 2.5, 0.75), ("preconditioner", 3.1, 0.95)):
        assert bytes_per_number(small, name) < most, name
        assert bytes_per_number(small, name) < share * bytes_per_number(plain, name), name


def test_bfloat16_parameters_come_back(tmp_path):
    model = cases.mlp().to(torch.bfloat16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    seen = []
    with explaind.record(optimizer, model, tmp_path / "run") as recorder:
        for _ in range(5):
            seen.append([p.detach().clone() for p in model.parameters()])
            recorder.examples([0])
            optimizer.zero_grad()
            model(torch.ones(2, 3, dtype=torch.bfloat16)).float().square().sum().backward()
            optimizer.step()
    run = explaind.open(tmp_path / "run")
    for step, want in enumerate(seen):
        for got, p in zip(run.theta(step).values(), want, strict=True):
            same(torch.from_numpy(got).to(torch.bfloat16).view(torch.int16).numpy(), p.view(torch.int16).numpy())


def test_a_damaged_chunk_of_a_run_is_named(tmp_path):
    run = cases.recorded(tmp_path / "run", case=cases.optimizer_named("adamw"))
    chunk = next(file for file in (run.path / "theta" / "c").rglob("*") if file.is_file())
    text = bytearray(chunk.read_bytes())
    text[len(text) // 2] ^= 1
    chunk.write_bytes(text)
    with pytest.raises(StoreError, match=r"a chunk cannot be read.*theta.*damaged or cut off"):
        explaind.open(run.path).states(0, 2)


@pytest.mark.parametrize(("first", "then"), [("standard", "bitdelta"), ("bitdelta", "standard")])
def test_a_run_that_is_gone_on_with_keeps_its_codec(first, then, tmp_path, monkeypatch):
    cases.shorten_blocks(monkeypatch)
    problem, case = cases.PLAIN, cases.optimizer_named("adamw")
    model = problem.model()
    optimizer = case.make(cases.trainable(model))
    for codec, resume in ((first, False), (then, True)):
        with explaind.record(optimizer, model, tmp_path / "run", codec=codec, resume=resume) as recorder:
            cases.train(problem, model, optimizer, case, recorder)
    run = explaind.open(tmp_path / "run")
    assert (run.steps, run.damage()) == (2 * len(problem.steps), [])
    assert codecs_of(run)["theta"] == (SMALL if first == "bitdelta" else PLAIN)


def test_an_unknown_codec_is_refused_before_anything_is_removed(tmp_path):
    run = cases.recorded(tmp_path / "run")
    model = cases.PLAIN.model()
    with pytest.raises(RecordError, match=r"unknown codec.*'bitdelta' or 'standard'.*got 'zip'"):
        explaind.record(torch.optim.SGD(model.parameters()), model, run.path, codec="zip", overwrite=True)
    assert explaind.open(run.path).damage() == []


def test_a_configuration_names_the_codec(tmp_path):
    assert get_args(get_type_hints(Train)["codec"]) == schema.CHOICES
    main(["record", str(ROOT / "tests" / "small.toml"), "--out", str(tmp_path / "run"), "--train.codec", "standard"])
    assert codecs_of(explaind.open(tmp_path / "run"))["theta"] == PLAIN
    with pytest.raises(ConfigError, match=r"codec.*bitdelta \| standard"):
        read(ROOT / "tests" / "small.toml", ["--train.codec", "zip"])
