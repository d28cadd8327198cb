"""A thin run holds the states of the training every so many steps; what is between is lived again, and is what it was."""

import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray
import zarr
from torch import nn
from torch.nn import functional as F

import explaind
from explaind.cli import main
from explaind.config import read
from explaind.errors import ConfigError, RecordError, ReplayError, RequestError
from explaind.ledger.verify_run import verify_run
from explaind.record.living import groups_of, packed_groups, packed_state, put_state
from explaind.record.thinning import spacing
from explaind.replay import reliving
from explaind.replay.account import Account
from explaind.replay.reliving import Reliving
from explaind.replay.surroundings import as_in_training
from explaind.replay.thin import trajectory
from explaind.store.exporting import export_run, import_run
from explaind.store.repair import Repair, repair
from explaind.tasks import load
from explaind.tasks.training import train
from tests import cases
from tests.closeness import algebra, rounding, same
from tests.test_experiments import loaded
from tests.test_resumed_recording import LENGTH, Loop

ROOT = Path(__file__).parents[1]
EVERY = 3
LIVED = tuple(p for p in (*cases.PROBLEMS, *cases.WHOLE) if p.name != "sum loss" and "batch norm" not in p.name)


def pair(path, problem=cases.PLAIN, case=cases.OPTIMIZERS[1], **options):
    """The same training, recorded in full and thinly."""
    return [cases.recorded(path / name, problem, case, **options, **extra) for name, extra in (("full", {}), ("thin", {"thin": EVERY}))]


def lived(run, problem=cases.PLAIN, losses=cases.losses):
    """All blocks of a thin run, lived again, and the account of it."""
    again = Reliving(run, cases.blank(problem), losses, cases.DATA, None)
    return [again.block(run.block(s, min(s + run.manifest.block, run.steps))) for s in run.starts], again.account


def scaled(problem):
    """Whether gradients were multiplied by a number that is recorded to rounding alone: in float64 that is not all of it."""
    return problem.touch is not None and "by value" not in problem.name


def check_lived(full, thin, problem=cases.PLAIN):
    blocks, account = lived(thin, problem)
    if scaled(problem):
        assert account.worst < 1e-14
        return
    assert account.bitwise
    for block in blocks:
        want = full.block(block.start, block.start + len(block.rows))
        same(block.theta, want.theta)
        for mine, theirs in zip(block.rows, want.rows, strict=True):
            for name in ("batch", "part", "weight", "hyper", "age", "scalars", "consumed", "random", "preconditioner"):
                if getattr(theirs, name) is not None:
                    same(getattr(mine, name), getattr(theirs, name), name)
            assert mine.mode == theirs.mode


def check_ledgers(full, thin, problem=cases.PLAIN):
    one, two = (cases.decomposed(run, problem) for run in (full, thin))
    scale = float(np.abs(one["data"]).max())
    for row in one.rows:
        rounding(two[row], one[row], row, scale)
    assert two.verify().ok == one.verify().ok
    assert scaled(problem) or f"all {thin.steps} steps were lived again bitwise" in two.settings["relived"]


@cases.every_optimizer
def test_every_optimizer_makes_its_steps_again_bitwise(case, tmp_path):
    full, thin = pair(tmp_path, case=case)
    assert thin.damage() == []
    check_lived(full, thin)


@pytest.mark.parametrize("optimizer", ["sgd momentum", "adamw"])
@pytest.mark.parametrize("problem", LIVED, ids=str)
def test_a_thin_run_has_the_ledger_of_the_full_one(problem, optimizer, tmp_path):
    full, thin = pair(tmp_path, problem, cases.optimizer_named(optimizer))
    check_lived(full, thin, problem)
    check_ledgers(full, thin, problem)


def test_a_training_that_began_before_the_recording_goes_on_from_what_it_had(tmp_path):
    full, thin = pair(tmp_path, case=cases.optimizer_named("adamw one-cycle"), warm=True)
    check_lived(full, thin)
    check_ledgers(full, thin)


