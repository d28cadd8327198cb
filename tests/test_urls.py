"""Runs and ledgers at URLs: in memory, in a folder named by file://, and on an S3 server of this machine; all by the same path."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem

import explaind
from explaind.cli import main
from explaind.errors import StoreError
from explaind.store import remote
from explaind.store.exporting import export_run, import_run
from explaind.store.location import location_of
from explaind.store.repair import repair
from tests import cases
from tests.closeness import same

CASE = cases.optimizer_named("adamw")
SECRET = "hunter2"


@pytest.fixture(autouse=True)
def _own_places(tmp_path, monkeypatch):
    """Nothing in memory, and a cache of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    MemoryFileSystem.store.clear()


@pytest.fixture(scope="module")
def s3(tmp_path_factory):
    """A bucket on a server that listens to this machine alone."""
    pytest.importorskip("localbucket", reason="the S3 server is not installed")
    folder = tmp_path_factory.mktemp("s3")
    (folder / "bucket").mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    prompt = "import localbucket; localbucket.S3Handler.disable_nagle_algorithm = True; localbucket.main()"
    command = [sys.executable, "-c", prompt, str(folder), "--host", "127.0.0.1", "--port", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
            "AWS_ALLOW_HTTP": "true",
            "AWS_DISABLE_BULK_DELETE": "true",  # which this server does not know
            "AWS_REGION": "us-east-1",
            "AWS_ACCESS_KEY_ID": "somebody",
            "AWS_SECRET_ACCESS_KEY": SECRET,
        }.items():
            patch.setenv(name, value)
        try:
            _wait_for(server, port)
            yield "s3://bucket"
        finally:
            server.terminate()
            server.wait(10)


def _wait_for(server, port):
    for _ in range(200):
        assert server.poll() is None, "the server has ended"
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    raise AssertionError("the server does not answer")


@pytest.fixture(params=["memory", "file", "s3"])
def url(request, tmp_path):
    """A place for runs, of each kind."""
    if request.param == "s3":
        return f"{request.getfixturevalue('s3')}/{tmp_path.name}"
    return "memory://bucket" if request.param == "memory" else tmp_path.as_uri()


def recorded(path, case=CASE, **options):
    torch.manual_seed(0)  # which the manifest tells
    model = cases.PLAIN.model()
    optimizer = case.make(cases.trainable(model))
    with explaind.record(optimizer, model, path, data=cases.DATA, **options) as recorder:
        cases.train(cases.PLAIN, model, optimizer, case, recorder)
    return explaind.open(path)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        cases.shorten_blocks(patch)
        return recorded(tmp_path_factory.mktemp("whole") / "run")


def test_a_run_at_a_url_is_the_run_in_a_folder(url, whole, monkeypatch):
    cases.shorten_blocks(monkeypatch)
    run = recorded(f"{url}/run")
    assert (run.identity, run.complete, run.logged, run.damage()) == (whole.identity, True, 0, [])
    assert isinstance(run.path, Path) or not run.path.spool.exists(), "a whole run needs none"
    ledger = cases.decomposed(run, save=f"{url}/run/ledgers/one")
    kept, wanted = explaind.open_ledger(f"{url}/run/ledgers/one"), cases.decomposed(whole)
    for name, row in wanted.rows.items():
        same(kept.rows[name].values, row.values, name)
        same(ledger.rows[name].values, row.values, name)
    assert [place.name for place in (run.path / "ledgers").iterdir()] == ["one"], "what was begun is gone"
    with pytest.raises(StoreError, match="something here already"):
        cases.decomposed(run, save=f"{url}/run/ledgers/one")


def test_stored_gradients_at_a_url_are_those_in_a_folder(url, tmp_path, monkeypatch):
    cases.shorten_blocks(monkeypatch)
    run, local = (recorded(place, gradients="store") for place in (f"{url}/run", tmp_path / "local"))
    assert (run.identity, run.damage(), run.manifest.gradients) == (local.identity, [], "float64")
    got, want = (cases.decomposed(of, data=None, losses=None) for of in (run, local))
    for name, row in want.rows.items():
        same(got.rows[name].values, row.values, name)


