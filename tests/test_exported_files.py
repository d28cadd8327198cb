"""What was exported is read by others: zarr, xarray and h5py, with nothing of ours installed; a zip by ``explaind.open`` too."""

import json
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import zarr

import explaind
from explaind.cli import main
from explaind.errors import StoreError
from explaind.store.exporting import export_run
from tests import cases
from tests.closeness import same
from tests.test_exporting import with_ledgers

h5py = pytest.importorskip("h5py", reason="HDF5 needs h5py")


def test_a_zip_is_opened_as_it_is(tmp_path, capsys):
    run = cases.recorded(tmp_path / "run", cases.problem_named("frozen parameter"), cases.optimizer_named("adamw"), data=cases.DATA)
    export_run(run.path, tmp_path / "out.zip")
    zipped = explaind.open(tmp_path / "out.zip")
    assert (zipped.manifest, zipped.steps, zipped.complete, zipped.damage()) == (run.manifest, 7, True, [])
    assert zipped.identity == run.identity
    assert zipped.constants.keys() == run.constants.keys()
    problem = cases.problem_named("frozen parameter")
    same(*(cases.decomposed(r, problem)["data"] for r in (run, zipped)))
    assert main(["info", str(tmp_path / "out.zip")]) == 0
    with zarr.storage.ZipStore(tmp_path / "out.zip", mode="r") as store:
        same(zarr.open_group(store, mode="r")["theta"][...], run.states(0, 8))
    with pytest.raises(StoreError, match="this run is in a file already"):
        export_run(tmp_path / "out.zip", tmp_path / "out.h5")
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as archive:
        archive.writestr("a", "b")
    with pytest.raises(StoreError, match="not a run"):
        explaind.open(tmp_path / "other.zip")


def test_an_hdf5_file_is_read_by_h5py_alone(tmp_path):
    run = cases.recorded(tmp_path / "run", case=cases.optimizer_named("adamw"), data=cases.DATA)
    export_run(run.path, tmp_path / "out.h5")
    with h5py.File(tmp_path / "out.h5") as file:
        theta = file["theta"]
        same(theta[...], run.states(0, 8))
        assert [dim.label for dim in theta.dims] == ["state", "param"]
        assert (theta.compression, theta.shuffle, theta.fletcher32) == ("gzip", True, True)
        assert json.loads(bytes(file["commit.json"][...]))["steps"] == 7
        assert json.loads(bytes(file["attributes.json"][...]))["manifest"]["layers"][0]["name"] == "0.weight"


READ = """
import sys, warnings
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "explaind":
            raise ImportError("explaind is not installed")
sys.meta_path.insert(0, Absent())
import xarray, zarr
warnings.filterwarnings("ignore", message=r"Object at (commit|metadata|ledgers)")  # zarr remarks on any file that is not its own
path, zipped = sys.argv[1:]
place = zarr.storage.ZipStore(path, mode="r") if zipped == "zip" else path
tree = xarray.open_datatree(place, engine="zarr", consolidated=False)
flat = xarray.open_zarr(place, consolidated=False)
ledger = xarray.open_zarr(place, group="ledgers/by step", consolidated=False)
for found in (tree, flat):
    assert found["theta"].dims == ("state", "param"), found
    assert found["hyper"].dims == ("step", "layer", "option"), found
    assert dict(found.sizes)["state"] == 8
assert tree.attrs["manifest"]["block"] == 16
assert ledger["data"].dims == ("query", "output", "example", "layer", "step")
assert "explaind" not in sys.modules
print(*flat["theta"].values[-1].tolist())
"""


@pytest.mark.parametrize("place", ["folder", "zip"])
def test_xarray_reads_named_dims_with_nothing_of_ours(place, tmp_path):
    pytest.importorskip("xarray", reason="xarray is not installed")
    run = with_ledgers(tmp_path / "run")
    export_run(run.path, tmp_path / "out.zip")
    path = run.path if place == "folder" else tmp_path / "out.zip"
    told = subprocess.run([sys.executable, "-c", READ, str(path), place], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert told.returncode == 0, told.stderr
    same(np.array([float(word) for word in told.stdout.split()]), run.states(7, 8)[0])
