"""Transforms against slow loops and exact small cases."""

from __future__ import annotations

import pickle
import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mmengine.dataset import Compose
from PIL import Image

from alimm.datasets import (
    CenterCrop,
    ColorJitter,
    LoadImage,
    PackInputs,
    Pad,
    RandomAffine,
    RandomErasing,
    RandomFlip,
    RandomGrayscale,
    RandomResizedCrop,
    Resize,
)
from alimm.datasets.loading import composite, read_picture, to_rgb
from alimm.datasets.photometry import luma
from alimm.registry import TRANSFORMS

ALL = [
    LoadImage(),
    Resize((5, 7)),
    Resize(6, edge="short"),
    CenterCrop((3, 4)),
    Pad((9, 11), fill=(1, 2, 3)),
    RandomResizedCrop(6),
    RandomFlip(),
    RandomAffine(shear=20),
    ColorJitter(),
    RandomGrayscale(0.5),
    RandomErasing(1.0),
    PackInputs(["vendor"]),
]


def picture(height=8, width=10, channels=3, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), np.uint8)


def names(transform):
    return type(transform).__name__


@pytest.mark.parametrize("transform", ALL, ids=names)
def test_is_registered_picklable_and_shows_its_arguments(transform):
    again = eval(repr(transform))
    assert repr(pickle.loads(pickle.dumps(transform))) == repr(again) == repr(transform)
    assert TRANSFORMS.get(f"alimm.{names(transform)}") is type(transform)


@pytest.mark.parametrize("transform", ALL, ids=names)
def test_same_seed_same_result_and_input_unchanged(transform):
    img = picture()
    before = img.copy()
    outputs = []
    for _ in range(2):
        random.seed(3)
        out = transform({"img": img, "sample_id": "a"})
        outputs.append(out["inputs"].numpy() if "inputs" in out else out["img"])
    assert np.array_equal(*outputs)
    assert np.array_equal(img, before)


@pytest.mark.parametrize("transform", ALL[1:-1], ids=names)
@pytest.mark.parametrize(
    ("shape", "channels"), [((8, 10), 3), ((8, 10, 1), 1), ((8, 10, 3), 3), ((8, 10, 4), 3)], ids=str
)
def test_grey_and_transparent_pictures(transform, shape, channels):
    img = np.random.default_rng(1).integers(0, 256, shape, np.uint8)
    out = transform({"img": img})
    assert out["img"].dtype == np.uint8
    assert out["img"].shape[2] == channels
    assert out["img_shape"] == out["img"].shape[:2]


@pytest.mark.parametrize("transform", [*ALL[1:-1], PackInputs()], ids=names)
def test_without_picture_says_what_to_do(transform):
    with pytest.raises(ValueError, match="LoadImage"):
        transform({"img_path": "x.png"})


@pytest.mark.parametrize(
    "img", [picture().astype(np.float32), np.zeros((2, 3, 5), np.uint8), np.zeros((0, 3, 3), np.uint8), "x.png"]
)
def test_what_is_no_picture_is_refused(img):
    with pytest.raises(ValueError, match="a picture must"):
        Resize(4)({"img": img})


@given(st.integers(0, 255), st.integers(0, 255), st.integers(0, 255))
def test_composite_is_the_rounded_mixture(value, alpha, background):
    pixel = np.array([[[value, 0, 255, alpha]]], np.uint8)
    expected = int((value * alpha + background * (255 - alpha)) / 255 + 0.5)
    assert composite(pixel, (background, 0, 0))[0, 0, 0] == expected


# -- LoadImage ------------------------------------------------------------------------------------------------------


def rgba_file(path):
    Image.fromarray(np.array([[[10, 20, 30, 0], [10, 20, 30, 255]]], np.uint8), "RGBA").save(path)
    return [[(9, 8, 7), (10, 20, 30)]]


def palette_file(path):
    img = Image.new("P", (2, 1))
    img.putpalette([10, 20, 30, 40, 50, 60])
    img.putdata([0, 1])
    img.save(path, transparency=0)
    return [[(9, 8, 7), (40, 50, 60)]]