def test_a_run_at_a_url_goes_into_a_file_and_back(whole, tmp_path, monkeypatch):
    url = "memory://bucket"
    cases.shorten_blocks(monkeypatch)
    run = recorded(f"{url}/run")
    cases.decomposed(run, save=f"{url}/run/ledgers/one")
    assert export_run(f"{url}/run", tmp_path / "out.zip").ledgers == ("one",)
    import_run(tmp_path / "out.zip", f"{url}/again")
    with pytest.raises(StoreError, match="something here already"):
        import_run(tmp_path / "out.zip", f"{url}/again")
    assert import_run(tmp_path / "out.zip", f"{url}/again", overwrite=True).steps == 7
    again = explaind.open(f"{url}/again")
    assert (again.identity, again.damage()) == (whole.identity, [])
    same(explaind.open_ledger(again.path / "ledgers" / "one")["data"], explaind.open_ledger(run.path / "ledgers" / "one")["data"])


def test_overwrite_replaces_a_run_and_nothing_else(whole, monkeypatch):
    cases.shorten_blocks(monkeypatch)
    recorded("memory://b/run", codec="standard")
    with pytest.raises(StoreError, match="something here already"):
        recorded("memory://b/run")
    assert recorded("memory://b/run", overwrite=True).identity == whole.identity
    (location_of("memory://b/other") / "mine.txt").write_bytes(b"mine")
    with pytest.raises(StoreError, match="not a run"):
        recorded("memory://b/other", overwrite=True)
    assert (location_of("memory://b/other") / "mine.txt").read_text() == "mine"


