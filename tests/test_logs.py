"""The log of a killed recording is taken up where it goes on from what is committed, and nowhere else."""

import re
import shutil
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr

import explaind
from explaind.cli import main
from explaind.errors import StoreError
from explaind.store import tail, writer
from explaind.store.exporting import export_run, import_run
from explaind.store.logs import following
from explaind.store.repair import Repair, recovered, repair
from explaind.store.tail import Links, Log, Tail
from explaind.store.writer import RunWriter
from tests import cases
from tests.closeness import same
from tests.test_corruption import edit
from tests.test_resumed_recording import Loop

OTHERS = {"again": {"seed": 0}, "batches": {"shift": 1}}
"""How another recording of the same model may differ."""


def left(path, steps, seed=0, shift=0, name="adamw", waiting=None, **options):
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
            if waiting is None:
                recorder._writer._wait()
            shutil.copytree(recorder._writer.path, path)
            if waiting is not None:
                waiting()
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


@pytest.fixture
def far_behind(tmp_path, monkeypatch):
    """A run whose chunks were two spans behind the training."""
    going, write = threading.Event(), RunWriter._write

    def slow(self, span, *words, **options):
        if span.start == 3:
            going.wait()
        write(self, span, *words, **options)

    with monkeypatch.context() as patch:
        patch.setattr(RunWriter, "_write", slow)
        run = left(tmp_path / "run", 8, waiting=going.set)
    assert (run.steps, run.logged, run.damage()) == (2, 6, [])
    return run


@pytest.mark.parametrize("names", [tail.NAMES[:1], tail.NAMES[1:], tail.NAMES], ids=["even", "odd", "both"])
@pytest.mark.parametrize("options", [{}, {"thin": 3}, {"gradients": "store"}], ids=["full", "thin", "gradients"])
@pytest.mark.parametrize("steps", [2, 5, 8])
@pytest.mark.parametrize("differing", OTHERS)
def test_the_log_of_another_namedis_refused_in_words(differing, steps, options, names, copied, tmp_path, capsys):
    run, other = copied(tmp_path / "run", steps, **options), copied(tmp_path / "other", steps, **options, **OTHERS[differing])
    held = run.logged
    assert (run.steps + held, run.damage(), other.damage()) == (steps, [], [])
    replaced = [shutil.copy(other.path / name, run.path / name) for name in names if (other.path / name).exists()]
    if not replaced:
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


@pytest.mark.parametrize("steps", [2, 3, 14])
def test_the_log_of_a_namedthat_is_elsewhere_is_told_too(steps, tmp_path):
    """Nothing in it is a step that is looked for, and those that are looked for are gone."""
    run, other = left(tmp_path / "run", 8), left(tmp_path / "other", steps)
    shutil.copy(other.path / tail.NAMES[0], run.path / tail.NAMES[0])
    assert (run.steps, run.logged) == (5, 1)
    export_run(run.path, tmp_path / "run.zip")
    assert "steps of another run" in run.damage()[0]
    with pytest.raises(StoreError, match="log holds steps of another run"):
        import_run(tmp_path / "run.zip", f"memory://{tmp_path.name}/run")


def test_of_two_records_of_a_step_the_one_that_goes_on_is_taken(tmp_path):
    """The other one was made before the run was gone on with at an earlier step."""
    run = left(tmp_path / "run", 8)
    found = run.logged_behind(run.steps).steps
    named, before, behind = found[0].links
    old = [record._replace(links=Links(named, record.links.before ^ 1, record.links.behind ^ 1)) for record in found]
    for records in ([*old, *found], [*found, *old]):
        own, others, _ = following(records, run.steps, before, named)
        assert [record.links for record in own] == [record.links for record in found]
        assert not others
    assert [following(found, run.steps, link, named).steps for link in (before ^ 1, behind)] == [[], []]
    assert following([*found[:2], *old[2:]], run.steps, before).others


def test_a_log_that_an_older_explaind_wrote_is_taken_up(tmp_path, monkeypatch):
    """Its steps have no links, and its run no name."""
    with monkeypatch.context() as patch:
        patch.setattr(Log, "append", lambda self, record, plain=Log.append: plain(self, record._replace(links=None)))
        run = left(tmp_path / "run", 8)
    edit(run.path / "zarr.json", lambda group: group["attributes"].pop("recording"))
    assert (b"links" in (run.path / tail.NAMES[0]).read_bytes(), repair(run.path).after) == (False, 8)
    want = left(tmp_path / "other", 8)
    repair(want.path)
    same(explaind.open(run.path).states(0, 9), explaind.open(want.path).states(0, 9))


