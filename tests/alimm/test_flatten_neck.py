"""FlattenNeck keeps the place of what it sees."""

import pytest
import torch

from alimm.models import FlattenNeck, ImageClassifier


def test_it_is_the_flat_map_times_a_matrix():
    neck = FlattenNeck(3, (2, 4), 5).eval()
    maps = torch.randn(6, 3, 2, 4)
    expected = torch.zeros(6, 5)
    for c in range(3):
        for i in range(2):
            for j in range(4):
                expected += maps[:, c, i, j, None] * neck.project.weight[:, c * 8 + i * 4 + j]
    # A fresh batch norm in evaluation divides by sqrt(1 + eps).
    assert torch.allclose(neck((maps[:, :, :1], maps)), expected / (1 + neck.norm.eps) ** 0.5, atol=1e-5)
    assert torch.equal(neck(maps.to(memory_format=torch.channels_last)), neck(maps))
    moved = neck(maps.roll(1, dims=3))
    assert not torch.allclose(moved, neck(maps), atol=0.1)


def test_wrong_sizes_are_named():
    neck = FlattenNeck(3, 2, 5)
    with pytest.raises(ValueError, match=r"made for maps \(3, 2, 2\), got \(3, 4, 4\)"):
        neck(torch.ones(1, 3, 4, 4))
    with pytest.raises(ValueError, match="must be at least 1, got 3, 0 and 5"):
        FlattenNeck(3, 0, 5)
    with pytest.raises(ValueError, match="one number or two"):
        FlattenNeck(3, (1, 2, 3), 5)


def test_in_a_classifier():
    model = ImageClassifier(
        backbone=dict(type="alimm.ResNetTiny", width=4, depths=(1, 1), stem_stride=2),
        neck=dict(type="alimm.FlattenNeck", in_channels=8, map_size=8, out_channels=6),
    )
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 6)