def grey_file(path):
    Image.fromarray(np.array([[0, 77]], np.uint8)).save(path)
    return [[(0, 0, 0), (77, 77, 77)]]


def deep_file(path):
    Image.fromarray(np.array([[256, 65535]], np.uint16)).save(path)
    return [[(1, 1, 1), (255, 255, 255)]]


def turned_file(path):
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    Image.fromarray(np.array([[[1, 2, 3], [4, 5, 6]]], np.uint8)).save(path, exif=exif)
    return [[(4, 5, 6), (1, 2, 3)]]


@pytest.mark.parametrize("make", [rgba_file, palette_file, grey_file, deep_file, turned_file])
def test_load_brings_every_kind_to_rgb(make, tmp_path):
    path = tmp_path / "sp ace \u6f22.png"
    expected = make(path)
    out = LoadImage(background=(9, 8, 7))({"img_path": str(path)})
    assert np.array_equal(out["img"], np.array(expected, np.uint8))
    assert out["ori_shape"] == out["img_shape"] == (1, 2)


def test_load_cmyk_jpeg(tmp_path):
    Image.new("CMYK", (4, 4), (0, 255, 255, 0)).save(tmp_path / "a.jpg")
    red = read_picture(tmp_path / "a.jpg")
    assert red.shape == (4, 4, 3)
    assert red[..., 0].min() > 200
    assert red[..., 1:].max() < 60


@pytest.mark.parametrize("kind", ["cut jpeg", "cut png", "text", "empty", "missing", "folder"])
def test_load_names_file_and_line(kind, tmp_path):
    path = tmp_path / ("a.png" if kind == "cut png" else "a.jpg")
    if kind.startswith("cut"):
        Image.fromarray(picture(64, 64)).save(path)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif kind == "text":
        path.write_text("not a picture")
    elif kind == "empty":
        path.touch()
    elif kind == "folder":
        path.mkdir()
    with pytest.raises(ValueError, match=r"a\.(jpg|png).*list\.txt:7"):
        LoadImage()({"img_path": str(path), "ann_place": "list.txt:7"})


def test_load_keeps_a_picture_that_is_there():
    assert LoadImage()({"img": np.full((2, 3), 5, np.uint8)})["img"].shape == (2, 3, 3)
    with pytest.raises(ValueError, match="img_path or img"):
        LoadImage()({"sample_id": 1})


def test_to_rgb_repeats_grey():
    assert np.array_equal(to_rgb(np.array([[1, 2]], np.uint8)), [[[1, 1, 1], [2, 2, 2]]])


# -- geometry -------------------------------------------------------------------------------------------------------


def test_resize_averages_areas():
    img = picture(4, 6)
    expected = img.reshape(2, 2, 3, 2, 3).astype(float).mean(axis=(1, 3))
    assert np.abs(Resize((2, 3)).apply(img).astype(float) - expected).max() <= 0.5


@pytest.mark.parametrize(
    ("shape", "edge", "expected"),
    [((10, 20), "short", (6, 12)), ((20, 10), "short", (12, 6)), ((10, 20), "long", (3, 6)), ((1, 99), "long", (1, 6))],
)
def test_resize_edge(shape, edge, expected):
    assert Resize(6, edge=edge).apply(picture(*shape)).shape[:2] == expected


def test_center_crop_and_pad_undo_each_other():
    img = picture(5, 6)
    padded = Pad((9, 11), fill=(1, 2, 3)).apply(img)
    assert padded.shape == (9, 11, 3)
    assert np.array_equal(padded[2:7, 2:8], img)
    mask = np.ones((9, 11), bool)
    mask[2:7, 2:8] = False
    assert (padded[mask] == (1, 2, 3)).all()
    assert np.array_equal(CenterCrop((5, 6)).apply(padded), img)
    assert Pad().apply(picture(3, 8)).shape == (8, 8, 3)
    with pytest.raises(ValueError, match="5 x 6 holds no crop of 7 x 2"):
        CenterCrop((7, 2)).apply(img)


