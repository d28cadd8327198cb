"""Pairs of classes of images, read from small files of the real formats."""

import gzip
import struct
import zipfile

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torch.utils.data import default_collate

import explaind
from explaind.analysis.surgery import Bench
from explaind.cli import main
from explaind.config import read
from explaind.errors import ConfigError
from explaind.kernel.groups import grouping
from explaind.ledger.by_name import decompose_by_name
from explaind.tasks import Pairs, load, pairs
from explaind.tasks.training import train
from tests.closeness import algebra, rounding, same
from tests.test_config import CONFIGS

NAMES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
GENERATOR = np.random.default_rng(0)
TRAIN, VAL = (GENERATOR.integers(0, 256, (count, 9, 8), dtype=np.uint8) for count in (30, 12))
LABELS = {"train": np.arange(30, dtype=np.uint8) % 3, "val": np.arange(12, dtype=np.uint8) % 3}
OPTIONS = {"classes": (2, 0), "network": "mlp", "widths": (4,)}


def written(path, array):
    """An IDX file of bytes, gzipped."""
    with gzip.open(path, "wb") as file:
        file.write(struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes())


@pytest.fixture
def folder(tmp_path):
    for name, array in zip(NAMES, (TRAIN, LABELS["train"], VAL, LABELS["val"]), strict=True):
        written(tmp_path / f"{name}.gz", array)
    return tmp_path


def archive(path, train=TRAIN, val=VAL):
    np.savez(path, x_train=train, y_train=LABELS["train"], x_val=val, y_val=LABELS["val"])
    return str(path)


def standardised(images, train):
    """Float64 [image, 1, row, column], by hand."""
    images, train = (x[:, None].astype(np.float64) / 255 for x in (images, train))
    return (images - train.mean()) / train.std()


@pytest.mark.parametrize("stored", ["idx", "npz"])
def test_every_image_of_the_classes_is_there_once_with_its_label(stored, folder):
    task = Pairs(source=str(folder) if stored == "idx" else archive(folder / "data.npz"), **OPTIONS)
    chosen = np.isin(LABELS["train"], (2, 0))
    for split, images in (("train", TRAIN), ("val", VAL)):
        got, labels = task.data(split).tensors
        assert (got.dtype, labels.dtype) == (torch.float32, torch.int64)
        for label, cls in enumerate(task.classes):
            want = standardised(images[LABELS[split] == cls], TRAIN[chosen]).reshape(-1, 72)
            mine = got[labels == label].reshape(-1, 72).double().numpy()
            assert mine.shape == want.shape
            rounding(mine[np.lexsort(mine.T)], want[np.lexsort(want.T)])


def test_the_training_images_have_mean_zero_and_deviation_one_in_every_channel(tmp_path):
    colour = np.random.default_rng(1).integers(0, 256, (30, 8, 8, 3)).astype(np.uint8) // np.array([1, 2, 4], dtype=np.uint8)
    colour[..., 2] = 7  # the same everywhere
    task = Pairs(source=archive(tmp_path / "colour.npz", colour, colour[:12]), **OPTIONS)
    images = task.data("train").tensors[0].double()
    assert images.shape == (20, 3, 8, 8)
    rounding(images.mean((0, 2, 3)), np.zeros(3), scale=1.0)
    rounding(images.std((0, 2, 3), correction=0), [1, 1, 0])


@pytest.mark.parametrize("shape", [(30, 8, 8), (30, 1, 8, 8), (30, 8, 8, 1), (30, 3, 8, 8), (30, 8, 8, 3)])
def test_axes_of_stored_images(shape):
    images = np.random.default_rng(2).random(shape)
    found = pairs.pictures(images, "x").double().numpy()
    with_channels = images[:, None] if len(shape) == 3 else images
    want = with_channels if shape[1:2] in ((1,), (3,)) or len(shape) == 3 else np.moveaxis(images, 3, 1)
    same(found, want.astype(np.float32).astype(np.float64))


def test_floats_stay_as_they_are_and_bytes_become_shares():
    whole = np.array([[[0, 255], [51, 102]]], dtype=np.uint8)
    same(pairs.pictures(whole, "x").numpy(), np.array([[[[0, 1], [0.2, 0.4]]]], dtype=np.float32))
    same(pairs.pictures(whole.astype(np.float32), "x").numpy(), whole[:, None].astype(np.float32))


