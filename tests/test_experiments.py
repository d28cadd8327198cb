"""Small versions of the studies under experiments/: the same code, fewer steps."""

import csv
import importlib.util
import itertools
import json
import re
import runpy
import subprocess
import sys
from math import nan
from pathlib import Path

import pytest

import explaind
from explaind.analysis.speedup import speedup
from explaind.analysis.table import tabulated
from explaind.cli import main
from tests.closeness import algebra

FOLDER = Path(__file__).parents[1] / "experiments"


def loaded(name):
    spec = importlib.util.spec_from_file_location(f"experiment_{name}", FOLDER / name / "run.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_strongest_examples_of_a_digit_are_of_its_class(tmp_path):
    found = loaded("digits").same_class(tmp_path / "run", seed=0, images=40, overrides=["--train.steps", "150"])
    assert found["all_five"] >= 0.9
    assert found["explained_min"] >= 0.99
    assert found["closure_max"] <= 1e-10


def test_flipped_labels_stand_out(tmp_path):
    found = loaded("digits").flipped_labels(tmp_path / "run", seed=0, overrides=["--train.steps", "80", "--task.hidden", "32"])
    assert found["raises_mean_held_out_loss"] >= 0.6
    assert found["lowers_own_loss"] >= 0.9
    assert found["training_loss"] >= 0.9


@pytest.fixture
def bench(tmp_path, monkeypatch):
    """The benchmark on a small prime, without processes of its own."""
    study = loaded("benchmark")
    start = subprocess.run

    def here(command, **options):
        if command[1:3] != ["-m", "explaind.cli"]:
            return start(command, **options)
        return main(command[3:]) == 0 or pytest.fail(str(command))

    monkeypatch.setattr(study.subprocess, "run", here)
    monkeypatch.setattr(study, "FIRST", 3)
    monkeypatch.setattr(study.Bench, "worker", lambda self, name, *arguments: study.WORKERS[name](*json.loads(json.dumps(arguments))))
    parser = study.options()
    peer = "echo '" + json.dumps({"s_per_step": 8.0, "peak_mb": 1e6}) + "'"
    return study.Bench(parser.parse_args(["--small", "--tries", "1", "--steps", "6", "--peer", peer, "--out", str(tmp_path)]))


def test_the_benchmark_measures_time_memory_and_rest_rows(bench, capsys):
    bench.peer()
    bench.one()
    bench.rates()
    found = bench.found
    assert [row["rule"] for row in found["peer"]["ours"]] == ["secant", "secant:4", "midpoint:100", "auto", "secant"]
    for row in found["peer"]["ours"]:
        assert row["peak_mb"] > 0
        assert row["s_per_step"] > 0
        assert row["closure"] <= (1e-10 if row["dtype"] == "float64" else 1e-4)
        assert row["path_share"] <= (1e-10 if (row["rule"], row["dtype"]) == ("secant", "float64") else 0.01)
    assert found["peer"]["theirs"] == {"s_per_step": 8.0, "peak_mb": 1e6}
    assert found["one"]["recipes"] == ["secant:1"] * 3
    assert all(row["share"] > 0 for row in found["rates"])
    assert "times faster" in capsys.readouterr().out
    assert json.loads(bench.write().read_text())["parts"]["one"]["steps"] == 3


def test_the_benchmark_follows_a_whole_training_and_the_split_between_layers(bench):
    bench.whole()
    bench.layers()
    assert bench.found["whole"]["training"]["train_s_per_step"] > 0
    assert bench.found["whole"]["ours"][0]["path_share"] <= 1e-4
    off = bench.found["layers"]["median"]
    assert off["secant:1"] / off["secant:2"] >= 2
    assert off["midpoint:100"] <= 1e-4


@pytest.mark.parametrize("name", ["benchmark", "digits", "pruning"])
def test_every_study_is_a_command_with_a_readme(name, monkeypatch, capsys):
    script = FOLDER / name / "run.py"
    monkeypatch.setattr(sys, "argv", [str(script), "--help"])
    monkeypatch.syspath_prepend(str(script.parent))  # as Python does
    with pytest.raises(SystemExit, match=r"^0$"):
        runpy.run_path(str(script), run_name="__main__")
    assert "usage" in capsys.readouterr().out
    assert f"experiments/{name}/run.py" in (FOLDER / name / "README.md").read_text()


def test_the_last_line_of_a_program_is_what_counts():
    found = loaded("benchmark").last_json([sys.executable, "-c", f"print('noise'); print('{json.dumps({'a': 1})}')"])
    assert found == {"a": 1}


def test_the_grokking_study_runs_from_end_to_end_and_goes_on(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(FOLDER / "grokking"))
    study = loaded("grokking")

    def results(*parts):
        given = study.filled(study.options().parse_args(["--small", "--seeds", "0", "1", "--out", str(tmp_path), "--parts", *parts]))
        made = study.Study(given)
        for part in parts:
            getattr(made, part)()
        return json.loads(made.write().read_text())

    found, readme = results(*study.PARTS), (FOLDER / "grokking" / "README.md").read_text()
    printed = capsys.readouterr().out
    assert [(row["seed"], row["val_0.95_at"]) for row in found["training"]] == [(0, None), (1, None)]
    assert "| 0 | – |" in (tmp_path / "tables" / "phases.md").read_text()
    assert len(found["similarity"]) == 2 * 5 * 7
    assert all(0 < row["p_value"] <= 1 for row in found["similarity"])
    assert [row["seed"] for row in found["training"]] == [0, 1]
    assert all(row["val_accuracy_most"] <= 1 for row in found["no_decay"])
    for row in found["checks"]:
        assert row["path_share"] <= 1e-2
        assert row["closure"] <= 1e-4  # float32
    with (tmp_path / "tables" / "layer_shares.csv").open() as file:
        rows = list(csv.DictReader(file))
    for seed, step in {(row["seed"], row["step"]) for row in rows}:
        whole = sum(float(row["share"]) for row in rows if (row["seed"], row["step"]) == (seed, step))
        assert abs(whole - 1) <= 1e-12
    assert {p.stem for p in (tmp_path / "figures").iterdir()} == {
        "layer_shares",
        "balance",
        "progress",
        *(f"{name}-{seed}" for name in ("cosines", "kernel_pca") for seed in (0, 1)),
    }
    assert len(found["phase_agreement"]["boundary"]) == study.PHASES - 1
    assert 0 < found["sampling_error"]["root_mean_square"] <= found["sampling_error"]["most"] < 0.1
    assert all(missed < 0.01 for missed in found["scores_missed"].values())
    of_sums(tmp_path, found)
    for name in (
        "training",
        "credit",
        "phases",
        "similarity",
        "components",
        "progress",
        "clock",
        "operations",
        "grokfast",
        "filtered",
    ):  # the tables of the README
        text = (tmp_path / "tables" / f"{name}.md").read_text()
        assert text in printed
        assert name in ("similarity", "components") or text.split("\n")[0] in readme  # those two have a column for each look
        assert text.count("\n| ") >= 3
    for name in study.OPERATIONS:
        assert [race["taken"] for race in found["operations"][name]] == [40]
    assert set(found["grokfast"]) == set(study.FILTERS)
    assert [(row["filter"], row["seed"]) for row in found["filtered"]] == [("none", 0), ("EMA", 0)]
    for row in found["filtered"]:
        assert abs(sum(row["shares"].values()) - 1) <= 1e-12
        assert abs(row["initial"] + row["data"] + row["decay"] - row["final"]) <= 0.01 * abs(row["final"] - row["initial"])  # the path row
    kinds = ("seed-*/**/commit.json", "grokfast-*/**/commit.json", "**/scores.npz", "races/*.json")
    times = {p: p.stat().st_mtime_ns for kind in kinds for p in tmp_path.glob(kind)}
    assert len(times) == 2 * 2 + 2 * 2 + 2 + (len(study.OPERATIONS) + len(study.FILTERS) - 1)  # runs and ledgers; mod53 races once
    assert results("credit", "similarity", "filtered") == found
    assert times == {p: p.stat().st_mtime_ns for kind in kinds for p in tmp_path.glob(kind)}


def of_sums(folder, found):
    """Child credits sum to their parents': layers to the whole, and all of the ledger to the prediction."""
    for seed in found["seeds"]:
        (path,) = (folder / f"seed-{seed}" / "ledgers").glob("applied.*")
        ledger = explaind.open_ledger(path)
        whole, layers = ledger.sum("example", "layer")["data"], ledger.sum("example")["data"]
        assert abs(layers.sum(1) - whole).max() <= 1e-12 * abs(layers).sum()
        rows = sum(ledger.total(name) for name in ledger.rows)
        assert abs(rows - ledger["final"]).max() <= 1e-4  # float32


def test_the_transplant_study_runs_from_end_to_end_and_in_shares(tmp_path, capsys, monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER / "transplant"))
    study = loaded("transplant")

    def made(*options):
        return study.Study(study.filled(study.options().parse_args(["--small", "--seeds", "2", "--out", str(tmp_path), *options])))

    made("--share", "1/2").share()
    half = {p: p.stat().st_mtime_ns for p in (tmp_path / "trainings").iterdir()}
    made().all()
    found = json.loads((tmp_path / "results.json").read_text(), parse_constant=pytest.fail)  # NaN and Infinity are not JSON
    for side in ("middle", "outer"):
        assert all(all(found["identities"][side][name]) for name in ("self", "whole", "rest"))
    whole = {p: p.stat().st_mtime_ns for p in (tmp_path / "trainings").iterdir()}
    assert half.items() <= whole.items()  # nothing was trained twice
    # Two sides, two donors, two seeds, four kinds and one donor that has memorised; from scratch, and whole, look at less than that.
    assert len(whole) == 2 * 2 * 2 * 2 + 2 + 2 * 2 + 2 * 2
    assert len(half) < len(whole)
    for side in study.SIDES:
        table = found["transplants"][side]
        assert len(table["kind"]) == 2 * 2 * 4 + 2
        assert set(table["kind"]) == {"transplant", "random", "shuffled", "whole", "memorised"}
        assert {donor for kind, donor in zip(table["kind"], table["donor"], strict=True) if kind == "memorised"} == {30}
        assert found["swap"][side]["donor"] == [0, 10, 20, 30, 40]
        assert found["swap"][side]["kl"][-1] == 0.0 < found["swap"][side]["kl"][0]  # the last donor is the host
        assert found["confusion"][side]["true"] != found["confusion"][side]["predicted"]
        assert 40 not in found["confusion"][side]["donor"]
        for figure in (side, f"{side}-swap", f"{side}-confusion"):
            assert (tmp_path / "figures" / f"{figure}.png").exists()
    assert "middle layers kept" in (printed := capsys.readouterr().out)
    written = [(tmp_path / "tables" / f"{side}.md").read_text() for side in study.SIDES]
    assert all(text in printed for text in written)
    told = heads((FOLDER / "transplant" / "README.md").read_text())
    assert told == heads("\n".join(written))  # the tables of the README are the command's
    few = made("--last").patients("outer")  # controls of each donor at the last one alone
    assert [(p.kind, p.donor) for p in few if p.seed == 0] == [
        ("transplant", 20),
        ("transplant", 40),
        ("random", 20),
        ("random", 40),
        ("shuffled", 40),
        ("whole", 40),
        ("memorised", 30),
    ]


