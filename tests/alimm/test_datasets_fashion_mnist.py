"""FashionMNIST on idx files that the test writes, and its prepare script."""

from __future__ import annotations

import gzip
import struct
import subprocess
import sys

import numpy as np
import pytest

from alimm.datasets import FashionMNIST, PackInputs
from alimm.datasets.fashion_mnist import CLASSES, FILES, read_idx
from alimm.datasets.fetch import DebianPackage, sha256_of
from alimm.datasets.prepare_fashion_mnist import PACKAGE, main, prepare
from alimm.paths import data_root, resource_root

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 28, 28), np.uint8)
LABELS = np.array([9, 0, 0, 3, 9, 9], np.uint8)


def idx(array):
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def write(folder, split="train", pixels=PIXELS, labels=LABELS):
    folder.mkdir(exist_ok=True)
    for name, array in zip(FILES[split], (pixels, labels), strict=True):
        (folder / name).write_bytes(gzip.compress(idx(array)))
    return folder


@pytest.mark.parametrize("channels", [1, 3])
def test_items(tmp_path, channels):
    dataset = FashionMNIST(data_root=write(tmp_path), channels=channels, pipeline=[PackInputs()])
    assert len(dataset) == 6
    assert dataset.metainfo["classes"] == CLASSES
    assert dataset.metainfo["class_counts"] == [2, 0, 0, 1, 0, 0, 0, 0, 0, 3]
    item = dataset.get_data_info(4)
    assert item["img"].shape == (28, 28, channels)
    assert all(np.array_equal(item["img"][..., channel], PIXELS[4]) for channel in range(channels))
    assert (item["gt_label"], item["gt_identity"], item["sample_id"]) == (9, 4, "train/000004")
    assert dataset.get_cat_ids(3) == [3]
    packed = dataset[5]
    assert packed["inputs"].shape == (channels, 28, 28)
    packed["inputs"].zero_()
    assert np.array_equal(dataset.get_data_info(5)["img"][..., 0], PIXELS[5])


def test_missing_data_gives_the_exact_command(tmp_path, monkeypatch):
    monkeypatch.setenv("ALIMM_DATA", str(tmp_path))
    script = resource_root() / "tools" / "data" / "prepare_fashion_mnist.py"
    with pytest.raises(FileNotFoundError) as info:
        FashionMNIST(split="test")
    assert str(info.value).endswith(f"with: python {script}")
    with pytest.raises(FileNotFoundError, match=r"--out '.*/my data'"):
        FashionMNIST(data_root=tmp_path / "my data")
    assert "--from" in subprocess.run([sys.executable, script, "--help"], capture_output=True, text=True).stdout


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"text", "not a whole gzip file"),
        (gzip.compress(idx(PIXELS))[:-20], "not a whole gzip file"),
        (
            gzip.compress(idx(LABELS)),
            "not an idx file of 3 dimensions: expected the first bytes 00000803, got 00000801",
        ),
        (gzip.compress(b""), "got nothing"),
        (gzip.compress(idx(PIXELS)[:-1]), "6 x 28 x 28, 4720 bytes in all, it has 4719"),
        (gzip.compress(idx(PIXELS) + b"x"), "it has 4721"),
        (gzip.compress(bytes([0, 0, 8, 3, 0])), "not an idx file"),
    ],
    ids=[
        "text",
        "cut",
        "labels",
        "empty",
        "short",
        "long",
        "header",
    ],  # bytes of gzip hold the time: no two workers agree
)
def test_damaged_files_are_named(tmp_path, content, message):
    path = write(tmp_path) / FILES["train"][0]
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"train-images-idx3-ubyte.gz .*{message}"):
        FashionMNIST(data_root=tmp_path)


def test_files_that_do_not_fit(tmp_path):
    with pytest.raises(ValueError, match=r"6 pictures and .* 5 labels"):
        FashionMNIST(data_root=write(tmp_path, labels=LABELS[:5]))
    with pytest.raises(ValueError, match="label 1 is 10, expected 0 to 9"):
        FashionMNIST(data_root=write(tmp_path, labels=np.array([0, 10, 0, 0, 0, 0], np.uint8)))
    with pytest.raises(ValueError, match="split must be train or test, got 'val'"):
        FashionMNIST(split="val")
    with pytest.raises(ValueError, match="channels must be 1 or 3, got 4"):
        FashionMNIST(channels=4)


@pytest.fixture
def toy(tmp_path):
    """A folder with four small files, and the package that promises them."""
    source = write(write(tmp_path / "source"), "test", PIXELS[:2], LABELS[:2])
    files = {f"usr/share/{path.name}": sha256_of(path.read_bytes()) for path in source.iterdir()}
    return source, DebianPackage("toy", "1", "0" * 64, files)


def test_prepare(tmp_path, toy):
    source, package = toy
    assert prepare(tmp_path / "out", source, package) == {"train": 6, "test": 2}
    assert "MIT License" in (tmp_path / "out" / "README.md").read_text()
    assert len(FashionMNIST(data_root=tmp_path / "out", split="test")) == 2


def test_prepare_leaves_nothing_after_a_failure(tmp_path, toy, capsys):
    source, package = toy
    images = source / FILES["train"][0]
    images.write_bytes(gzip.compress(idx(PIXELS)[:-1]))
    files = {**package.files, f"usr/share/{images.name}": sha256_of(images.read_bytes())}
    with pytest.raises(ValueError, match="damaged"):
        prepare(tmp_path / "out", source, DebianPackage("toy", "1", "0" * 64, files))
    assert not list(tmp_path.glob("*out*"))
    assert main(["--out", str(tmp_path / "out"), "--from", str(source)]) == 1
    assert "expected sha256" in capsys.readouterr().err
    assert not list(tmp_path.glob("*out*"))


def test_real_data():
    """Where Fashion-MNIST has been prepared: all of it, as its makers count it."""
    folder = data_root() / "fashion_mnist"
    if not folder.is_dir():
        pytest.skip("python tools/data/prepare_fashion_mnist.py fetches the data")
    for name, digest in PACKAGE.files.items():
        assert sha256_of((folder / name.rpartition("/")[2]).read_bytes()) == digest
    assert FashionMNIST().metainfo["class_counts"] == [6000] * 10
    assert FashionMNIST("test").metainfo["class_counts"] == [1000] * 10
    assert read_idx(folder / FILES["test"][0], 3).shape == (10000, 28, 28)