def by_norm(params):
    nn.utils.clip_grad_norm_(params, 0.3)


def by_norm_and_value(params):
    by_norm(params)
    nn.utils.clip_grad_value_(params, 0.04)


def by_value_and_norm(params):
    nn.utils.clip_grad_value_(params, 0.04)
    by_norm(params)


@pytest.mark.parametrize("clip", [by_norm, by_norm_and_value, by_value_and_norm])
def test_float32_with_schedule_clipping_and_dropout_is_bitwise(clip, tmp_path):
    """A larger batch than the sums of the small cases, in the dtype of most trainings."""
    data = torch.utils.data.TensorDataset(torch.randn(48, 6, generator=torch.Generator().manual_seed(1)), torch.arange(48) % 3)

    def recorded(name, **options):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Dropout(0.2), nn.Linear(32, 3))
        optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)
        with explaind.record(optimizer, model, tmp_path / name, data=data, **options) as recorder:
            for step in range(20):
                ids = (torch.arange(16) * 3 + step) % 48
                recorder.examples(ids)
                optimizer.zero_grad()
                F.cross_entropy(model(data[ids][0]), data[ids][1]).backward()
                clip(list(model.parameters()))
                optimizer.step()
                schedule.step()
        return explaind.open(tmp_path / name), model

    (full, _), (thin, model) = recorded("full"), recorded("thin", thin="sqrt:20")
    steps = trajectory(thin, model, cases.losses, data, None, torch.device("cpu"), torch.float32)
    same(torch.cat(list(steps.states())), torch.from_numpy(full.states(0, 21)))
    assert steps.account.bitwise
    assert thin.manifest.block == 5


def test_only_some_states_are_on_disk(tmp_path):
    full, thin = pair(tmp_path)
    assert thin.stored(0, 8) == {0: 0, 3: 1, 6: 2, 7: 3}
    assert not {"momentum", "preconditioner"} & {p.name for p in thin.path.iterdir()}
    for state in (0, 3, 6, 7):
        same(thin.states(state, state + 1), full.states(state, state + 1))
    with pytest.raises(RequestError, match=r"does not store.*a multiple of 3, or the last state, 7; got 4"):
        thin.theta(4)
    assert (thin.some_states(3), full.some_states(3)) == ([0, 6, 7], [0, 4, 7])


def other_arithmetic(model, batch):
    """The losses, with more precision than the training had."""
    return cases.losses(model, batch) * (1 + 1e-13)


def test_arithmetic_that_differs_is_told_and_ends_at_the_next_stored_state(tmp_path):
    full, thin = pair(tmp_path, case=cases.optimizer_named("adamw"))
    blocks, account = lived(thin, losses=other_arithmetic)
    assert not account.bitwise
    assert 0 < account.worst < 1e-9
    for block in blocks:
        same(block.theta[[0, -1]], full.states(block.start, block.start + len(block.theta))[[0, -1]])
    ledger = cases.decomposed(thin, losses=other_arithmetic)
    assert ledger.verify().ok, ledger.verify().reasons
    assert "were not lived again bitwise" in ledger.settings["relived"]
    verdict = verify_run(thin, cases.blank(cases.PLAIN), cases.DATA, other_arithmetic)
    assert verdict.ok
    assert verdict.notes == (ledger.settings["relived"],)


@pytest.fixture
def missed(monkeypatch):
    """What each stored state is more than the one that was lived, by the step that leads to it: [param], in float64."""
    found, take = dict[int, np.ndarray](), Account.take

    def watched(self, start, exact, before, lived, stored):
        found[start + len(exact) - 1] = stored.astype(np.float64) - lived
        take(self, start, exact, before, lived, stored)

    monkeypatch.setattr(Account, "take", watched)
    return found