def heads(text):
    """The heads of all Markdown tables of a text, without the donors that they name."""
    lines = text.splitlines()
    found = {line for line, below in itertools.pairwise(lines) if below.startswith("| --- |")}
    return {re.sub(r"donors of step [^;]*;", "donors of step …;", line) for line in found}


def test_what_a_swap_comes_to_is_told(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER / "transplant"))
    swaps = importlib.import_module("swaps")
    accuracies = {0: (0.1, 0.0), 10: (0.6, 0.1), 20: (1.0, 0.6), 30: (1.0, 0.97), 40: (1.0, 1.0), 50: (1.0, 1.0)}
    assert swaps.telling(accuracies) == [10, 20, 30, 40]
    assert swaps.telling({0: (0.0, 0.0), 10: (0.0, 0.0), 20: (0.0, 0.0)}) == [10]  # what never generalises
    rows = [
        {"donor": donor, "train_accuracy": 0.5, "val_accuracy": accuracy, "kl": kl}
        for donor, accuracy, kl in ((0, 0.0, 5.0), (10, 1.0, 0.5), (20, 0.94, 0.5), (30, 0.96, 0.4), (40, 1.0, 0.05), (50, 1.0, 0.0))
    ]
    swap = tabulated("swap", "", "", rows)
    assert [line.split(" | ")[-1] for line in swaps.since("outer", swap).splitlines()[2:]] == ["30 |", "40 |", "10 |", "40 |", "none |"]
    pairs = [{"donor": 20, "true": t, "predicted": p, "count": count} for t, p, count in ((0, 0, 3), (1, 0, 2), (2, 2, 1))]
    line = swaps.mixed("outer", swap, tabulated("confusion", "", "", pairs), accuracies).splitlines()[-1]
    assert line == "| 20 | 1.00 / 0.60 | 0.50 / 0.94 | 0.5 | 2 of 6 | 2 |"


