"""The second copy of a finished run's metadata: whichever file of them rots, a repair makes it what it was."""

import json
import shutil
import zipfile

import pytest

import explaind
from explaind.cli import main
from explaind.errors import StoreError
from explaind.store import mirror
from explaind.store.checksums import text_checksum
from explaind.store.exporting import export_run, import_run
from explaind.store.repair import repair
from explaind.store.upgrading import upgrade
from tests import cases
from tests.test_resumed_recording import Loop
from tests.test_upgrading import OLD


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return cases.recorded(tmp_path_factory.mktemp("mirror") / "run", cases.problem_named("frozen parameter"), data=cases.DATA).path


def texts(path):
    return {file.relative_to(path).as_posix(): file.read_bytes() for file in path.rglob("*") if file.is_file()}


SPOILS = {
    "gone": lambda file: file.unlink(),
    "cut": lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]),
    "another": lambda file: file.write_bytes((file.parents[1] / "hyper" / "zarr.json").read_bytes()),
    "chunks": lambda file: file.write_text(file.read_text().replace('"chunk_shape": [', '"chunk_shape": [1')),
}


@pytest.mark.parametrize("spoil", SPOILS)
def test_every_file_of_metadata_is_told_and_put_back(spoil, whole, tmp_path, capsys):
    names = [name for name in texts(whole) if mirror.NAMES.fullmatch(name) and (spoil != "another" or name.count("/") == 1)]
    assert len(names) > 15
    for name in names:
        path = tmp_path / name.replace("/", ".")
        shutil.copytree(whole, path)
        SPOILS[spoil](path / name)
        if texts(path) == texts(whole):  # it is that array, or it has no chunks
            continue
        code = main(["info", str(path)])
        told = "".join(capsys.readouterr())
        assert name in told
        assert (code, "explaind repair puts back what was recorded" in told) in ((2, True), (0, False))
        damaged = code == 2 or "DAMAGED" in told
        assert main(["repair", str(path)]) == 0
        assert (f"{name} put back" in capsys.readouterr().out) == damaged
        assert not damaged or texts(path) == texts(whole)
        assert explaind.open(path).damage() == []


def test_all_of_them_at_once(whole, tmp_path):
    path = shutil.copytree(whole, tmp_path / "run")
    for file in path.rglob("*.json"):
        if file.name != "metadata.json":
            file.unlink()
    with pytest.raises(StoreError, match=r"metadata are damaged.*commit.json, .*zarr.json.*this is not a run.*explaind repair puts back"):
        explaind.open(path)
    assert len(repair(path).restored) > 15
    assert texts(path) == texts(whole)


def test_words_of_ones_own_in_a_sound_run_stay(whole, tmp_path, capsys):
    path = shutil.copytree(whole, tmp_path / "run")
    told = json.loads((path / "zarr.json").read_text())
    told["attributes"]["note"] = "the one of the paper"
    (path / "zarr.json").write_text(json.dumps(told))
    assert (explaind.open(path).damage(), repair(path).restored) == ([], ())
    assert explaind.open(path).attributes["note"] == "the one of the paper"
    assert main(["info", str(path)]) == 0
    assert "CHANGED     zarr.json: not what was recorded" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["../commit.json", "/zarr.json", "../run/zarr.json", "theta/../zarr.json", "theta/c/0/0", "tail.log"])
def test_a_copy_with_names_that_no_run_has_is_none(name, whole, tmp_path):
    path = shutil.copytree(whole, tmp_path / "run")
    told = json.loads((path / "metadata.json").read_text())
    told["files"][name] = "{}"
    (path / "metadata.json").write_text(json.dumps({"files": told["files"], "crc": text_checksum(told["files"])}))
    (path / "commit.json").unlink()
    assert mirror.changed(path) == {}
    with pytest.raises(StoreError, match=r"commit marker is missing.*restore it from a copy"):
        repair(path)


@pytest.mark.parametrize("spoil", ["gone", "cut"])
def test_a_copy_that_is_damaged_is_none(spoil, whole, tmp_path):
    path = shutil.copytree(whole, tmp_path / "run")
    SPOILS[spoil](path / "metadata.json")
    assert (explaind.open(path).damage(), mirror.changed(path)) == ([], {})
    assert repair(path).restored == ()


def test_a_run_that_goes_on_has_no_older_copy(tmp_path):
    loop, copy = Loop(tmp_path / "run"), tmp_path / "run" / "metadata.json"
    loop.record(8)
    first = copy.read_bytes()
    loop = Loop(tmp_path / "run").load(6)
    with explaind.record(loop.optimizer, loop.model, loop.path, data=cases.DATA, resume=True) as recorder:
        while recorder.steps < 10:
            loop.step(recorder)
            assert not copy.exists()
    assert copy.read_bytes() != first
    assert mirror.changed(loop.path) == {}


def test_an_upgraded_run_has_one(tmp_path):
    with zipfile.ZipFile(OLD) as archive:
        archive.extractall(tmp_path / "run")
    upgrade(tmp_path / "run")
    assert (tmp_path / "run" / "metadata.json").exists()
    assert mirror.changed(tmp_path / "run") == {}


@pytest.mark.parametrize("suffix", [".zip", ".h5"])
def test_an_imported_run_has_one(suffix, whole, tmp_path):
    export_run(whole, tmp_path / f"run{suffix}")
    import_run(tmp_path / f"run{suffix}", tmp_path / "run")
    assert (tmp_path / "run" / "metadata.json").exists()
    assert mirror.changed(tmp_path / "run") == {}


def test_a_run_at_a_url_has_one(tmp_path):
    run = cases.recorded(f"memory://{tmp_path.name}/run")
    assert mirror.changed(run.path) == {}
    (run.path / "commit.json").unlink()
    with pytest.raises(StoreError, match="metadata are damaged"):
        explaind.open(run.path)
    assert repair(run.path).restored == ("commit.json",)
    assert explaind.open(run.path).damage() == []