def test_arithmetic_is_what_the_stored_states_were_missed_by(tmp_path, missed):
    """What is asked is linear in the parameters: what is missed at the last step, which none follows, changes it by itself alone."""
    problem = cases.Problem("linear", lambda: nn.Linear(3, 2))
    full, thin = pair(tmp_path, problem, cases.optimizer_named("sgd momentum"))

    def arithmetic(run, losses):
        asked = {"keep": ("query", "output", "layer", "step"), "measure": lambda model, queries: model(queries)}
        return cases.decomposed(run, problem, losses=losses, **asked)["arithmetic"]

    want, got = arithmetic(full, cases.losses), arithmetic(thin, lambda model, batch: cases.losses(model, batch) * (1 + 1e-6))
    assert sorted(missed) == (ends := [2, 5, 6])
    weight, bias = np.split(missed[6], [6])
    algebra(got[..., 0, 6], cases.QUERIES.numpy() @ weight.reshape(2, 3).T, scale=1.0)  # of the parameters, which are subtracted
    algebra(got[..., 1, 6], np.broadcast_to(bias, got[..., 1, 6].shape), scale=1.0)
    sizes = np.abs(got).sum((0, 1, 2))
    assert (sizes[ends] > 1e-8).all()
    assert np.delete(sizes, ends).max() < 1e-13
    assert np.abs(want).max() < 1e-13