def test_the_cells_of_the_transplant_study_say_what_did_not_arrive(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER / "transplant"))
    cells = importlib.import_module("cells")
    steps = {
        ("transplant", 10): [30, 50, nan],
        ("transplant", 20): [10, 20, 40],
        ("random", 10): [nan, 100, nan],
        ("random", 20): [nan, 100, nan],
    }
    rows = [
        {
            "kind": kind,
            "donor": donor,
            "seed": seed,
            "steps": found,
            "taken": 200 if found != found else found,
            "still": 60,
            "val_accuracy": 0.5,
        }
        for (kind, donor), mine in steps.items()
        for seed, found in enumerate(mine)
    ]
    table = tabulated("transplants", "", "", rows)
    accuracies = {10: (0.2, 0.0), 20: (0.9, 0.1)}
    first, second = cells.donors("outer", table, speedup(table), accuracies).splitlines()[2:]
    # Seed by seed at least 200 / 30, just 100 / 50, and in the third neither arrived.
    assert first == "| 10 | 0.20 / 0.00 | 50 [30, –] | ≥ 2.0 (0.0 … ∞) |"
    assert second == "| 20 | 0.90 / 0.10 | 20 [10, 40] | ≥ 5.0 (5.0 … ∞) |"
    assert cells.apart("outer", table).splitlines()[2:] == ["| random |  | – [100, –] | 0.50, 0.50, 0.50 |"]
    assert cells.together("outer", table, accuracies).splitlines()[2:] == ["| random | 3 of 3 | 0 of 3 |"]