KILLED = """
import os, signal, sys
import pytest, torch, explaind
from tests import cases
cases.shorten_blocks(pytest.MonkeyPatch())
case = cases.optimizer_named("sgd")
torch.manual_seed(0)
model = cases.PLAIN.model()
optimizer = case.make(cases.trainable(model))
recorder = explaind.record(optimizer, model, sys.argv[1], data=cases.DATA)
for step in range(5):
    cases.gradient(cases.PLAIN, model, step, recorder)
    optimizer.step()
recorder._writer._wait()
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_recording_to_s3_that_is_killed_is_found_again_on_its_machine(s3, tmp_path, monkeypatch, capsys):
    url, case = f"{s3}/{tmp_path.name}", cases.optimizer_named("sgd")
    cases.shorten_blocks(monkeypatch)
    wanted = recorded(tmp_path / "run", case)
    killed = subprocess.run([sys.executable, "-c", KILLED, url], capture_output=True, text=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    run = explaind.open(url)
    assert (run.steps, run.logged, run.complete, run.damage()) == (2, 3, False, [])
    assert main(["info", url, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["logged"] == 3
    elsewhere = explaind.open(url, spool=tmp_path / "elsewhere")
    assert (elsewhere.steps, elsewhere.logged) == (2, 0), "another machine sees what was committed"
    shutil.copytree(run.path.spool, tmp_path / "copied")
    assert main(["repair", url]) == 0
    assert (repair(url).regained, explaind.open(url).steps) == (0, 5)
    same(explaind.open(url).states(0, 6), wanted.states(0, 6))
    model = cases.PLAIN.model()
    torch.nn.utils.vector_to_parameters(torch.from_numpy(wanted.states(4, 5)[0]), model.parameters())
    optimizer = case.make(cases.trainable(model))
    with explaind.record(optimizer, model, url, data=cases.DATA, resume=True, spool=tmp_path / "copied") as recorder:
        assert recorder.steps == 4
        for step in range(4, 7):
            cases.gradient(cases.PLAIN, model, step, recorder)
            optimizer.step()
    run = explaind.open(url)
    assert (run.steps, run.complete, run.damage()) == (7, True, [])
    same(run.states(0, 8), wanted.states(0, 8))


def test_a_second_recorder_is_refused_on_this_machine_and_stops_the_first_from_another(tmp_path, monkeypatch):
    cases.shorten_blocks(monkeypatch)
    model = cases.PLAIN.model()
    optimizer = CASE.make(cases.trainable(model))
    recorder = explaind.record(optimizer, model, "memory://b/run", data=cases.DATA)
    for options in ({"overwrite": True}, {"resume": True}):
        with pytest.raises(StoreError, match=r"being recorded.*\(memory://b/run\)"):
            explaind.record(optimizer, model, "memory://b/run", data=cases.DATA, **options)
    explaind.record(optimizer, model, "memory://b/run", data=cases.DATA, resume=True, spool=tmp_path / "other machine").close()
    with pytest.raises(StoreError, match="somebody else is writing this run"), recorder:
        cases.train(cases.PLAIN, model, optimizer, CASE, recorder)
    run = explaind.open("memory://b/run")
    assert (run.steps, run.damage()) == (0, [])


def test_a_recorder_that_is_too_late_overwrites_nothing(tmp_path):
    """Nothing of the first recorder is committed yet when another machine records the same run to its end."""
    loops = [cases.PLAIN.model() for _ in range(2)]
    optimizers = [CASE.make(cases.trainable(model)) for model in loops]
    first = explaind.record(optimizers[0], loops[0], "memory://b/run", data=cases.DATA)
    cases.train(cases.PLAIN, loops[0], optimizers[0], CASE, first)
    with explaind.record(optimizers[1], loops[1], "memory://b/run", data=cases.DATA, resume=True, spool=tmp_path / "other") as second:
        cases.train(cases.PLAIN, loops[1], optimizers[1], CASE, second)
    files = {name: location_of("memory://b/run").fs.cat_file(name) for name in location_of("memory://b/run").files()}
    with pytest.raises(StoreError, match="somebody else is writing this run"):
        first.close()
    assert files == {name: location_of("memory://b/run").fs.cat_file(name) for name in location_of("memory://b/run").files()}
    assert explaind.open("memory://b/run").damage() == []


def test_a_run_that_is_removed_elsewhere_ends_its_recording(monkeypatch):
    cases.shorten_blocks(monkeypatch)
    model = cases.PLAIN.model()
    optimizer = CASE.make(cases.trainable(model))
    recorder = explaind.record(optimizer, model, "memory://b/run", data=cases.DATA)
    (recorder.path / "commit.json").unlink()
    with pytest.raises(StoreError, match="somebody else is writing this run"), recorder:
        cases.train(cases.PLAIN, model, optimizer, CASE, recorder)


def test_a_spool_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match=rf"cannot write: Not a directory \({tmp_path}/file/spool\)"):
        recorded("memory://b/run", spool=tmp_path / "file" / "spool")
    assert not MemoryFileSystem.store


def test_logged_steps_of_another_recording_are_neither_taken_up_nor_lost(monkeypatch):
    cases.shorten_blocks(monkeypatch)
    with monkeypatch.context() as patch:
        failing(patch, 60)
        with pytest.raises(StoreError):
            recorded("memory://b/run")
    assert explaind.open("memory://b/run").logged > 0
    MemoryFileSystem.store.clear()
    with pytest.raises(StoreError, match=r"steps of another recording to memory://b/run are still logged here.*name another spool"):
        recorded("memory://b/run")
    shutil.rmtree(location_of("memory://b/run").spool)
    assert recorded("memory://b/run").complete


def failing(patch, after, error=PermissionError):
    """All requests to put something fail after so many, with a message that tells a secret; how many there were."""
    put, count = MemoryFileSystem.pipe_file, [0]

    def pipe_file(self, path, value, *args, **options):
        count[0] += 1
        if count[0] > after:
            raise error(f"<Error>403 AccessDenied, key {SECRET}\nof somebody</Error>")
        return put(self, path, value, *args, **options)

    patch.setattr(MemoryFileSystem, "pipe_file", pipe_file)
    return count


def test_any_put_may_fail(whole, monkeypatch):
    cases.shorten_blocks(monkeypatch)
    with monkeypatch.context() as patch:
        count = failing(patch, 10**6)
        recorded("memory://b/whole")
    assert count[0] > 90
    seen = set()
    for after in range(0, count[0], 14):
        url = f"memory://b/run{after}"
        with monkeypatch.context() as patch:
            failing(patch, after, (PermissionError, FileNotFoundError, RuntimeError)[after % 3])
            with pytest.raises(StoreError, match=r"^cannot write: .*\(memory://b/run") as caught:
                recorded(url)
        assert "\n" not in str(caught.value)
        assert SECRET not in str(caught.value)
        if not (location_of(url) / "commit.json").exists():
            with pytest.raises(StoreError):
                explaind.open(url)
            continue
        run = explaind.open(url)
        assert (run.complete, run.damage()) == (False, [])
        have = run.steps + run.logged
        repair(url)
        run = explaind.open(url)
        assert (run.steps, run.damage()) == (have, [])
        same(run.states(0, have + 1), whole.states(0, have + 1))
        seen.add(have)
    assert max(seen) == 7, "steps that were not committed come out of the log"


def test_an_answer_that_does_not_come_is_not_taken_for_nothing_there(monkeypatch):
    identity, read, down = recorded("memory://b/run").identity, MemoryFileSystem.cat_file, []

    def unreachable(self, path, **options):
        raise ConnectionError(f"no route, {SECRET}")

    with monkeypatch.context() as patch:
        patch.setattr(MemoryFileSystem, "cat_file", lambda *a, **o: (unreachable if down else read)(*a, **o))
        run = explaind.open("memory://b/run")
        down.append(True)
        for ask in (lambda: explaind.open("memory://b/run"), lambda: run.states(0, 1), run.damage):
            with pytest.raises(StoreError, match=r"the place cannot be reached.*ConnectionError") as caught:
                ask()
            assert SECRET not in str(caught.value)
    for name in ("info", "find"):
        with monkeypatch.context() as patch:
            patch.setattr(MemoryFileSystem, name, unreachable)
            with pytest.raises(StoreError, match="the place cannot be reached"):
                recorded("memory://b/run", overwrite=name == "info")
    assert explaind.open("memory://b/run").identity == identity


def test_a_decomposition_at_a_url_goes_on_and_is_shared(monkeypatch):
    run = recorded("memory://b/run")
    wanted = cases.decomposed(run, memory=3500)["data"]

    def stop(done, total):
        if done == 10:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cases.decomposed(run, save="memory://b/led", memory=3500, progress=stop)
    begun = {place.name for place in location_of("memory://b/.led.parts").iterdir()}
    assert {"key.json", "block-0"} <= begun
    with pytest.raises(StoreError, match="with other arguments was begun here"):
        cases.decomposed(run, save="memory://b/led", memory=3500, rule="gauss:3")
    same(cases.decomposed(run, save="memory://b/led", memory=3500)["data"], wanted)
    same(explaind.open_ledger("memory://b/led")["data"], wanted)
    cases.decomposed(run, save="memory://b/led", memory=3500, overwrite=True, shard="0/2")
    assert explaind.shards_left("memory://b/led", 2) == [1]
    same(explaind.open_ledger("memory://b/led")["data"], wanted)
    cases.decomposed(run, save="memory://b/led", memory=3500, overwrite=True, shard="1/2")
    same(explaind.open_ledger("memory://b/led")["data"], wanted)
    assert [place.name for place in location_of("memory://b").iterdir()] == ["led", "run"]


def test_the_command_line_takes_urls(tmp_path, capsys):
    url = "memory://b/run"
    small = ["--train.steps", "3", "--decompose.rule", "midpoint:1", "--decompose.keep", '["query"]', "--decompose.windows", "1"]
    assert main(["record", "tests/small.toml", "--out", url, *small]) == 0
    assert main(["decompose", url, "--name", "one", "--queries", "val:0:2"]) in (0, 1)
    assert main(["decompose", url, "--name", "../one"]) == 2
    assert "not a name that can stand at a URL (memory://b/run/ledgers)" in capsys.readouterr().err
    assert main(["analyse", url]) == 0
    assert main(["report", url]) == 0
    assert main(["export", url, str(tmp_path / "out.zip")]) == 0
    assert main(["import", str(tmp_path / "out.zip"), "memory://b/again"]) == 0
    capsys.readouterr()
    assert main(["info", "memory://b/again", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["path"], told["steps"], told["ledgers"]) == ("memory://b/again", 3, ["memory://b/again/ledgers/one"])
    assert main(["verify", f"{url}/ledgers/one"]) in (0, 1)
    assert {place.name for place in location_of(url).iterdir()} >= {"analysis", "report", "ledgers", "theta"}
    assert location_of(f"{url}/report/ledgers/one/training.png").read_bytes().startswith(b"\x89PNG")
    location_of("memory://b/small.toml").write_bytes(Path("tests/small.toml").read_bytes())
    assert main(["record", "memory://b/small.toml", "--out", "memory://b/from", *small]) == 0
    assert explaind.open("memory://b/from").identity == explaind.open(url).identity
    assert main(["plan", (Path.cwd() / "tests" / "none.toml").as_uri()]) == 2
    for verb in ("plan", "doctor"):
        assert main([verb, "memory://b/none.toml"]) == 2
    assert capsys.readouterr().err.count("cannot read the configuration") == 3
    assert main(["export", url, "s3://bucket/out.zip"]) == 2
    assert "an exported file stands on this machine (s3://bucket/out.zip)" in capsys.readouterr().err


def test_credentials_in_a_url_are_told_to_nobody(tmp_path):
    run = recorded(f"memory://me:{SECRET}@b/run")
    ledger = cases.decomposed(run, save=f"memory://me:{SECRET}@b/ledger")
    assert ledger.settings["run"] == "memory://b/run"
    assert SECRET not in repr(run) + repr(run.path) + str(run.path / "theta")
    assert not [name for name, file in MemoryFileSystem.store.items() if SECRET.encode() in file.getvalue()]
    with pytest.raises(StoreError, match=r"\(memory://b/run\)") as caught:
        recorded(f"memory://me:{SECRET}@b/run")
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("nothing://b/run", r"this URL cannot be opened \(nothing://b/run\)"),
        ("memory://", r"not a URL of a place \(memory://\).*name the run"),
        (f"s3://b/run?secret={SECRET}", r"not a URL of a place \(s3://b/run\)"),
        (f"simplecache::s3://me:{SECRET}@b/run", r"chained URLs name no place; got simplecache::…"),
        ("s3://b/*/run", r"not a URL of a place"),
        ("s3://bucket", r"not a URL of a place \(s3://bucket\); expected SCHEME://PLACE/NAME; name the run"),
        ("file://host/run", r"not a URL of a folder; expected file:///PATH; got file://host/run"),
    ],
)
def test_what_is_no_place_is_refused_in_one_line(url, message):
    for use in (explaind.open, explaind.open_ledger, recorded):
        with pytest.raises(StoreError, match=message) as caught:
            use(url)
        assert SECRET not in str(caught.value)


def test_a_url_that_pathlib_has_shortened_is_refused():
    with pytest.raises(StoreError, match=r"pathlib has shortened a URL; got s3:/bucket/run; give it as a str"):
        explaind.open(Path("s3://bucket/run"))


def test_a_package_that_is_missing_is_named(monkeypatch):
    def absent(scheme):
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(remote.fsspec, "get_filesystem_class", absent)
    monkeypatch.setitem(sys.modules, "obstore.fsspec", None)
    with pytest.raises(StoreError, match=r"s3:// needs another package \(s3://b/run\); pip install 'explaind-ledger\[s3\]'"):
        explaind.open("s3://b/run")


READ = """
import sys, warnings
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "explaind":
            raise ImportError("explaind is not installed")