@pytest.mark.parametrize(("direction", "axes"), [("horizontal", 1), ("vertical", 0), ("diagonal", (0, 1))])
def test_flip(direction, axes):
    img = picture()
    assert np.array_equal(RandomFlip(1.0, direction).apply(img), np.flip(img, axes))
    assert RandomFlip(0.0, direction).apply(img) is img


def test_flip_happens_as_often_as_asked():
    random.seed(0)
    flip, img = RandomFlip(0.3), picture(1, 2)
    flips = sum(not np.array_equal(flip.apply(img), img) for _ in range(4000))
    assert abs(flips - 1200) < 4 * np.sqrt(4000 * 0.3 * 0.7)


@given(st.integers(1, 60), st.integers(1, 60), st.integers(0, 1000))
def test_random_crop_lies_inside_and_keeps_its_bounds(height, width, seed):
    random.seed(seed)
    crop = RandomResizedCrop(4, area=(0.2, 0.8), ratio=(0.5, 2.0))
    top, left, crop_height, crop_width = crop.rectangle(height, width)
    assert 0 <= top <= height - crop_height
    assert 0 <= left <= width - crop_width
    if min(height, width) >= 20 and max(height, width) <= 2 * min(height, width):
        share = crop_height * crop_width / height / width
        assert 0.15 < share < 0.88
        assert 0.4 < crop_width / crop_height < 2.4
    assert crop.apply(picture(height, width)).shape == (4, 4, 3)


def test_affine_without_range_changes_nothing():
    img = picture()
    still = RandomAffine(degrees=0, translate=0, scale=(1, 1), shear=0)
    assert np.array_equal(still.apply(img), img)
    assert np.array_equal(RandomAffine(prob=0).apply(img), img)


def test_affine_quarter_turn_is_exact(monkeypatch):
    img = picture(7, 7)
    monkeypatch.setattr(random, "uniform", lambda low, high: high if high == 90 else 0.0)
    turned = RandomAffine(degrees=90, translate=0, scale=(1, 1)).apply(img)
    # y points down, so the positive angle turns clockwise.
    assert np.array_equal(turned, np.rot90(img, -1))


def test_affine_moves_and_fills(monkeypatch):
    img = picture(10, 10)
    monkeypatch.setattr(random, "uniform", lambda low, high: high if high == 0.2 else 0.0)
    moved = RandomAffine(degrees=0, translate=0.2, scale=(1, 1), fill=(1, 2, 3)).apply(img)
    assert np.array_equal(moved[2:, 2:], img[:-2, :-2])
    assert (moved[:2] == (1, 2, 3)).all()


# -- colours --------------------------------------------------------------------------------------------------------


def test_luma_by_hand():
    pixel = np.array([[[100, 50, 200]]], np.uint8)
    assert luma(pixel)[0, 0, 0] == pytest.approx(0.299 * 100 + 0.587 * 50 + 0.114 * 200, rel=1e-6)
    grey = RandomGrayscale(1.0).apply(pixel)
    assert (grey == 82).all()
    assert grey.shape == (1, 1, 3)


def test_jitter_without_range_changes_nothing():
    img = picture()
    assert np.array_equal(ColorJitter(0, 0, 0, 0).apply(img), img)


@pytest.mark.parametrize("what", ["brightness", "contrast", "saturation"])
def test_jitter_against_formula(what, monkeypatch):
    img = picture(6, 5)
    monkeypatch.setattr(random, "uniform", lambda low, high: high)
    jitter = ColorJitter(**{**dict(brightness=0, contrast=0, saturation=0, hue=0), what: 0.5})
    expected = np.zeros_like(img)
    greys = img.astype(float) @ (0.299, 0.587, 0.114)
    for y in range(6):
        for x in range(5):
            for c in range(3):
                start = {"brightness": 0.0, "contrast": greys.mean(), "saturation": greys[y, x]}[what]
                expected[y, x, c] = np.clip(np.rint(start + 1.5 * (float(img[y, x, c]) - start)), 0, 255)
    assert np.abs(jitter.apply(img).astype(int) - expected).max() <= 1