def test_an_optimizer_of_ones_own_is_explained(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(FOLDER / "lion"))
    monkeypatch.setattr(sys, "argv", ["run.py", "--steps", "20", "--out", str(tmp_path / "run")])
    loaded("lion").main()
    assert "steps of Lion: ok; explained 0.999" in capsys.readouterr().out


def test_killed_recordings_are_sound_and_go_on(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["run.py", "--kills", "2", "--small", "--out", str(tmp_path / "store")])
    study = loaded("store")
    monkeypatch.setattr(study.recording, "TOGETHER", study.recording.TOGETHER)  # put back afterwards
    study.main()
    out = capsys.readouterr().out
    assert "0 corrupt, 0 with phantom steps,\n0 of which info or repair say something else, at most 0 told steps lost, 2 resumed" in out


def test_killed_decompositions_go_on(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["run.py", "--what", "decompose", "--kills", "1", "--small", "--out", str(tmp_path / "store")])
    study = loaded("store")
    for module, name in ((study.recording, "TOGETHER"), (study.parts, "SECONDS"), (study.parts, "PATIENCE")):
        monkeypatch.setattr(module, name, getattr(module, name))  # put back afterwards
    study.main()
    out = capsys.readouterr().out
    assert "of 64 steps swept, 0 corrupt" in out
    assert "1 ledgers bitwise the undisturbed one" in out


def test_what_recording_costs_is_told(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["run.py", "--small", "--pairs", "1", "--out", str(tmp_path / "overhead")])
    loaded("overhead").main()
    found = json.loads((tmp_path / "overhead" / "overhead.json").read_text())["digits"]
    assert (found["steps"], found["params"], found["damage"]) == (200, 4810, 0)
    assert 0 < found["bytes of theta"] < 4
    assert "| digits | 4,810 |" in capsys.readouterr().out


def test_the_small_codec_makes_a_record_small(tmp_path):
    found = loaded("codec").study("digits", tmp_path / "run", ("--train.steps", "48"))
    for array, most in (("theta", 2.8), ("preconditioner", 3.2)):
        assert found[array]["bitdelta"]["bytes"] < most
        assert found[array]["bitdelta"]["bytes"] < found[array]["standard"]["bytes"]