@pytest.mark.parametrize(
    ("options", "at"),
    [({}, -tail.HEAD.size), ({}, 30), ({}, 400), ({"thin": 3}, 400), ({"gradients": "store"}, 400)],
    ids=["head", "line", "array", "thin", "gradients"],
)
def test_a_rotten_step_of_the_log_that_hides_others_is_told(options, at, copied, tmp_path, capsys):
    """The last step alone may be gone without a word, for a kill leaves half of one, too."""
    run, told = copied(tmp_path / "run", 8, **options), 0
    found = {name: (run.path / name).read_bytes() for name in tail.NAMES}
    begins = [(name, place.start()) for name, text in found.items() for place in re.finditer(re.escape(tail.BEGINNING), text)]
    for number, (name, begin) in enumerate(begins):
        damaged = explaind.open(shutil.copytree(run.path, tmp_path / f"{number}"))
        rotten = bytearray(found[name])
        rotten[begin + at] ^= 1
        (damaged.path / name).write_bytes(rotten)
        have, held = {record.step for record in tail.records(damaged.path)}, damaged.steps
        while held in have:
            held += 1
        lost = max(have) + 1 - held
        assert (damaged.steps + damaged.logged, len(damaged.damage())) == (held, lost > 0)
        if lost > 0:
            [words] = damaged.damage()
            assert f"step {held} is damaged in the log" in words
            assert f"behind them, {lost} that cannot be taken up" in words
            assert main(["info", str(damaged.path)]) == 0
            assert words in capsys.readouterr().out
            with pytest.raises(StoreError, match=f"step {held} is damaged in the log"):
                recovered(damaged.path)
            told += 1
        assert repair(damaged.path) == Repair(run.steps, held, held - run.steps, max(0, lost))
        assert explaind.open(damaged.path).damage() == []
    assert told


def test_a_log_whose_first_steps_are_in_the_other_one_which_is_lost_is_told(far_behind):
    run = far_behind
    (run.path / tail.NAMES[1]).unlink()
    [told] = run.damage()
    assert re.search(r"step 2 is damaged in the log.*0 steps and, behind them, 6 that cannot be taken up", told)


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
    assert repair(run.path) == Repair(before=5, after=sound + more, regained=more, lost=8 - sound - more)
    assert explaind.open(run.path).damage() == []


@pytest.mark.parametrize("state", [3, 5])
def test_a_damaged_committed_step_is_not_put_down_to_the_log(state, tmp_path):
    run = left(tmp_path / "run", 8)
    array = zarr.open_array(run.path / "checksum_theta", mode="r+")
    array[state] = np.asarray(array[state]) ^ 1
    assert run.logged == 3
    assert not any("another run" in words for words in explaind.open(run.path).damage())
    assert repair(run.path).after == 8


class AtOnce(ThreadPoolExecutor):
    def submit(self, function, *words):
        done = Future()
        done.set_result(function(*words))
        return done


def test_a_repair_that_is_killed_loses_no_logged_step(far_behind, tmp_path, monkeypatch):
    """At any moment, and not even where the chunks were two spans behind the training."""
    run, copies = far_behind, list[Path]()

    def copied_before(plain):
        def call(*words, **options):
            copies.append(shutil.copytree(run.path, tmp_path / f"copy{len(copies)}"))
            return plain(*words, **options)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(writer, "ThreadPoolExecutor", AtOnce)  # no file is put in its place while it is copied
        patch.setattr(Log, "append", copied_before(Log.append))
        patch.setattr(Tail, "begin", copied_before(Tail.begin))
        patch.setattr(RunWriter, "_mark", copied_before(RunWriter._mark))
        repair(run.path)
    assert len(copies) > 10
    for copy in copies:
        found = explaind.open(copy)
        assert (found.steps + found.logged, found.damage(), repair(copy).after) == (8, [], 8)


@pytest.mark.parametrize("at", [1, 2, 4])
def test_a_thin_recording_that_goes_on_within_a_block_is_sound_at_every_step(at, tmp_path):
    """The block that it goes on with is in the log until it is full, whatever older steps stand in its place."""
    with pytest.MonkeyPatch.context() as patch:
        cases.shorten_blocks(patch)
        Loop(tmp_path / "run").record(6, thin=3)
        loop = Loop(tmp_path / "run").load(at)
        with explaind.record(loop.optimizer, loop.model, loop.path, data=cases.DATA, thin=3, resume=True) as recorder:
            for step in range(at, at + 4):
                recorder._writer._wait()
                shutil.copytree(loop.path, tmp_path / f"killed{step}")
                run = explaind.open(tmp_path / f"killed{step}")
                assert (run.steps + run.logged, run.damage()) == (step, [])
                loop.step(recorder)