class Summing(nn.Module):
    """Its gradient is a sum of so many products that torch shares it among threads."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x):
        return (x * self.scale).sum(1)


def test_a_float32_run_that_is_lived_with_other_threads_or_on_another_device_says_what_it_cost(device, tmp_path, missed, monkeypatch):
    """The numbers of each example nearly cancel, so that their order matters. Lived as it was recorded, the run is bitwise."""
    x = 100 * torch.randn(8, 1 << 13, generator=torch.Generator().manual_seed(1))
    data = torch.utils.data.TensorDataset(x - x.mean(1, keepdim=True) + 1e-3, torch.arange(8.0))

    def losses(model, batch):
        return (model(batch[0]) - batch[1]).square()

    def ledger():
        asked = {"data": data, "losses": losses, "queries": data[:3][0], "measure": lambda model, x: model(x)}
        return explaind.decompose(run, Summing(), keep=("query", "step"), rule="gauss:2", **asked)

    model, threads = Summing().to(device), torch.get_num_threads()
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    torch.set_num_threads(3)
    try:
        with explaind.record(optimizer, model, tmp_path / "run", data=data, thin=4) as recorder:
            for step in range(8):
                ids = (torch.arange(6) + step) % 8
                recorder.examples(ids)
                optimizer.zero_grad()
                losses(model, [part.to(device) for part in data[ids]]).mean().backward()
                optimizer.step()
    finally:
        torch.set_num_threads(threads)
    run = explaind.open(tmp_path / "run")
    assert run.manifest.threads == 3
    assert "all 8 steps were lived again bitwise" in ledger().settings["relived"]
    monkeypatch.setattr(reliving, "as_in_training", lambda threads: as_in_training(1))
    monkeypatch.setattr(reliving, "_there", lambda device: torch.device("cpu"))
    missed.clear()
    other = ledger()
    assert "were not lived again bitwise (other threads, device or order of sums)" in other.settings["relived"]
    assert other.verify().ok, other.verify().reasons
    assert sorted(missed) == [3, 7]
    assert max(map(abs, missed.values())) > 1e-6
    before, after = Reliving(run, Summing(), losses, data, None).block(run.block(4, 8)).theta[-2:].astype(np.float64)
    sums, targets = (values.double().numpy() for values in (data[ids][0].double().sum(1), data[ids][1]))
    gradient = (2 * (before * sums - targets) * sums).mean()
    algebra(other["arithmetic"][:, 7], data[:3][0].double().sum(1).numpy() * (after - before + 1e-3 * gradient), scale=1.0)


def test_another_loss_than_in_training_is_found(tmp_path):
    thin = cases.recorded(tmp_path / "run", case=cases.optimizer_named("sgd momentum"), thin=EVERY)

    def smoothed(model, batch):
        return F.cross_entropy(model(batch[0]), batch[1], reduction="none", label_smoothing=0.1)

    for verdict in (verify_run(thin, cases.blank(cases.PLAIN), cases.DATA, smoothed), cases.decomposed(thin, losses=smoothed).verify()):
        assert not verdict.ok
        assert any("lead elsewhere than in training" in reason for reason in verdict.reasons)


def test_gradients_that_were_changed_in_a_way_that_no_size_tells_are_found(tmp_path):
    problem = cases.Problem("turned", touch=lambda model: model[0].weight.grad.copy_(-model[0].weight.grad))
    thin = cases.recorded(tmp_path / "run", problem, thin=EVERY)
    verdict = verify_run(thin, cases.blank(problem), cases.DATA, cases.losses)
    assert any("lead elsewhere than in training" in reason for reason in verdict.reasons)


@pytest.mark.parametrize(("array", "words"), [("theta", "theta before step 3"), ("state", "the record of step 3"),
                                              ("checksum_theta", "step"), ("groups", "the record of step 3")])  # fmt: skip
def test_damage_in_what_is_stored_is_found(array, words, tmp_path):
    run = cases.recorded(tmp_path / "run", case=cases.optimizer_named("adamw"), thin=EVERY)
    column = zarr.open_group(run.path, mode="r+")[array]
    row = 1 if array in ("theta", "state") else 3 if array == "groups" else 4
    values = column[row]
    values[-1 if array == "theta" else 0 if array == "checksum_theta" else 20] += 1
    column[row] = values
    assert any(words in reason for reason in run.damage())
    if array in ("theta", "state"):
        assert repair(run.path) == Repair(7, 3 if array == "state" else 0, 0, 4 if array == "state" else 7)
        assert explaind.open(run.path).damage() == []


def test_a_state_that_makes_no_sense_is_refused_in_one_line():
    p = nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.Adam([p])
    words = packed_state(optimizer, [p])
    for broken in (words[:1], np.array([3, 9, 7], np.uint32), np.full(9, 1 << 30, np.uint32)):
        with pytest.raises(ReplayError, match="a stored state of the optimizer cannot be read"):
            put_state(broken, optimizer, [p])
    with pytest.raises(ReplayError, match="stored parameter groups cannot be read"):
        groups_of(packed_groups(optimizer, [p])[:-4], [p])


def test_states_and_groups_come_back_bitwise():
    params = [nn.Parameter(torch.ones(2, 3, dtype=torch.bfloat16)), nn.Parameter(torch.ones(()))]
    optimizer = torch.optim.AdamW(
        [{"params": params[:1], "lr": torch.tensor(0.1)}, {"params": params[1:], "betas": (0.1, 1 / 3)}], amsgrad=True
    )
    sum((p.float() ** 2).sum() for p in params).backward()
    optimizer.step()
    optimizer.state[params[1]]["odd"] = None
    other = torch.optim.AdamW(params, amsgrad=True)
    put_state(packed_state(optimizer, params), other, params)
    for p in params:
        for key, value in optimizer.state[p].items():
            if value is None:
                assert other.state[p][key] is None
                continue
            assert other.state[p][key].dtype == value.dtype
            assert torch.equal(other.state[p][key], value)
    assert groups_of(packed_groups(optimizer, params), params)[1] == optimizer.param_groups[1]
    assert groups_of(packed_groups(optimizer, params), params)[0]["lr"].dtype == torch.float32


KILLED = """
import os, signal, sys
import explaind
from tests import cases
from tests.test_resumed_recording import Loop
from pathlib import Path
loop = Loop(Path(sys.argv[1]))
with explaind.record(loop.optimizer, loop.model, loop.path, data=cases.DATA, thin=int(sys.argv[3])) as recorder:
    while recorder.steps < int(sys.argv[2]):
        loop.step(recorder)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def killed(path, steps, every):
    done = subprocess.run([sys.executable, "-c", KILLED, str(path), str(steps), str(every)], cwd=ROOT, check=False)
    assert done.returncode == -signal.SIGKILL
    return explaind.open(path)