@pytest.mark.parametrize("name", ["trainer", "lightning", "accelerated", "ddp"])
def test_a_loop_of_a_library_is_short_and_its_ledger_holds(name, tmp_path):
    pytest.importorskip({"trainer": "transformers", "lightning": "pytorch_lightning", "accelerated": "accelerate", "ddp": "torch"}[name])
    script = FOLDER / "loops" / f"{name}.py"
    docstring, code = script.read_text().split('"""\n', 1)
    assert docstring.startswith('"""')
    assert len([line for line in code.splitlines() if line.strip()]) <= 25
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"] if name == "ddp" else []
    done = subprocess.run([sys.executable, *start, str(script), str(tmp_path / "run")], capture_output=True, text=True, timeout=300)
    assert done.stdout.strip().splitlines()[-1] == "True", done.stderr


def test_what_the_doctor_says_is_set_beside_what_happens(tmp_path):
    rows = loaded("doctor").main(["--small", "--out", str(tmp_path)])
    explained, wrong = rows[0], rows[1:]
    assert explained["set-up"] == "contrastive"
    assert explained["ok"]
    assert 0.5 < explained["memory_ratio"] < 2  # times are for a quiet machine
    assert len(wrong) == 4
    assert all(row["refused"] for row in wrong), wrong
    assert json.loads((tmp_path / "results.json").read_text()) == rows


def test_the_pruning_study_runs_from_end_to_end_and_goes_on(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(FOLDER / "pruning"))
    study = loaded("pruning")

    def results(*parts):
        given = study.filled(study.options().parse_args(["--small", "--seeds", "0", "1", "--out", str(tmp_path), "--parts", *parts]))
        made = study.Study(given)
        for part in parts:
            getattr(made, part)()
        return json.loads(made.write().read_text()), made

    found, made = results(*study.PARTS)
    for row in found["checks"]:
        assert row["closure"] <= 1e-4  # float32
        assert row["explained"] >= 0.99
    for row in found["identities"]:
        assert row["whole"]
        assert row["accuracy"]
        assert row["sums"] <= 1e-12
    curves = found["curves"]
    assert len(curves["kept"]) == 2 * len(study.METHODS) * len(study.LEVELS) * len(study.KEPT)
    for i, kept in enumerate(curves["kept"]):
        if kept == 1:  # the network itself, to the last bit
            run = made.runs[curves["seed"][i]]
            assert curves["val_accuracy"][i] == made.benches[curves["seed"][i]].measured(run.theta(run.steps))["val_accuracy"]
            assert (curves["kl"][i], curves["sparsity"][i]) == (0, 0)
        assert curves["sparsity"][i] <= 1 - kept + 1e-12
    scores, layers = made._scores(0), made.runs[0].manifest.layers
    for values in scores.values():
        whole = study.scores_of(values, study.components(layers, "tensor").of)
        assert all(abs(whole[i] / values[x.offset : x.offset + x.size].sum() - 1) <= 1e-12 for i, x in enumerate(layers))
    for name in ("training", "checks", "at_90", "margins_90", "at_98", "margins_98", "reach", "overlap", "ablation"):
        assert (tmp_path / "tables" / f"{name}.md").read_text().count("\n| ") >= 4
    for row in found["ablation"]:
        assert all(-1 <= least <= median <= most <= 1 for median, least, most in (row["loss"], row["kl"]))
    with (tmp_path / "tables" / "ablation.csv").open() as file:
        tensors = [row for row in csv.DictReader(file) if (row["seed"], row["level"]) == ("0", "tensor")]
    assert [row["component"] for row in tensors] == [x.name for x in layers if not x.name.startswith("output")]
    algebra([float(row["credit"]) for row in tensors], [scores["credit"][x.offset : x.offset + x.size].sum() for x in layers[:-2]])
    assert (tmp_path / "figures" / "pruning.png").exists()
    kinds = ("seed-*/**/commit.json", "scores/*.npz", "curves/*.json", "ablations/*.json")
    times = {p: p.stat().st_mtime_ns for kind in kinds for p in tmp_path.glob(kind)}
    assert len(times) == 2 * (2 + 1 + 12 + 1)
    assert results("credit", "prune", "ablate")[0] == found
    assert times == {p: p.stat().st_mtime_ns for kind in kinds for p in tmp_path.glob(kind)}


def test_stored_gradients_give_the_same_ledger(tmp_path):
    study = loaded("gradients")
    found = study.study(16, tmp_path, 1, study.SMALL)
    assert all(found["ok"].values())
    assert found["difference"]["stored"] <= 1e-4
    assert found["examples a step"] == 100
