from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from alimm.projects.dcaa import augment_batch
from alimm.projects.dcaa.augment import StrongAugment
from alimm.projects.dcaa.augment_batch import class_mix, strong_augment_batch

OFF = {"jitter_prob": 0, "gamma_prob": 0, "grey_prob": 0, "blur_prob": 0, "noise_prob": 0}


def picture(seed: int = 0, height: int = 20, width: int = 30) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8)


def augmented(img: np.ndarray, seed: int = 0, **options: Any) -> np.ndarray:
    random.seed(seed)
    return StrongAugment(**(OFF | options))({"img": img})["img"]


def images(seed: int = 0, count: int = 3, height: int = 9, width: int = 11) -> torch.Tensor:
    return 255 * torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(seed))


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_all_off_changes_nothing() -> None:
    img = picture()
    np.testing.assert_array_equal(augmented(img), img)


def test_only_the_picture_changes_and_the_given_one_stays() -> None:
    img, label = picture(), np.arange(600).reshape(20, 30)
    kept = img.copy()
    random.seed(0)
    transform = StrongAugment(
        1 * (0.4, 0.4, 0.4, 0.1), 1, grey_prob=1, blur_prob=1, noise_prob=1, gamma_prob=1, blots=3
    )
    results = transform({"img": img, "gt_seg_map": label, "img_shape": (20, 30)})
    np.testing.assert_array_equal(img, kept)
    assert set(results) == {"img", "gt_seg_map", "img_shape"}
    assert results["gt_seg_map"] is label
    assert results["img"].shape == img.shape
    assert results["img"].dtype == np.uint8
    assert not np.array_equal(results["img"], img)


@pytest.mark.parametrize("seed", range(5))
def test_draws_come_from_python_random(seed: int) -> None:
    first = augmented(picture(), seed, **dict.fromkeys(OFF, 0.5), blots=2)
    np.random.seed(seed)
    np.testing.assert_array_equal(augmented(picture(), seed, **dict.fromkeys(OFF, 0.5), blots=2), first)


def test_gamma_is_the_power_law() -> None:
    img = picture()
    found = augmented(img, gamma=(2, 2), gamma_prob=1)
    np.testing.assert_allclose(found, 255 * (img / 255) ** 2, atol=0.51)


def test_grey_weighs_red_green_and_blue_by_the_channel_order() -> None:
    img = np.zeros((4, 4, 3), np.uint8)
    img[..., 0] = 200
    assert augmented(img, grey_prob=1)[0, 0].tolist() == [round(0.114 * 200)] * 3
    assert augmented(img, grey_prob=1, channel_order="rgb")[0, 0].tolist() == [round(0.299 * 200)] * 3


def test_blur_spreads_a_point_and_keeps_the_mean() -> None:
    img = np.full((21, 21, 3), 20, np.uint8)
    img[10, 10] = 255
    found = augmented(img, sigma=(1.5, 1.5), blur_prob=1)
    x = np.arange(-10, 11)
    kernel = np.exp(-(x**2) / (2 * 1.5**2))
    kernel /= kernel.sum()
    np.testing.assert_allclose(found[..., 1], 20 + 235 * np.outer(kernel, kernel), atol=1.01)


def test_noise_has_the_drawn_spread() -> None:
    img = np.full((64, 64, 3), 128, np.uint8)
    found = augmented(img, noise=(10, 10), noise_prob=1).astype(float) - 128
    assert abs(found.std() - 10) < 0.5
    assert abs(found.mean()) < 0.5


def test_blots_have_the_colour_and_about_the_area() -> None:
    img = np.zeros((60, 80, 3), np.uint8)
    found = augmented(img, blots=1, blot_prob=1, blot_area=(0.1, 0.1), fill=(10, 20, 30))
    covered = (found == (30, 20, 10)).all(-1)
    assert ((found == 0).all(-1) | covered).all()
    assert 0.07 < covered.mean() < 0.13
    two = augmented(img, blots=4, blot_prob=1, blot_area=(0.1, 0.1), fill=(10, 20, 30))
    assert (two == (30, 20, 10)).all(-1).mean() > covered.mean()