@pytest.mark.parametrize(("steps", "every"), [(2, 4), (4, 4), (7, 4), (27, 20)])
def test_a_thin_recording_that_was_killed_opens_and_goes_on(steps, every, tmp_path):
    run = killed(tmp_path / "run", steps, every)
    assert (run.steps + run.logged, run.steps % every, run.complete, run.damage()) == (steps, 0, False, [])
    assert run.steps >= steps - steps % every - every, "no block but the last may still have been on its way"
    if run.steps:
        assert cases.decomposed(run, cases.Problem("loop")).verify().ok
    assert repair(run.path).after == steps
    whole = Loop(tmp_path / "whole").record(steps)
    check_lived(whole, explaind.open(run.path))
    loop = Loop(tmp_path / "run").load(steps)
    loop.record(steps + 3, resume=True, thin=every)
    check_lived(Loop(tmp_path / "longer").record(steps + 3), explaind.open(run.path))


@pytest.mark.parametrize("at", [1, 4, 6, 8, 11])
def test_a_thin_recording_goes_on_where_a_checkpoint_is(at, tmp_path):
    """The checkpoint is older than the record, or just as old."""
    want = Loop(tmp_path / "whole").record(LENGTH, thin=4)
    Loop(tmp_path / "run").record(max(at, 9), thin=4)
    got = Loop(tmp_path / "run").load(at).record(LENGTH, resume=True, thin=4)
    assert (got.steps, got.complete, got.damage(), got.identity) == (LENGTH, True, [], want.identity)
    check_lived(Loop(tmp_path / "full").record(LENGTH), got)


def test_a_log_keeps_few_parameters(tmp_path):
    """What a long block takes on disk while it is recorded does not grow with its parameters."""
    loop = Loop(tmp_path / "run")
    with explaind.record(loop.optimizer, loop.model, loop.path, thin=100) as recorder:
        sizes = []
        while recorder.steps < 33:
            loop.step(recorder)
            sizes.append((loop.path / "tail.log").stat().st_size)
    assert sizes[15] < sizes[14]
    assert sizes[31] < sizes[30]


def test_another_spacing_is_another_recording(tmp_path):
    Loop(tmp_path / "run").record(5, thin=4)
    with pytest.raises(RecordError, match=r"another training.*thin"):
        Loop(tmp_path / "run").load(5).record(LENGTH, resume=True)


def refused(path, network=cases.mlp, **options):
    model = cases.Problem("refused", network).model()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    return model, optimizer, explaind.record(optimizer, model, path, thin=4, **options)


REFUSED = (
    ({"network": cases.normalised}, "cannot live buffers that move again"),
    ({"steps": [(0, 4)]}, r"cannot live windows of steps \(steps=\) again"),
    ({"gradient_filter": explaind.GrokfastEMA(0.9, 2.0)}, "cannot live a gradient filter"),
    ({"watch": ["2.*"]}, "cannot live parameters that the optimizer is given later"),
    ({"precision": torch.bfloat16}, "cannot live autocast"),
)


