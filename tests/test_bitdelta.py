"""The codec of a run gives back every bit and refuses bytes that it did not write."""

import subprocess
import sys
import tomllib
import zlib
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as some

from explaind.store import bitdelta, schema
from explaind.store.bitdelta import BitDelta, packed, unpacked
from tests.closeness import same

ROOT = Path(__file__).parents[1]
DTYPES = ("float16", "float32", "float64")
every_dtype = pytest.mark.parametrize("dtype", DTYPES)
LIMITS = settings(max_examples=60, deadline=None, derandomize=True, database=None)


def odd(dtype):
    """Zeros, denormals, the largest numbers, infinities, quiet and signalling NaNs with payloads; each with both signs."""
    info, wide = np.finfo(dtype), 8 * np.dtype(dtype).itemsize
    plain = np.array([0, info.smallest_subnormal, info.tiny, 1, info.max, np.inf], dtype).view(f"u{wide // 8}")
    nans = plain[-1] + np.array([1, 2 ** (info.nmant - 1), 2**info.nmant - 1], plain.dtype)
    positive = np.concatenate([plain, nans])
    return np.concatenate([positive, positive | plain.dtype.type(1 << (wide - 1))]).view(dtype)


def trained(rng, shape, dtype):
    """Like the parameters of a training: smooth paths with a little noise, some that rest, and some odd numbers."""
    noise = 1e-4 * rng.standard_normal(shape)
    values = (rng.standard_normal(shape[1:]) + np.cumsum(np.cumsum(0.1 * noise, axis=0) + noise, axis=0)).astype(dtype)
    if values.size:
        values[..., ::7] = 0
        values.reshape(-1)[rng.integers(0, values.size, min(20, values.size // 3))] = rng.choice(odd(dtype), min(20, values.size // 3))
    return values


def any_bits(rng, shape, dtype):
    size = np.dtype(dtype).itemsize
    return rng.integers(0, 256, (*shape, size), dtype=np.uint8).reshape(-1).view(dtype).reshape(shape)


KINDS = {"trained": trained, "any bits": any_bits, "odd": lambda rng, shape, dtype: rng.choice(odd(dtype), shape)}
shapes = some.tuples(some.integers(0, 20), some.integers(0, 70))


@every_dtype
def test_integers_stand_in_the_order_of_the_floats(dtype):
    ordered = np.sort(odd(dtype)[~np.isnan(odd(dtype))])
    bits = bitdelta.turned(ordered.view(f"i{ordered.itemsize}"))
    assert all(a < b for (a, b), (x, y) in zip(pairwise(bits.tolist()), pairwise(ordered.tolist()), strict=True) if x < y)
    same(bitdelta.turned(bits).view(dtype), ordered)


def differenced(numbers, order):
    """Row k differenced down the rows min(k, order) times."""
    numbers = numbers.copy()
    for k in range(order):
        numbers[k + 1 :] = numbers[k + 1 :] - numbers[k:-1]
    return numbers


@every_dtype
def test_the_steps_of_the_codec_are_undone_one_by_one(dtype):
    rng = np.random.default_rng(0)
    numbers = any_bits(rng, (9, 30), dtype).view(f"i{np.dtype(dtype).itemsize}")
    same(bitdelta.turned(bitdelta.turned(numbers)), numbers)
    same(bitdelta.unfolded(bitdelta.folded(numbers)), numbers)
    for order in range(bitdelta.ORDERS + 1):
        same(bitdelta.summed(differenced(numbers, order), order), numbers, str(order))
    small = np.array([0, -1, 1, -2, 2], numbers.dtype)
    assert bitdelta.folded(small).tolist() == [0, 1, 2, 3, 4]


widths = some.none() | some.integers(1, 40)


@every_dtype
@LIMITS
@given(shape=shapes, kind=some.sampled_from(sorted(KINDS)), seed=some.integers(0, 99), last=some.integers(0, 20), wide=widths)
def test_every_bit_comes_back(dtype, shape, kind, seed, last, wide):
    values = KINDS[kind](np.random.default_rng(seed), shape, dtype)
    values[min(last, len(values)) :] = values[-1:, -1:] if values.size else 0  # rows that were not filled yet
    same(unpacked(packed(values, wide), shape, np.dtype(dtype), wide), values)


@every_dtype
@pytest.mark.parametrize("wide", [None, 1, 7, 300])
def test_many_tiles_come_back(dtype, wide, monkeypatch):
    monkeypatch.setattr(bitdelta, "CELLS", 100)
    for shape in ((7, 45), (1, 301), (301, 1), (250, 3)):
        values = trained(np.random.default_rng(0), shape, dtype)
        text = packed(values, wide)
        same(unpacked(text, shape, np.dtype(dtype), wide), values, str(shape))
        assert len(list(bitdelta.tiles(lambda at, stop, text=text: text[at:stop], len(text), shape, np.dtype(dtype), wide))) == -(
            -shape[1] // (wide or max(1, 100 // shape[0]))
        )


def test_a_matrix_is_read_tile_by_tile_and_once_where_it_is_full():
    values, asked = trained(np.random.default_rng(0), (6, 50), "float32"), list[tuple[int, int]]()

    def read(out, start):
        asked.append((start, out.shape[1]))
        out[:] = values[: len(out), start : start + out.shape[1]]

    def pieces():
        asked.clear()
        return list(bitdelta.Packing(values.shape, values.dtype, read, 20))

    found = pieces()
    assert (asked, len(found)) == ([(0, 20), (20, 20), (40, 10)], 7)
    assert b"".join(text for _, text in sorted(found)) == packed(values, 20)
    values[4:] = 7  # only the last tile tells that one row of these is no filling
    values[4, 45] = 8
    assert b"".join(text for _, text in sorted(pieces())) == packed(values, 20)
    assert asked[:3] == [(0, 20), (20, 20), (40, 10)]
    assert bitdelta.HEAD.unpack_from(packed(values, 20), bitdelta.CRC.size)[0] == 5
    same(unpacked(packed(values, 20), (6, 50), np.dtype("float32"), 20), values)


def test_rows_that_hold_one_pattern_at_the_end_take_no_room():
    values = np.zeros((16, 1000), "float32")
    assert len(packed(values)) == bitdelta.CRC.size + bitdelta.HEAD.size
    values[:3] = trained(np.random.default_rng(0), (3, 1000), "float32")
    for fill in (0, -0.0, np.nan, 7):
        values[3:] = fill
        assert len(packed(values)) == len(packed(values[:4]))


@pytest.mark.parametrize("wide", [None, 40])
@pytest.mark.parametrize("rows", [1, 3, 15])
@pytest.mark.parametrize("fill", [0.0, -0.0, np.nan, 7.0], ids=str)
def test_rows_behind_those_that_are_told_are_packed_as_if_they_were_there(fill, rows, wide):
    whole = np.full((16, 100), fill, "float32")
    whole[:rows] = trained(np.random.default_rng(0), (rows, 100), "float32")
    assert packed(whole[:rows], wide, fill) == packed(whole, wide)
    whole[:rows] = fill
    alone = packed(whole[:rows], wide, fill)
    assert (alone, len(alone)) == (packed(whole, wide), bitdelta.CRC.size + bitdelta.HEAD.size)


def test_a_changed_or_missing_byte_is_refused():
    values = trained(np.random.default_rng(0), (5, 40), "float32")
    text = packed(values)
    for at in range(len(text)):
        for wrong in (text[:at], text[:at] + bytes([text[at] ^ 1]) + text[at + 1 :]):
            with pytest.raises(ValueError, match="damaged or cut off"):
                unpacked(wrong, values.shape, values.dtype)
    for wrong in (b"", text + b"\0"):
        with pytest.raises(ValueError, match="damaged or cut off"):
            unpacked(wrong, values.shape, values.dtype)
    for shape in ((4, 40), (5, 39), (5, 41), (0, 40), (5, 0)):
        with pytest.raises(ValueError, match="damaged or cut off"):
            unpacked(text, shape, values.dtype)


@LIMITS
@given(cut=some.integers(0, 400), changes=some.lists(some.tuples(some.integers(0, 399), some.integers(0, 255)), max_size=4))
def test_damage_under_a_right_checksum_gives_numbers_or_an_error_and_no_crash(cut, changes):
    text = bytearray(packed(trained(np.random.default_rng(0), (5, 40), "float32")))
    body = text[bitdelta.CRC.size :][: len(text) - cut]
    for at, byte in changes:
        body[at % max(1, len(body)) : at % max(1, len(body)) + 1] = bytes([byte])
    forged = bitdelta.CRC.pack(zlib.crc32(body)) + bytes(body)
    with suppress(ValueError):
        assert unpacked(forged, (5, 40), np.dtype("float32")).shape == (5, 40)


def forged_sizes(text):
    """Every place of a tile that says how much memory is wanted, saying: very much."""
    tile = bitdelta.CRC.size + bitdelta.HEAD.size
    _, table, _ = bitdelta.TILE_HEAD.unpack_from(text, tile)
    first = tile + bitdelta.TILE_HEAD.size
    for at in (bitdelta.CRC.size, tile + 1, tile + 5, first + 4, first + 8, first + 12, first + table + 4, first + table + 12):
        body = text[bitdelta.CRC.size : at] + b"\xff\xff\xff\x7f" + text[at + 4 :]
        yield bitdelta.CRC.pack(zlib.crc32(body)) + body


def test_no_memory_is_taken_on_the_word_of_damaged_bytes():
    values = trained(np.random.default_rng(0), (5, 40), "float32")
    for forged in forged_sizes(packed(values)):
        with pytest.raises(ValueError, match="damaged or cut off"):
            unpacked(forged, values.shape, values.dtype)


CHUNKS = (
    ((7, 11), (16, 11)),
    ((33, 11), (16, 5)),
    ((1, 9), (1, 4)),
    ((40, 1), (16, 1)),
    ((6, 3, 5), (4, 2, 5)),
    ((5,), (3,)),
    ((), ()),
    ((0, 4), (3, 4)),
)


@every_dtype
@pytest.mark.parametrize("codec", sorted(schema.CODECS))
@pytest.mark.parametrize(("shape", "chunks"), CHUNKS)
def test_an_array_with_the_codec_comes_back_from_disk(shape, chunks, codec, dtype, tmp_path):
    rng = np.random.default_rng(len(shape))
    for kind, make in KINDS.items():
        values = make(rng, shape, dtype) if shape else odd(dtype)[-2].reshape(())
        how = {"shape": shape, "chunks": chunks, "dtype": dtype, "fill_value": 1 if kind == "odd" else 0}
        array = zarr.create_array(tmp_path / f"{kind}.zarr", **how, **schema.CODECS[codec])
        array[...] = values
        same(zarr.open_array(tmp_path / f"{kind}.zarr", mode="r")[...], values, kind)


@pytest.mark.parametrize("codec", sorted(schema.CODECS))
def test_rows_and_columns_that_were_never_written_are_filled(codec, tmp_path):
    column = schema.Column("theta", ("state", "param"), "float32", (7,), fill=-1, chunk=5, codec=codec)
    array = schema.create_column(zarr.create_group(tmp_path / "group"), column, 4)
    values = trained(np.random.default_rng(0), (6, 7), "float32")
    array.resize((9, 7))
    array[1:6, 2:4] = values[1:6, 2:4]
    want = np.full((9, 7), -1, "float32")
    want[1:6, 2:4] = values[1:6, 2:4]
    same(zarr.open_array(tmp_path / "group" / "theta", mode="r")[...], want)


def test_only_floats_are_taken(tmp_path):
    with pytest.raises(TypeError, match="for floats of 16, 32 and 64 bits, not for int32"):
        zarr.create_array(tmp_path / "array", shape=(3,), dtype="int32", serializer=BitDelta(), compressors=None)
    for wrong in ({"order": 2}, {"columns": 0}, {"columns": 1 << 40}, {"columns": True}, {"columns": "9"}, {"columns": 9, "order": 2}, [9]):
        with pytest.raises(ValueError, match="holds a number of columns up to 262144, or nothing; got"):
            BitDelta.from_dict({"name": bitdelta.NAME, "configuration": wrong})
    for right in (BitDelta(), BitDelta(9)):
        assert BitDelta.from_dict(right.to_dict()) == right
    assert BitDelta().to_dict() == {"name": bitdelta.NAME}, "as older runs have it"


def test_zarr_finds_the_codec_by_the_entry_point(tmp_path):
    entries = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["zarr.codecs"]
    assert entries == {bitdelta.NAME: f"{BitDelta.__module__}:{BitDelta.__qualname__}"}
    folder = tmp_path / "installed" / "told-1.dist-info"  # what an installation of the package tells Python
    folder.mkdir(parents=True)
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: told\nVersion: 1\n")
    (folder / "entry_points.txt").write_text("[zarr.codecs]\n" + "".join(f"{name} = {place}\n" for name, place in entries.items()))
    values = trained(np.random.default_rng(0), (5, 40), "float32")
    array = zarr.create_array(tmp_path / "array", shape=(5, 40), dtype="float32", **schema.CODECS["bitdelta"])
    array[...] = values
    read = f"print(zarr.open_array({str(tmp_path / 'array')!r})[...].tobytes().hex())"
    code = f"import sys; sys.path.append({str(folder.parent)!r}); import zarr; {read}"
    found = subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert found.strip() == values.tobytes().hex()


@pytest.mark.parametrize(("rows", "wide"), [(7, 2001), (49, 301)])
def test_a_count_that_is_no_multiple_of_eight_is_packed_as_well_and_chunks_without_its_zeros_are_read(rows, wide, monkeypatch):
    assert rows * wide < bitdelta.BLOCK, "of several blocks of blosc's only the last would be left as it is"
    values = trained(np.random.default_rng(0), (rows, wide), "float32")
    whole, odd = (len(packed(values[:, :columns])) / columns for columns in (wide - 1, wide))
    assert odd < 1.02 * whole
    monkeypatch.setattr(bitdelta, "EIGHT", 1)
    before = packed(values)
    monkeypatch.undo()
    assert len(before) > 1.2 * len(packed(values)), "blosc left the bits as they were"
    same(unpacked(before, values.shape, values.dtype), values)
