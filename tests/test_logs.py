"""The log of a killed recording is taken up where it goes on from what is committed, and nowhere else."""

import re
import shutil
from dataclasses import replace

import pytest
import torch

import explaind
from explaind.cli import main
from explaind.errors import StoreError
from explaind.store import tail
from explaind.store.repair import Repair, repair
from explaind.store.tail import Log
from tests import cases
from tests.closeness import same
from tests.test_corruption import edit

OTHERS = {"again": {"seed": 0}, "start": {"seed": 1}, "batches": {"shift": 1}, "optimizer": {"name": "adam"}}
"""How another recording of the same model may differ."""


def left(path, steps, seed=0, shift=0, name="adamw", **options):
    """What a kill leaves of a recording, whose committed steps are those of whole spans."""
    model = cases.PLAIN.model()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    optimizer = cases.optimizer_named(name).make(list(model.parameters()))
    with pytest.MonkeyPatch.context() as patch:
        cases.shorten_blocks(patch)
        with explaind.record(optimizer, model, path.with_name(f"{path.name}.whole"), data=cases.DATA, **options) as recorder:
            for step in range(steps):
                ids = torch.arange(step + shift, step + shift + 2) % 8
                recorder.examples(ids)
                optimizer.zero_grad()
                cases.losses(model, cases.DATA[ids]).mean().backward()
                optimizer.step()
            recorder._writer._wait()
            shutil.copytree(recorder._writer.path, path)
    return explaind.open(path)


@pytest.fixture(scope="module")
def copied(tmp_path_factory):
    """``left``, of which each is made once."""
    folder = tmp_path_factory.mktemp("left")

    def made(path, steps, **options):
        source = folder / re.sub(r"\W+", "-", f"{steps} {options}")
        if not source.exists():
            left(source, steps, **options)
        shutil.copytree(source, path)
        return explaind.open(path)

    return made


def steps_of(log):
    return [record.step for record in tail._sound(log.read_bytes())]


@pytest.mark.parametrize("names", [tail.NAMES[:1], tail.NAMES[1:], tail.NAMES], ids=["even", "odd", "both"])
@pytest.mark.parametrize("options", [{}, {"thin": 3}, {"gradients": "store"}], ids=["full", "thin", "gradients"])
@pytest.mark.parametrize("steps", [2, 5, 8])
@pytest.mark.parametrize("differing", OTHERS)
def test_the_log_of_another_run_is_refused_in_words(differing, steps, options, names, copied, tmp_path, capsys):
    run, other = copied(tmp_path / "run", steps, **options), copied(tmp_path / "other", steps, **options, **OTHERS[differing])
    held = run.logged
    assert (run.steps + held, run.damage(), other.damage()) == (steps, [], [])
    latest = max(filter(lambda name: (run.path / name).exists(), tail.NAMES), key=lambda name: steps_of(run.path / name))
    for name in names:
        if (other.path / name).exists():
            shutil.copy(other.path / name, run.path / name)
    if latest not in names:
        assert (run.logged, run.damage(), repair(run.path).after) == (held, [], steps)
        return
    [told] = run.damage()
    assert re.search(r"log holds steps of another run.*expected each to go on from the one before it; got a step that does not", told)
    assert main(["info", str(run.path)]) == 0
    assert told in capsys.readouterr().out
    with pytest.raises(StoreError, match="log holds steps of another run"):
        repair(run.path)
    for name in tail.NAMES:
        (run.path / name).unlink(missing_ok=True)
    assert (repair(run.path).after, explaind.open(run.path).damage()) == (run.steps, [])


def test_of_two_logs_that_hold_a_step_the_one_that_goes_on_from_the_run_is_taken(tmp_path):
    """The other log may be an older one, with the same step in it."""
    run, other = left(tmp_path / "run", 8), left(tmp_path / "other", 8, shift=1)
    want = [record.theta for record in run.logged_behind(run.steps)]
    assert {run.steps} <= {*steps_of(other.path / tail.NAMES[1])} & {*steps_of(run.path / tail.NAMES[0])}
    shutil.copy(other.path / tail.NAMES[1], run.path / tail.NAMES[1])
    for got, theta in zip(run.logged_behind(run.steps), want, strict=True):
        same(got.theta, theta)


def test_a_log_that_an_older_explaind_wrote_is_taken_up(tmp_path, monkeypatch):
    """Its steps have no links, and its run no name."""
    with monkeypatch.context() as patch:
        patch.setattr(Log, "append", lambda self, record, plain=Log.append: plain(self, replace(record, links=None)))
        run = left(tmp_path / "run", 8)
    edit(run.path / "zarr.json", lambda group: group["attributes"].pop("recording"))
    assert (b"links" in (run.path / tail.NAMES[0]).read_bytes(), repair(run.path).after) == (False, 8)
    want = left(tmp_path / "other", 8)
    repair(want.path)
    same(explaind.open(run.path).states(0, 9), explaind.open(want.path).states(0, 9))


@pytest.mark.parametrize(("chunk", "sound", "more"), [("0", 0, 0), ("1", 3, 5)])
def test_info_counts_the_logged_steps_that_repair_takes_up(chunk, sound, more, tmp_path, capsys):
    """Behind the sound steps; the older log may have some of those that are damaged."""
    run = left(tmp_path / "run", 8)
    next(path for path in (run.path / "hyper" / "c" / chunk).rglob("0") if path.is_file()).write_bytes(b"damaged")
    assert (run.steps, run.logged) == (5, 3)
    assert main(["info", str(run.path)]) == 0
    said = capsys.readouterr().out
    assert f"{sound} steps are sound of the 5 recorded" in said
    assert (f"{more} more steps" in said) == (more > 0)
    assert repair(run.path) == Repair(before=5, after=sound + more, regained=more, lost=max(0, 5 - sound - more))
    assert explaind.open(run.path).damage() == []
