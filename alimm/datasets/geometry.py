"""Transforms that move pixels. Sizes are (height, width), one number is a square."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import numpy as np

from alimm.datasets.loading import WHITE, check_colour
from alimm.datasets.transforms import (
    Image,
    Transform,
    check_number,
    check_range,
    check_size,
    fill_of,
    happens,
    hwc,
    log_uniform,
)
from alimm.registry import TRANSFORMS

INTERPOLATIONS = ("auto", "nearest", "linear", "area", "cubic")


def resize(img: Image, size: tuple[int, int], interpolation: str = "auto") -> Image:
    """Resize to (height, width). ``'auto'`` averages areas when shrinking and is linear when enlarging."""
    import cv2

    if interpolation == "auto":
        interpolation = "area" if size[0] <= img.shape[0] and size[1] <= img.shape[1] else "linear"
    flag = getattr(cv2, f"INTER_{interpolation.upper()}")
    return hwc(cv2.resize(np.ascontiguousarray(img), (size[1], size[0]), interpolation=flag))


def _check_choice(value: str, choices: tuple[str, ...], name: str) -> str:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
    return value


@TRANSFORMS.register_module()
class Resize(Transform):
    """Resize to a fixed size, or one side to a fixed length.

    Args:
        size: the new (height, width); with ``edge``, one number.
        edge: ``'short'`` or ``'long'`` makes that side ``size`` long and keeps the proportions.
        interpolation: ``'auto'`` (see `resize`), ``'nearest'``, ``'linear'``, ``'area'`` or ``'cubic'``.
    """

    def __init__(self, size: int | Sequence[int], edge: str | None = None, interpolation: str = "auto") -> None:
        self.size = check_size(size, "Resize: size")
        self.edge = edge if edge is None else _check_choice(edge, ("short", "long"), "Resize: edge")
        if edge is not None and self.size[0] != self.size[1]:
            raise ValueError(f"Resize: with edge={edge!r} the size must be one number, got {size!r}")
        self.interpolation = _check_choice(interpolation, INTERPOLATIONS, "Resize: interpolation")

    def apply(self, img: Image) -> Image:
        """Resize."""
        size = self.size
        if self.edge is not None:
            height, width = img.shape[:2]
            side = min(height, width) if self.edge == "short" else max(height, width)
            # In whole numbers: no length depends on how a platform rounds.
            size = (
                max(1, (2 * height * size[0] + side) // (2 * side)),
                max(1, (2 * width * size[0] + side) // (2 * side)),
            )
        return resize(img, size, self.interpolation)


@TRANSFORMS.register_module()
class CenterCrop(Transform):
    """Cut the middle out.

    Args:
        size: the new (height, width). A smaller picture is an error: put `Resize` or `Pad` before.
    """

    def __init__(self, size: int | Sequence[int]) -> None:
        self.size = check_size(size, "CenterCrop: size")

    def apply(self, img: Image) -> Image:
        """Crop."""
        (height, width), (new_height, new_width) = img.shape[:2], self.size
        if height < new_height or width < new_width:
            raise ValueError(
                f"CenterCrop: a picture of {height} x {width} holds no crop of {new_height} x {new_width}; put "
                f"alimm.Resize(edge='short') or alimm.Pad before it"
            )
        top, left = (height - new_height) // 2, (width - new_width) // 2
        return img[top : top + new_height, left : left + new_width]


@TRANSFORMS.register_module()
class Pad(Transform):
    """Add a border so that the picture has at least the given size and stays in the middle.

    Args:
        size: the least (height, width). A larger picture passes as it is; None pads to a square.
        fill: RGB colour of the border.
        mode: ``'constant'`` (the colour), ``'edge'`` (repeat the outermost pixels) or ``'reflect'``.
    """

    def __init__(
        self, size: int | Sequence[int] | None = None, fill: Sequence[int] = WHITE, mode: str = "constant"
    ) -> None:
        self.size = None if size is None else check_size(size, "Pad: size")
        self.fill = check_colour(fill, "Pad: fill")
        self.mode = _check_choice(mode, ("constant", "edge", "reflect"), "Pad: mode")

    def apply(self, img: Image) -> Image:
        """Pad."""
        import cv2

        height, width = img.shape[:2]
        target = self.size or (max(height, width),) * 2
        extra_height, extra_width = max(0, target[0] - height), max(0, target[1] - width)
        top, left = extra_height // 2, extra_width // 2
        flag = {"constant": cv2.BORDER_CONSTANT, "edge": cv2.BORDER_REPLICATE, "reflect": cv2.BORDER_REFLECT_101}
        padded = cv2.copyMakeBorder(
            np.ascontiguousarray(img),
            top,
            extra_height - top,
            left,
            extra_width - left,
            flag[self.mode],
            value=fill_of(img, self.fill),
        )
        return hwc(padded)


@TRANSFORMS.register_module()
class RandomResizedCrop(Transform):
    """Cut out a random rectangle and resize it.

    Args:
        size: the new (height, width).
        area: range of the rectangle's share of the picture's area.
        ratio: range of its width divided by its height, drawn on a logarithmic scale.
        interpolation: as in `Resize`.
    """

    def __init__(
        self,
        size: int | Sequence[int],
        area: Sequence[float] = (0.08, 1.0),
        ratio: Sequence[float] = (3 / 4, 4 / 3),
        interpolation: str = "auto",
    ) -> None:
        self.size = check_size(size, "RandomResizedCrop: size")
        self.area = check_range(area, "RandomResizedCrop: area", 1e-6, 1.0)
        self.ratio = check_range(ratio, "RandomResizedCrop: ratio", 1e-3, 1e3)
        self.interpolation = _check_choice(interpolation, INTERPOLATIONS, "RandomResizedCrop: interpolation")

    def rectangle(self, height: int, width: int) -> tuple[int, int, int, int]:
        """Draw (top, left, height, width) within a picture of the given size."""
        for _ in range(10):
            area = height * width * random.uniform(*self.area)
            ratio = log_uniform(*self.ratio)
            crop_height, crop_width = round(math.sqrt(area / ratio)), round(math.sqrt(area * ratio))
            if 0 < crop_height <= height and 0 < crop_width <= width:
                top, left = random.randint(0, height - crop_height), random.randint(0, width - crop_width)
                return top, left, crop_height, crop_width
        # No rectangle fits, as in very long pictures: the largest one in the middle with an allowed ratio.
        ratio = min(max(width / height, self.ratio[0]), self.ratio[1])
        crop_height = max(1, min(height, round(width / ratio)))
        crop_width = max(1, min(width, round(height * ratio)))
        return (height - crop_height) // 2, (width - crop_width) // 2, crop_height, crop_width

    def apply(self, img: Image) -> Image:
        """Crop and resize."""
        top, left, height, width = self.rectangle(*img.shape[:2])
        return resize(img[top : top + height, left : left + width], self.size, self.interpolation)


@TRANSFORMS.register_module()
class RandomFlip(Transform):
    """Mirror the picture.

    Args:
        prob: how often.
        direction: ``'horizontal'`` (left becomes right), ``'vertical'`` or ``'diagonal'`` (both at once).
    """

    def __init__(self, prob: float = 0.5, direction: str = "horizontal") -> None:
        self.prob = check_number(prob, "RandomFlip: prob")
        self.direction = _check_choice(direction, ("horizontal", "vertical", "diagonal"), "RandomFlip: direction")

    def apply(self, img: Image) -> Image:
        """Mirror, or not."""
        if not happens(self.prob):
            return img
        if self.direction in ("vertical", "diagonal"):
            img = img[::-1]
        return img if self.direction == "vertical" else img[:, ::-1]


@TRANSFORMS.register_module()
class RandomAffine(Transform):
    """Rotate, shear, scale and move the picture about its middle; its size stays.

    Args:
        degrees: largest angle of the rotation, either way.
        translate: largest move, as a share of the height and of the width.
        scale: range of the factor, drawn on a logarithmic scale; above 1 enlarges.
        shear: largest angle of the horizontal shear in degrees, either way.
        fill: RGB colour of what comes in from outside.
        prob: how often.
    """

    def __init__(
        self,
        degrees: float = 10.0,
        translate: float = 0.1,
        scale: Sequence[float] = (0.9, 1.1),
        shear: float = 0.0,
        fill: Sequence[int] = WHITE,
        prob: float = 1.0,
    ) -> None:
        self.degrees = check_number(degrees, "RandomAffine: degrees", 180)
        self.translate = check_number(translate, "RandomAffine: translate")
        self.scale = check_range(scale, "RandomAffine: scale", 1e-3, 1e3)
        self.shear = check_number(shear, "RandomAffine: shear", 80)
        self.fill = check_colour(fill, "RandomAffine: fill")
        self.prob = check_number(prob, "RandomAffine: prob")

    def matrix(self, height: int, width: int) -> np.ndarray:
        """Draw the map from old to new pixel positions (x, y, 1), shape (2, 3)."""
        angle = math.radians(random.uniform(-self.degrees, self.degrees))
        shear = math.tan(math.radians(random.uniform(-self.shear, self.shear)))
        factor = log_uniform(*self.scale)
        move_x = random.uniform(-self.translate, self.translate) * width
        move_y = random.uniform(-self.translate, self.translate) * height
        rotation = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
        linear = factor * rotation @ np.array([[1.0, shear], [0.0, 1.0]])
        centre, move = np.array([(width - 1) / 2, (height - 1) / 2]), np.array([move_x, move_y])
        return np.column_stack([linear, centre + move - linear @ centre])

    def apply(self, img: Image) -> Image:
        """Move, or not."""
        import cv2

        if not happens(self.prob):
            return img
        height, width = img.shape[:2]
        moved = cv2.warpAffine(
            np.ascontiguousarray(img),
            self.matrix(height, width),
            (width, height),
            flags=cv2.INTER_LINEAR,
            borderMode=cv2.BORDER_CONSTANT,
            borderValue=fill_of(img, self.fill),
        )
        return hwc(moved)