sys.meta_path.insert(0, Absent())
import obstore.fsspec, xarray
obstore.fsspec.register("s3")
warnings.filterwarnings("ignore", message=r"Object at (commit|metadata)\\\\.json")
tree = xarray.open_datatree(sys.argv[1], engine="zarr", consolidated=False)
assert tree["theta"].dims == ("state", "param"), tree
assert tree["hyper"].dims == ("step", "layer", "option"), tree
assert "explaind" not in sys.modules
print(*tree["theta"].values[-1].tolist())
"""


def test_xarray_opens_a_run_of_the_standard_codec_with_nothing_of_ours(s3, tmp_path):
    """In a folder: test_exported_files.py."""
    pytest.importorskip("xarray", reason="xarray is not installed")
    url = f"{s3}/{tmp_path.name}"
    run = recorded(f"{url}/run", codec="standard")
    told = subprocess.run([sys.executable, "-c", READ, f"{url}/run"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert told.returncode == 0, told.stderr
    same(np.array([float(word) for word in told.stdout.split()]), run.states(7, 8)[0])


def test_file_urls_are_folders(tmp_path):
    run = recorded((tmp_path / "a run").as_uri())
    assert run.path == tmp_path / "a run"
    assert fsspec.filesystem("file").exists(os.fspath(run.path / "commit.json"))