@pytest.mark.parametrize(("options", "message"), REFUSED, ids=lambda value: value if isinstance(value, str) else "")
def test_what_cannot_be_lived_again_is_refused_by_name(options, message, tmp_path):
    with pytest.raises(RecordError, match=message):
        refused(tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()


def test_several_optimizers_closures_and_autocast_are_refused(tmp_path):
    model = cases.mlp()
    with pytest.raises(RecordError, match="the steps of several optimizers"):
        explaind.record([torch.optim.SGD([p], 0.1) for p in model.parameters()], model, tmp_path / "run", thin=4)
    for name, message in (("closure", "a step with a closure"), ("autocast", "autocast")):
        model, optimizer, recorder = refused(tmp_path / name)
        recorder.examples([0])
        with torch.autocast("cpu", enabled=name == "autocast"):
            cases.losses(model, (cases.DATA[[0]][0], cases.DATA[[0]][1])).mean().backward()
        with pytest.raises(RecordError, match=f"cannot live {message} again"):
            optimizer.step(*([lambda: None] if name == "closure" else []))


@pytest.mark.parametrize("thin", [0, -1, "sqrt", "sqrt:0", "32", True])
def test_a_spacing_that_is_none_is_refused(thin, tmp_path):
    model = cases.mlp()
    with pytest.raises(RecordError, match="thin is no spacing"):
        explaind.record(torch.optim.SGD(model.parameters(), 0.1), model, tmp_path / "run", thin=thin)


def test_the_root_of_the_steps():
    assert [spacing(thin) for thin in (7, "sqrt:1000", "sqrt:1", "sqrt:25")] == [7, 32, 1, 5]


def test_the_command_line_records_thinly(tmp_path, capsys):
    config = str(Path(__file__).parent / "small.toml")
    run = tmp_path / "run"
    assert main(["run", config, "--out", str(run), "--train.steps", "30", "--train.thin", "sqrt"]) == 0
    capsys.readouterr()
    assert main(["info", str(run)]) == 0
    assert "parameters and optimizer state every 6 steps" in capsys.readouterr().out
    assert main(["verify", str(run)]) == 0
    assert capsys.readouterr().out.count("all 30 steps were lived again bitwise") == 2
    assert main(["doctor", str(run)]) == 0


def test_train_thin_is_a_number_or_sqrt():
    with pytest.raises(ConfigError, match="thin"):
        read(Path(__file__).parent / "small.toml", ["--train.thin", "root"])


def test_the_study_finds_the_same_ledger_in_less_room(tmp_path):
    found = loaded("thin").study("digits", tmp_path, 64)
    assert found["ok"] == [True, True, True]
    assert found["difference"] <= 1e-4
    assert found["smaller"] >= 3
    assert "bitwise" in found["note"]


def test_a_real_training_of_sqrt_spacing_takes_a_tenth_of_the_room(tmp_path):
    settings = [read(ROOT / "configs" / "digits.toml", ["--train.steps", "1000", *extra]) for extra in ([], ["--train.thin", "sqrt"])]
    for name, config in zip(("full", "thin"), settings, strict=True):
        train(load(config.task.name, config.task.options), config, tmp_path / name)
    full, thin = (sum(f.stat().st_size for f in (tmp_path / name).rglob("*") if f.is_file()) for name in ("full", "thin"))
    assert full / thin >= 10


@pytest.mark.parametrize("kind", ["h5", "zip"])
@pytest.mark.filterwarnings("ignore:Object at")  # zarr remarks on any file that is not its own
def test_a_thin_run_is_the_same_in_another_file_and_back(tmp_path, kind):
    if kind == "h5":
        pytest.importorskip("h5py", reason="HDF5 needs h5py")
    cases.recorded(tmp_path / "thin", thin=EVERY)
    export_run(tmp_path / "thin", tmp_path / f"out.{kind}")
    import_run(tmp_path / f"out.{kind}", tmp_path / "back")
    want, got = (
        {file.relative_to(run): file.read_bytes() for file in run.rglob("*") if file.is_file()}
        for run in (tmp_path / "thin", tmp_path / "back")
    )
    assert got == want
    if kind == "zip":
        sizes = xarray.open_datatree(zarr.storage.ZipStore(tmp_path / "out.zip", mode="r"), engine="zarr", consolidated=False).sizes
        assert sizes["stored"] == 1 + sizes["anchor"]
