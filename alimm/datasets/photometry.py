"""Transforms that change colours or blot parts out."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from alimm.datasets.loading import check_colour
from alimm.datasets.transforms import Image, Transform, check_number, check_range, fill_of, happens, log_uniform
from alimm.registry import TRANSFORMS

LUMA = (0.299, 0.587, 0.114)
"""Share of red, green and blue in the brightness (ITU-R BT.601), as JPEG has it."""


def luma(img: NDArray[np.uint8] | NDArray[np.float32]) -> NDArray[np.float32]:
    """Brightness of each pixel, float32 (H, W, 1); the picture itself where it has one channel."""
    if img.shape[2] == 1:
        return img.astype(np.float32)
    return img.astype(np.float32) @ np.array(LUMA, np.float32)[:, None]


def _to_uint8(values: NDArray[np.float32]) -> Image:
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)


@TRANSFORMS.register_module()
class ColorJitter(Transform):
    """Change brightness, contrast, saturation and hue, in a random order. Grey pictures keep their hue.

    Args:
        brightness: b, the pixels are multiplied by a factor of [1 - b, 1 + b].
        contrast: c, the distance to the picture's mean brightness is multiplied by [1 - c, 1 + c].
        saturation: s, the distance to the pixel's own grey is multiplied by [1 - s, 1 + s].
        hue: h, the hue is turned by [-h, h] of the colour circle; at most 0.5.
        prob: how often anything happens at all.
    """

    def __init__(
        self,
        brightness: float = 0.4,
        contrast: float = 0.4,
        saturation: float = 0.4,
        hue: float = 0.05,
        prob: float = 1.0,
    ) -> None:
        self.brightness = check_number(brightness, "ColorJitter: brightness")
        self.contrast = check_number(contrast, "ColorJitter: contrast")
        self.saturation = check_number(saturation, "ColorJitter: saturation")
        self.hue = check_number(hue, "ColorJitter: hue", 0.5)
        self.prob = check_number(prob, "ColorJitter: prob")

    def apply(self, img: Image) -> Image:
        """Change the colours, or not."""
        if not happens(self.prob):
            return img
        steps = [self._brightness, self._contrast, self._saturation, self._hue]
        random.shuffle(steps)
        values = img.astype(np.float32)
        for step in steps:
            values = np.clip(step(values), 0, 255)
        return _to_uint8(values)

    def _brightness(self, values: NDArray[np.float32]) -> NDArray[np.float32]:
        return values * np.float32(1 + random.uniform(-self.brightness, self.brightness))

    def _contrast(self, values: NDArray[np.float32]) -> NDArray[np.float32]:
        factor = np.float32(1 + random.uniform(-self.contrast, self.contrast))
        mean = luma(values).mean(dtype=np.float32)
        return mean + factor * (values - mean)

    def _saturation(self, values: NDArray[np.float32]) -> NDArray[np.float32]:
        factor = np.float32(1 + random.uniform(-self.saturation, self.saturation))
        grey = luma(values)
        return grey + factor * (values - grey)

    def _hue(self, values: NDArray[np.float32]) -> NDArray[np.float32]:
        import cv2

        turn = 360 * random.uniform(-self.hue, self.hue)
        if values.shape[2] == 1 or turn == 0:
            return values
        hsv = cv2.cvtColor(values / np.float32(255), cv2.COLOR_RGB2HSV)
        hsv[..., 0] = (hsv[..., 0] + turn) % 360
        return np.asarray(cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB) * 255, np.float32)


@TRANSFORMS.register_module()
class RandomGrayscale(Transform):
    """Take the colours away; the number of channels stays.

    Args:
        prob: how often.
    """

    def __init__(self, prob: float = 0.1) -> None:
        self.prob = check_number(prob, "RandomGrayscale: prob")

    def apply(self, img: Image) -> Image:
        """Make it grey, or not."""
        if not happens(self.prob):
            return img
        return np.repeat(_to_uint8(luma(img)), img.shape[2], axis=2)


@TRANSFORMS.register_module()
class RandomErasing(Transform):
    """Blot out a random rectangle.

    Args:
        prob: how often.
        area: range of the rectangle's share of the picture's area.
        ratio: range of its width divided by its height, drawn on a logarithmic scale.
        fill: RGB colour of the blot, or ``'random'`` for noise.
    """

    def __init__(
        self,
        prob: float = 0.25,
        area: Sequence[float] = (0.02, 0.33),
        ratio: Sequence[float] = (0.3, 3.3),
        fill: Sequence[int] | str = "random",
    ) -> None:
        self.prob = check_number(prob, "RandomErasing: prob")
        self.area = check_range(area, "RandomErasing: area", 0.0, 1.0)
        self.ratio = check_range(ratio, "RandomErasing: ratio", 1e-3, 1e3)
        if isinstance(fill, str) and fill != "random":
            raise ValueError(f"RandomErasing: fill must be 'random' or a colour (red, green, blue), got {fill!r}")
        self.fill = fill if isinstance(fill, str) else check_colour(fill, "RandomErasing: fill")

    def apply(self, img: Image) -> Image:
        """Blot out, or not."""
        if not happens(self.prob):
            return img
        height, width, channels = img.shape
        for _ in range(10):
            area, ratio = height * width * random.uniform(*self.area), log_uniform(*self.ratio)
            blot_height, blot_width = round(math.sqrt(area / ratio)), round(math.sqrt(area * ratio))
            if 0 < blot_height <= height and 0 < blot_width <= width:
                break
        else:
            return img
        top, left = random.randint(0, height - blot_height), random.randint(0, width - blot_width)
        img = img.copy()
        if isinstance(self.fill, str):
            noise = np.random.default_rng(random.getrandbits(63))
            blot = noise.integers(0, 256, (blot_height, blot_width, channels), np.uint8)
        else:
            blot = np.array(fill_of(img, self.fill), np.uint8)
        img[top : top + blot_height, left : left + blot_width] = blot
        return img