def test_hue_by_a_third_turns_red_to_green(monkeypatch):
    monkeypatch.setattr(random, "uniform", lambda low, high: high)
    red = np.zeros((2, 2, 3), np.uint8)
    red[..., 0] = 200
    green = ColorJitter(0, 0, 0, 1 / 3).apply(red)
    assert np.abs(green.astype(int) - (0, 200, 0)).max() <= 1


@pytest.mark.parametrize("fill", ["random", (7, 8, 9)])
def test_erasing_changes_one_rectangle(fill):
    random.seed(2)
    img = np.full((30, 40, 3), 100, np.uint8)
    out = RandomErasing(1.0, area=(0.1, 0.2), ratio=(0.5, 2), fill=fill).apply(img)
    changed = (out != 100).any(axis=2)
    rows, columns = np.flatnonzero(changed.any(1)), np.flatnonzero(changed.any(0))
    share = len(rows) * len(columns) / 1200
    assert 0.08 < share < 0.22
    blot = out[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    if fill == "random":
        assert blot.std() > 50
    else:
        assert (blot == fill).all()
    assert changed.sum() >= 0.95 * len(rows) * len(columns)


# -- packing --------------------------------------------------------------------------------------------------------


def test_pack():
    img = picture(4, 6)
    item = dict(img=img[:, ::-1], gt_label=3, gt_identity=9, sample_id="s", vendor="noto", sample_idx=5, other=1)
    packed = PackInputs(["vendor"])(item)
    assert packed["inputs"].dtype == torch.uint8
    assert packed["inputs"].is_contiguous()
    assert np.array_equal(packed["inputs"].numpy(), img[:, ::-1].transpose(2, 0, 1))
    sample = packed["data_samples"]
    assert (sample.gt_label.item(), sample.gt_identity.item()) == (3, 9)
    assert (sample.sample_id, sample.vendor, sample.img_shape, "other" in sample) == ("s", "noto", (4, 6), False)
    packed["inputs"].zero_()
    assert img.any()


def test_pack_without_labels_and_with_one_channel():
    packed = PackInputs()(dict(img=picture(4, 6, 1)))
    assert packed["inputs"].shape == (1, 4, 6)
    assert "gt_label" not in packed["data_samples"]
    assert PackInputs()(dict(img=picture(4, 6, 1)[..., 0]))["inputs"].shape == (3, 4, 6)


def test_pipeline_from_config(tmp_path):
    Image.fromarray(picture(20, 30)).save(tmp_path / "a.png")
    steps = [dict(type=f"alimm.{name}") for name in ("LoadImage", "RandomFlip", "ColorJitter", "PackInputs")]
    steps.insert(1, dict(type="alimm.RandomResizedCrop", size=16))
    assert Compose(steps)({"img_path": str(tmp_path / "a.png")})["inputs"].shape == (3, 16, 16)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Resize(0),
        lambda: Resize((1, 2, 3)),
        lambda: Resize((3, 4), edge="short"),
        lambda: Resize(3, interpolation="best"),
        lambda: Pad(4, mode="wrap"),
        lambda: Pad(4, fill=(1, 2)),
        lambda: RandomFlip(1.5),
        lambda: RandomFlip(direction="up"),
        lambda: RandomResizedCrop(4, area=(0.5, 0.1)),
        lambda: RandomAffine(degrees=-3),
        lambda: ColorJitter(hue=0.6),
        lambda: RandomErasing(fill="blue"),
        lambda: LoadImage(background=(1, 2, 300)),
        lambda: PackInputs("vendor"),
    ],
)
def test_wrong_arguments_are_named(make):
    with pytest.raises(ValueError, match=r"(Resize|Pad|Random\w+|ColorJitter|LoadImage|PackInputs): .* got "):
        make()