def test_each_part_happens_as_often_as_it_should() -> None:
    random.seed(0)
    transform = StrongAugment(**(OFF | {"gamma_prob": 0.3, "gamma": (2, 2)}))
    img = np.full((2, 2, 3), 128, np.uint8)
    count = sum(transform({"img": img})["img"][0, 0, 0] != 128 for _ in range(1000))
    assert 250 < count < 350


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"jitter": (0.1, 0.2)}, "jitter must be four numbers"),
        ({"jitter": (0.1, 0.2, 0.3, 0.6)}, "hue must be between 0 and 0.5"),
        ({"gamma": (0, 1)}, "gamma must be two numbers"),
        ({"blots": -1}, "blots must be a whole number"),
        ({"blots": True}, "blots must be a whole number"),
        ({"noise_prob": 2}, "noise_prob must be between 0 and 1"),
        ({"channel_order": "hsv"}, "channel_order must be"),
    ],
)
def test_wrong_options(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StrongAugment(**options)


def test_wrong_pictures() -> None:
    for bad in (np.zeros((4, 4), np.uint8), np.zeros((4, 4, 4), np.uint8), np.zeros((4, 4, 3), np.float32), None):
        with pytest.raises(ValueError, match=r"img must be uint8 of shape \(H, W, 3\), got"):
            StrongAugment()({"img": bad})


def test_batch_without_changes_is_the_batch() -> None:
    assert torch.equal(strong_augment_batch(images(), generator(0), jitter_prob=0, blur_prob=0), images())
    same = strong_augment_batch(images(), generator(0), 1.0, 0, 0, 0, 0, blur_prob=0)
    torch.testing.assert_close(same, images(), atol=1e-3, rtol=0)


def one_by_one(image: torch.Tensor, factors: list[float], turn: float) -> torch.Tensor:
    """The jitter of one picture, pixel by pixel, in float64; the hue by a rotation matrix about (1, 1, 1)."""
    values = image.double().permute(1, 2, 0).reshape(-1, 3).numpy()
    luma = np.array([0.299, 0.587, 0.114])
    values = np.clip(values * factors[0], 0, 255)
    mean = (values @ luma).mean()
    values = np.clip(mean + factors[1] * (values - mean), 0, 255)
    grey = (values @ luma)[:, None]
    values = np.clip(grey + factors[2] * (values - grey), 0, 255)
    k = np.ones(3) / np.sqrt(3)
    cross = np.array([[0, -k[2], k[1]], [k[2], 0, -k[0]], [-k[1], k[0], 0]])
    matrix = np.eye(3) + np.sin(turn) * cross + (1 - np.cos(turn)) * cross @ cross
    values = np.clip(values @ matrix.T, 0, 255)
    return torch.from_numpy(values).reshape(*image.shape[1:], 3).permute(2, 0, 1)


def test_batch_jitter_is_that_of_each_picture_alone() -> None:
    found = strong_augment_batch(images(1), generator(4), 0.5, 0.3, 0.5, 0.6, 0.1, blur_prob=0)
    draws = generator(4)
    happens = torch.rand(3, generator=draws) < 0.5
    drawn = [(torch.rand(3, generator=draws) * 2 - 1) * width for width in (0.3, 0.5, 0.6, 0.1)]
    assert 0 < happens.sum() < 3
    for row in range(3):
        factors = [1 + float(one[row]) for one in drawn[:3]]
        expected = one_by_one(images(1)[row], factors, 2 * np.pi * float(drawn[3][row]))
        if not happens[row]:
            expected = images(1)[row].double()
        torch.testing.assert_close(found[row].double(), expected, atol=2e-3, rtol=0)


def test_hue_of_a_third_of_the_circle_moves_red_to_green() -> None:
    red = torch.tensor([255.0, 0, 0]).view(1, 3, 1, 1)
    turned = augment_batch._turn_hue(red, torch.full((1, 1, 1, 1), 2 * torch.pi / 3))
    torch.testing.assert_close(turned.flatten(), torch.tensor([0.0, 255, 0]), atol=1e-3, rtol=0)


def test_batch_blur_is_a_gaussian_of_the_drawn_width() -> None:
    batch = torch.full((4, 3, 15, 17), 10.0)
    batch[:, :, 7, 8] = 250
    batch[3] = 33
    found = strong_augment_batch(batch, generator(3), jitter_prob=0, blur_prob=0.6, sigma=(0.5, 1.0))
    draws = generator(3)
    [torch.rand(4, generator=draws) for _ in range(5)]
    happens = torch.rand(4, generator=draws) < 0.6
    sigmas = 0.5 + 0.5 * torch.rand(4, generator=draws)
    assert 0 < happens[:3].sum() < 3
    for row in range(3):
        x = np.arange(-3, 4)
        kernel = np.exp(-(x**2) / (2 * float(sigmas[row]) ** 2))
        kernel /= kernel.sum()
        expected = np.full((15, 17), 10.0)
        expected[4:11, 5:12] += 240 * np.outer(kernel, kernel)
        if not happens[row]:
            expected = batch[row, 0].numpy()
        for channel in range(3):
            np.testing.assert_allclose(found[row, channel].numpy(), expected, atol=1e-3)
    # at the border the edge is repeated, so an even picture stays even
    torch.testing.assert_close(found[3], batch[3])


def test_batch_draws_from_the_generator_and_by_default_from_torch() -> None:
    first = strong_augment_batch(images(), generator(7))
    assert torch.equal(strong_augment_batch(images(), generator(7)), first)
    assert not torch.equal(strong_augment_batch(images(), generator(8)), first)
    torch.manual_seed(7)
    assert torch.equal(strong_augment_batch(images()), first)
    assert first.min() >= 0
    assert first.max() <= 255


@pytest.mark.parametrize(
    "bad", [torch.zeros(3, 4, 4), torch.zeros(1, 4, 4, 4), torch.zeros(1, 3, 4, 4, dtype=torch.uint8)]
)
def test_wrong_batches(bad: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"needs float pictures \(N, 3, H, W\)"):
        strong_augment_batch(bad)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), classes=st.integers(1, 6), ignored=st.booleans())