def test_options_choose_examples(folder):
    task = Pairs(source=str(folder), train_examples=7, val_examples=3, **OPTIONS)
    again, other = (Pairs(source=str(folder), train_examples=7, split_seed=seed, **OPTIONS) for seed in (0, 1))
    assert (len(task.data("train")), len(task.data("val"))) == (7, 3)
    assert torch.equal(task.data("train").tensors[0], again.data("train").tensors[0])
    assert not torch.equal(task.data("train").tensors[0], other.data("train").tensors[0])
    assert torch.equal(task.data("val").tensors[1], again.data("val").tensors[1][:3])


@pytest.mark.parametrize(("network", "widths"), [("resnet9", (2, 3, 4, 5)), ("cnn", (2, 3)), ("mlp", (4, 5))])
def test_the_task_fits_together(network, widths, folder):
    task = Pairs(source=str(folder), classes=(2, 0), network=network, widths=widths)
    model, batch = task.model(), default_collate([task.data("val")[i] for i in range(5)])
    logits = model(batch[0])
    assert logits.shape == (5, len(task.outputs()))
    assert torch.equal(task.measures()["logits"](model, batch), logits)
    assert torch.equal(task.predict(model, batch), logits.argmax(1))
    torch.testing.assert_close(task.losses(model, batch), F.cross_entropy(logits, batch[1], reduction="none"))
    names = [name for name, _ in model.named_parameters()]
    groups = grouping("layer", task.layer_groups(), names)
    assert groups.names[-1] == "output"
    assert names[-2:] == ["output.weight", "output.bias"]
    assert "rest" not in groups.names
    with pytest.raises(ConfigError, match="unknown split"):
        task.data("test")


def test_resnet9_is_eight_convolutions_and_a_linear_map_of_the_published_size(folder):
    model = Pairs(source=str(folder), classes=(2, 0)).model()
    shapes = [tuple(p.shape) for p in model.parameters() if p.ndim > 1]
    wide = [(64, 1), (128, 64), (128, 128), (128, 128), (256, 128), (512, 256), (512, 512), (512, 512)]
    assert shapes == [(*shape, 3, 3) for shape in wide] + [(2, 512)]


def test_a_residual_block_adds_to_its_input():
    block, x = pairs.Residual(2, "tanh").double(), torch.randn(1, 2, 4, 4, dtype=torch.float64)
    first, second = (part[0] for part in (block.first, block.second))
    with torch.no_grad():
        algebra(block(x), x + second(first(x).tanh()).tanh())


def test_a_prediction_for_a_pair_is_the_sum_of_its_ledger(folder, tmp_path):
    asked = [
        f"--task.source={folder}", "--task.classes=[2, 0]", "--task.widths=[2, 2, 3, 3]", "--task.activation=gelu", "--train.steps=3",
        "--train.batch=5", "--train.warmup=0", "--decompose.queries=val:0:2", "--decompose.windows=1", "--decompose.dtype=float64",
    ]  # fmt: skip
    config = read(next(path for path in CONFIGS if path.stem == "pairs"), asked)
    task = load(config.task.name, config.task.options)
    train(task, config, tmp_path / "run")
    run = explaind.open(tmp_path / "run")
    ledger = decompose_by_name(run, config.decompose)
    assert ledger.verify().ok
    log_probability = task.measures()["target_log_probability"]
    model = Bench(run).put(run.theta(3)).double()
    images, labels = default_collate([task.data("val")[i] for i in range(2)])
    with torch.no_grad():
        algebra(sum(ledger.total(row) for row in ledger.rows), log_probability(model, (images.double(), labels)))


def test_names_of_classes(folder):
    assert Pairs().outputs() == ("T-shirt", "shirt")
    task = Pairs(source=str(folder), **OPTIONS)
    assert task.outputs() == ("class 2", "class 0")
    assert [task.describe("val", i) for i in range(8)] == [f"class {task.classes[int(label)]}" for label in task.data("val").tensors[1]]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"network": "resnet"}, "resnet9 | cnn | mlp"),
        ({"activation": "sin"}, "relu | gelu | tanh"),
        ({"train_examples": 0}, "at least 1"),
        ({"classes": (6,)}, "expected two different"),
        ({"classes": (6, 6)}, "expected two different"),
        ({"widths": (8, 8)}, "expected 4 widths"),
        ({"widths": (0,), "network": "mlp"}, "any number of widths of at least 1"),
    ],
)
def test_options_that_make_no_sense(options, words):
    with pytest.raises(ConfigError) as caught:
        Pairs(**options)
    assert words in str(caught.value)


