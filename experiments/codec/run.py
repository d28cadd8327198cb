"""How large is the record of a training, and how fast is it written and read, with either codec?

python experiments/codec/run.py [--out runs/codec]

Three configurations are recorded. Their parameters and second moments are then written and read again with the codecs of
explaind and with what zarr takes by default, in memory, sixteen steps a chunk.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import zarr
from zarr.storage import MemoryStore

import explaind
from explaind.config import read
from explaind.store import schema
from explaind.tasks import load
from explaind.tasks.training import train

CONFIGS = Path(__file__).parents[2] / "configs"
RUNS = {
    "quickstart": ("quickstart", []),
    "digits": ("digits", []),
    "digits, 2048 wide": ("digits", ["--task.hidden", "2048", "--train.steps", "96", "--optimizer.lr", "1e-3"]),
    "mod53": ("mod53", ["--train.steps", "400"]),
}
CODECS = {**schema.CODECS, "zarr's default": {}}
ARRAYS = ("theta", "preconditioner")
ROWS = 96
"""Of an array, that the clock is held on."""


def measured(values: np.ndarray, codec: str, repeats: int = 5) -> dict[str, float]:
    """Bytes a number, and MB/s of writing and reading whole chunks through zarr."""
    chunks = (16, values.shape[1])
    array = zarr.create_array(MemoryStore(), shape=values.shape, chunks=chunks, dtype=values.dtype, fill_value=0, **CODECS[codec])
    array[...] = values
    size = array.nbytes_stored() / values.size
    some = np.ascontiguousarray(values[:ROWS])

    def write() -> None:
        array[: len(some)] = some

    if array[...].tobytes() != values.tobytes():
        raise AssertionError(f"{codec} is not lossless")
    speed = {"write": some.nbytes / fastest(write, repeats) / 1e6, "read": some.nbytes / fastest(lambda: array[: len(some)], repeats) / 1e6}
    return {"bytes": size, **speed}


def fastest(work: Callable[[], object], repeats: int) -> float:
    """Seconds."""
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        work()
        times.append(time.perf_counter() - begin)
    return min(times)


def study(name: str, folder: Path, overrides: tuple[str, ...] = ()) -> dict[str, dict[str, dict[str, float]]]:
    """Figures of one recording, by array and codec."""
    config, own = RUNS[name]
    settings = read(CONFIGS / f"{config}.toml", [*own, *overrides])
    train(load(settings.task.name, settings.task.options), settings, folder, overwrite=True)
    group = zarr.open_group(explaind.open(folder).path, mode="r")
    return {array: {codec: measured(np.asarray(group[array][...]), codec) for codec in CODECS} for array in ARRAYS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/codec"))
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    found = {name: study(name, out / name.replace(", ", "-").replace(" ", "-")) for name in RUNS}
    (out / "codec.json").write_text(json.dumps(found, indent=1))
    for name, arrays in found.items():
        for array, codecs in arrays.items():
            for codec, f in codecs.items():
                print(f"{name:18} {array:15} {codec:15} {f['bytes']:.2f} bytes  {f['write']:5.0f} MB/s written  {f['read']:5.0f} MB/s read")


if __name__ == "__main__":
    main()
