"""Batch augmentations: identities at zero strength, exact geometry, ranges, one draw a picture."""

import math

import numpy as np
import pytest
import torch

from alimm.models import BatchColorJitter, BatchCutout, BatchRandomAffine

STILL = dict(degrees=0.0, scale=0.0, aspect=0.0, shear=0.0, shift=0.0, flip_prob=0.0)


def pictures(count=4, size=16):
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(0)) * 255


def test_affine_at_zero_strength_changes_nothing():
    x = pictures()
    assert torch.allclose(BatchRandomAffine(**STILL)(x), x, atol=1e-2)


def test_affine_flips_exactly():
    x = pictures()
    assert torch.allclose(BatchRandomAffine(**STILL | dict(flip_prob=1.0))(x), x.flip(3), atol=1e-2)


def test_affine_fills_what_comes_in():
    x = torch.zeros(64, 3, 16, 16)
    moved = BatchRandomAffine(**STILL | dict(shift=1.0), fill=200.0)(x)
    assert moved.max().item() == pytest.approx(200.0, abs=1e-3)
    assert moved.min().item() == pytest.approx(0.0, abs=1e-3)
    assert torch.allclose(BatchRandomAffine(fill=0.0)(x), x)


def test_affine_rotates_within_its_limit():
    torch.manual_seed(0)
    x = torch.zeros(256, 1, 33, 33)
    x[:, :, 16, 26:32] = 1.0
    x = x.expand(-1, 3, -1, -1)
    moved = BatchRandomAffine(**STILL | dict(degrees=30.0), fill=0.0)(x)[:, 0]
    axis = torch.arange(33.0) - 16
    mass = moved.sum((1, 2))
    angles = torch.atan2((moved.sum(2) @ axis) / mass, (moved.sum(1) @ axis) / mass) * 180 / math.pi
    assert angles.abs().max() <= 31
    assert angles.abs().max() > 25
    assert angles.min() < 0 < angles.max()


def test_color_jitter_at_zero_strength_changes_nothing():
    x = pictures()
    still = BatchColorJitter(saturation=0, hue=0, hue_prob=0, contrast=0, gain=0, offset=0, gray_prob=0)
    assert torch.allclose(still(x), x, atol=1e-2)


def test_color_jitter_keeps_the_range_and_differs_by_picture():
    x = pictures(1).expand(8, -1, -1, -1)
    y = BatchColorJitter()(x)
    assert y.min() >= 0
    assert y.max() <= 255
    assert len({tuple(row.flatten()[:9].tolist()) for row in y}) == 8


def test_gray_pictures_lose_their_colour():
    y = BatchColorJitter(gain=0, offset=0, gray_prob=1.0)(pictures())
    assert torch.allclose(y[:, 0], y[:, 1], atol=1e-3)
    assert torch.allclose(y[:, 0], y[:, 2], atol=1e-3)


def test_hue_rotation_keeps_grey_and_length():
    rotation = BatchColorJitter(hue=1.0)._hue_rotation(pictures(5))
    assert torch.allclose(rotation @ rotation.transpose(1, 2), torch.eye(3).expand(5, 3, 3), atol=1e-5)
    assert torch.allclose(torch.linalg.det(rotation), torch.ones(5), atol=1e-5)
    assert torch.allclose(rotation @ torch.ones(3), torch.ones(5, 3), atol=1e-5)


def test_cutout_paints_one_square():
    torch.manual_seed(0)
    x = torch.full((200, 3, 16, 16), -1.0)
    y = BatchCutout(size=0.25, prob=0.5)(x)
    painted = (y != -1).any(1)
    share = painted.any(2).any(1).float().mean().item()
    assert 0.35 < share < 0.65
    for mask, picture in zip(painted.numpy(), y.numpy(), strict=True):
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        if len(rows):
            assert mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all()
            assert len(rows) <= 5
            assert np.ptp(picture[:, mask], axis=1).max() == 0