def test_data_that_is_not_installed_is_refused_in_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(pairs, "FASHION", tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="apt-get install dataset-fashion-mnist"):
        Pairs().data("train")
    config = str(next(path for path in CONFIGS if path.stem == "pairs"))
    assert main(["record", config, "--out", str(tmp_path / "run")]) == 2
    said = capsys.readouterr()
    assert said.err.count("\n") == 1
    assert "apt-get install" in said.err


def damaged(folder, name, content):
    (folder / f"{name}.gz").write_bytes(content)
    return str(folder)


def claiming(path, shape):
    """Another shape of the training images, in the metadata alone."""
    with zipfile.ZipFile(path, "w") as file, file.open("x_train.npy", "w") as entry:
        np.lib.format.write_array_header_1_0(entry, {"descr": "|u1", "fortran_order": False, "shape": shape})
    return str(path)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda f: str(f / "none.npz"), "cannot be read"),
        (lambda f: damaged(f, NAMES[0], b"no gzip"), "cannot be read"),
        (lambda f: damaged(f, NAMES[0], gzip.compress(TRAIN.tobytes())[:-20]), "damaged"),
        (lambda f: damaged(f, NAMES[0], gzip.compress(b"\x00\x00\x0d\x01\x00\x00\x00\x00")), "no IDX file of bytes"),
        (lambda f: damaged(f, NAMES[0], gzip.compress(struct.pack(">BBBB3I", 0, 0, 8, 3, 30, 9, 8) + b"few")), "damaged"),
        (lambda f: damaged(f, NAMES[0], gzip.compress(struct.pack(">BBBB3I", 0, 0, 8, 3, 30, 9, 8)[:9])), "damaged"),
        (lambda f: damaged(f, NAMES[1], gzip.compress(b"\x00\x00\x08\x01\x00\x00\x00\x02\x00\x01")), "30 images, 2 labels"),
        (
            lambda f: damaged(f, NAMES[0], gzip.compress(struct.pack(">BBBB3I", 0, 0, 8, 3, *3 * [2**31]) + b"few")),
            f"{2**93} bytes, of at most",
        ),
        (lambda f: damaged(f, NAMES[0], gzip.compress(struct.pack(">BBBB1I", 0, 0, 8, 1, 3) + bytes(1 << 20))), "longer than it says"),
        (lambda f: claiming(f / "data.npz", (2**50,)), f"{2**50} bytes, of at most"),
        (lambda f: archive(f / "data.npz", train=np.zeros((30, 9, 8), dtype=np.int64)), "these are no images"),
        (lambda f: archive(f / "data.npz", train=np.zeros((30, 72), dtype=np.uint8)), "these are no images"),
    ],
)
def test_files_that_are_missing_or_damaged(make, words, folder):
    with pytest.raises(ConfigError) as caught:
        Pairs(source=make(folder), **OPTIONS).data("train")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_archive_without_its_arrays_is_refused(tmp_path):
    np.savez(tmp_path / "other.npz", images=TRAIN)
    with pytest.raises(ConfigError, match="x_train"):
        Pairs(source=str(tmp_path / "other.npz")).data("train")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"classes": (0, 7)}, "expected class 7; got classes [0, 1, 2]"),
        ({"train_examples": 21}, "at most 20 examples of train"),
        ({"val_examples": 9}, "at most 8 examples of val"),
    ],
)
def test_more_than_the_source_has(options, words, folder):
    with pytest.raises(ConfigError) as caught:
        Pairs(source=str(folder), **{**OPTIONS, **options}).data("train")
    assert words in str(caught.value)


def test_images_that_are_too_small_for_the_pools(tmp_path):
    source = archive(tmp_path / "small.npz", TRAIN[:, :7, :7], VAL[:, :7, :7])
    with pytest.raises(ConfigError, match="at least 8 pixels a side"):
        Pairs(source=source, classes=(2, 0)).model()