def test_class_mix_pastes_whole_classes_half_of_them(seed: int, classes: int, ignored: bool) -> None:
    draws = np.random.default_rng(seed)
    labels_s = torch.from_numpy(draws.integers(0, classes, (2, 5, 6)))
    if ignored:
        labels_s[:, :2] = 255
    labels_t = torch.from_numpy(draws.integers(0, classes, (2, 5, 6)))
    weights_t = torch.full((2, 5, 6), 0.25)
    images_s, images_t = images(seed, 2, 5, 6), -1 - images(seed + 1, 2, 5, 6)
    mixed, labels, weights = class_mix(images_s, labels_s, images_t, labels_t, weights_t, generator(seed))
    for row in range(2):
        present = sorted(set(labels_s[row].unique().tolist()) - {255})
        pasted_classes = set()
        for y in range(5):
            for x in range(6):
                from_source = mixed[row, 0, y, x] >= 0
                picture_of = images_s if from_source else images_t
                labels_of = labels_s if from_source else labels_t
                assert torch.equal(mixed[row, :, y, x], picture_of[row, :, y, x])
                assert labels[row, y, x] == labels_of[row, y, x]
                assert weights[row, y, x] == (1.0 if from_source else 0.25)
                if from_source:
                    pasted_classes.add(int(labels_s[row, y, x]))
        assert len(pasted_classes) == (len(present) + 1) // 2
        pasted = mixed[row, 0] >= 0
        assert torch.equal(pasted, torch.isin(labels_s[row], torch.tensor(sorted(pasted_classes), dtype=torch.int64)))


def test_class_mix_draws_different_classes() -> None:
    labels_s = torch.arange(6).view(1, 1, 6)
    zeros = torch.zeros(1, 3, 1, 6)
    drawn = set()
    for seed in range(200):
        mixed = class_mix(zeros + 1, labels_s, zeros, labels_s, torch.zeros(1, 1, 6), generator(seed))[0]
        drawn.add(tuple(mixed[0, 0, 0].tolist()))
    assert len(drawn) == 20  # all ways to take 3 of 6


def test_class_mix_leaves_the_given_tensors_alone_and_pastes_nothing_of_an_unlabelled_source() -> None:
    labels_t, weights = torch.zeros(1, 4, 5, dtype=torch.int64), torch.full((1, 4, 5), 0.5)
    target = images(1, 1, 4, 5)
    given = (target.clone(), labels_t.clone(), weights.clone())
    class_mix(images(0, 1, 4, 5), torch.ones_like(labels_t), target, labels_t, weights, generator(0))
    mixed = class_mix(images(0, 1, 4, 5), torch.full_like(labels_t, 255), target, labels_t, weights, generator(0))
    for found, before in zip((target, labels_t, weights), given, strict=True):
        assert torch.equal(found, before)
    for found, before in zip(mixed, given, strict=True):
        assert torch.equal(found, before)


def test_class_mix_refuses_shapes_that_differ() -> None:
    labels, weights = torch.zeros(1, 4, 5, dtype=torch.int64), torch.zeros(1, 4, 5)
    with pytest.raises(ValueError, match=r"one shape.*\(1, 3, 4, 6\)"):
        class_mix(images(0, 1, 4, 6), labels, images(0, 1, 4, 5), labels, weights)
    with pytest.raises(ValueError, match=r"one shape"):
        class_mix(images(0, 1, 4, 5), labels[:, None], images(0, 1, 4, 5), labels, weights)
