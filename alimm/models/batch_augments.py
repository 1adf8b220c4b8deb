"""Augmentation of whole batches: float (N, 3, H, W), RGB of 0 to 255, every picture with its own draw.

They draw from torch's global generator, which `alimm.EpochSeedHook` seeds at every iteration, and run on the device of
the batch.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from alimm.registry import MODELS


def _uniform(like: torch.Tensor, low: float, high: float, channels: int = 1) -> torch.Tensor:
    """One number for each picture and channel, shape (N, channels, 1, 1)."""
    return low + (high - low) * torch.rand(len(like), channels, 1, 1, device=like.device)


def _with_prob(like: torch.Tensor, prob: float) -> torch.Tensor:
    return torch.rand(len(like), 1, 1, 1, device=like.device) < prob


@MODELS.register_module()
class BatchRandomAffine(nn.Module):
    """Rotate, scale, stretch, shear, shift and mirror, in one resampling.

    Angles are true for square pictures; others are rotated as if they were stretched to a square first.

    Args:
        degrees: rotation of up to so many degrees either way.
        scale: size changes by a factor of up to ``exp(scale)`` either way.
        aspect: sides are stretched against each other by a factor of up to ``exp(aspect)``.
        shear: up to so much, as the tangent of the angle.
        shift: up to this share of half the side, either way.
        flip_prob: probability of mirroring left and right.
        fill: value of what comes in from outside.
    """

    def __init__(
        self,
        degrees: float = 20.0,
        scale: float = 0.3,
        aspect: float = 0.15,
        shear: float = 0.2,
        shift: float = 0.15,
        flip_prob: float = 0.5,
        fill: float = 255.0,
    ) -> None:
        super().__init__()
        self.degrees, self.scale, self.aspect, self.shear = degrees, scale, aspect, shear
        self.shift, self.flip_prob, self.fill = shift, flip_prob, fill

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """A batch to a batch of the same shape."""

        def draw(limit: float) -> torch.Tensor:
            return _uniform(images, -limit, limit).flatten()

        angle, zoom, aspect = draw(math.radians(self.degrees)), draw(self.scale).exp(), draw(self.aspect).exp()
        flip = torch.where(_with_prob(images, self.flip_prob).flatten(), -1.0, 1.0)
        cos, sin = angle.cos() * zoom, angle.sin() * zoom
        matrix = torch.stack(
            [
                torch.stack([cos * aspect * flip, -sin + draw(self.shear), draw(self.shift)], 1),
                torch.stack([sin * flip, cos / aspect, draw(self.shift)], 1),
            ],
            1,
        )
        grid = F.affine_grid(matrix, list(images.shape), align_corners=False)
        return F.grid_sample(images - self.fill, grid, align_corners=False) + self.fill


@MODELS.register_module()
class BatchColorJitter(nn.Module):
    """Change saturation, hue, contrast, the gain and offset of each channel, and drop the colour of some pictures.

    Args:
        saturation: factor of up to ``exp(saturation)`` either way.
        hue: rotation of up to this share of half the circle either way.
        hue_prob: share of the pictures whose hue is turned by any angle.
        contrast: factor of up to ``exp(contrast)`` about the middle grey.
        gain: factor of up to ``exp(gain)`` on each channel by itself.
        offset: up to this share of the range, on each channel by itself.
        gray_prob: share of the pictures that lose their colour.
    """

    def __init__(
        self,
        saturation: float = 0.8,
        hue: float = 0.12,
        hue_prob: float = 0.1,
        contrast: float = 0.4,
        gain: float = 0.25,
        offset: float = 0.15,
        gray_prob: float = 0.1,
    ) -> None:
        super().__init__()
        self.saturation, self.hue, self.hue_prob, self.contrast = saturation, hue, hue_prob, contrast
        self.gain, self.offset, self.gray_prob = gain, offset, gray_prob

    def _hue_rotation(self, images: torch.Tensor) -> torch.Tensor:
        """Rotations about the grey axis, (N, 3, 3), by Rodrigues' formula."""
        angle = _uniform(images, -math.pi * self.hue, math.pi * self.hue)
        anywhere = _uniform(images, -math.pi, math.pi)
        angle = torch.where(_with_prob(images, self.hue_prob), anywhere, angle).view(-1, 1, 1)
        axis = 1 / math.sqrt(3)
        cross = torch.tensor([[0, -axis, axis], [axis, 0, -axis], [-axis, axis, 0]], device=images.device)
        eye = torch.eye(3, device=images.device)
        return angle.cos() * eye + angle.sin() * cross + (1 - angle.cos()) / 3

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """A batch to a batch of the same shape, clipped to 0..255."""
        x = images / 255
        gray = x.mean(1, keepdim=True)
        x = gray + (x - gray) * _uniform(x, -self.saturation, self.saturation).exp()
        x = torch.einsum("nij,njhw->nihw", self._hue_rotation(x), x)
        x = (x - 0.5) * _uniform(x, -self.contrast, self.contrast).exp() + 0.5
        x = x * _uniform(x, -self.gain, self.gain, 3).exp() + _uniform(x, -self.offset, self.offset, 3)
        x = torch.where(_with_prob(x, self.gray_prob), x.mean(1, keepdim=True), x)
        return x.clamp(0, 1) * 255


@MODELS.register_module()
class BatchCutout(nn.Module):
    """Paint a square of one random colour into some pictures (DeVries and Taylor, 2017).

    Args:
        size: side of the square as a share of the picture's side.
        prob: share of the pictures.
    """

    def __init__(self, size: float = 0.25, prob: float = 0.5) -> None:
        super().__init__()
        self.size, self.prob = size, prob

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """A batch to a batch of the same shape."""
        height, width = images.shape[-2:]
        rows = torch.arange(height, device=images.device).view(1, 1, -1, 1)
        columns = torch.arange(width, device=images.device).view(1, 1, 1, -1)
        inside = ((rows - _uniform(images, 0, height)).abs() < self.size * height / 2) & (
            (columns - _uniform(images, 0, width)).abs() < self.size * width / 2
        )
        inside &= _with_prob(images, self.prob)
        return torch.where(inside, _uniform(images, 0, 255, 3), images)
