"""Scenes out of EmojiProducts: drawings cut out by their transparency and pasted on generated backgrounds.

What the detection set (``prepare_emoji_coco``) and the video clips (``prepare_emoji_clips``) share. A pixel belongs to
a pasted drawing where the drawing is at least half opaque.
"""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from alimm.datasets.emoji_products import VENDORS, load_catalogue

CLASSES = ("animal-mammal", "clothing", "food-fruit", "musical-instrument", "plant-flower", "transport-ground")
"""Sub-groups of EmojiProducts, in the order of their labels."""
SPLIT_VENDORS = {"train": ("noto", "twemoji"), "val": ("fluent",)}
"""Whose drawings a split shows: products of the same sub-groups, never the same picture."""
RECIPE = "recipe.json"

Floats = NDArray[np.float32]


@lru_cache(maxsize=8)
def rows_of(split: str, label: int) -> NDArray[np.int64]:
    """Rows of the catalogue with the drawings of one class on one side of the split."""
    catalogue = load_catalogue()
    vendors = [VENDORS.index(name) for name in SPLIT_VENDORS[split]]
    belongs = np.array([identity["subgroup"] == CLASSES[label] for identity in catalogue.identities])
    rows: NDArray[np.int64] = np.flatnonzero(belongs[catalogue.identity] & np.isin(catalogue.vendor, vendors))
    return rows


def bounding_box(mask: NDArray[np.bool_]) -> tuple[int, int, int, int]:
    """The smallest box ``(left, top, width, height)`` with all True pixels of a mask (H, W) that has some."""
    columns, rows = np.flatnonzero(mask.any(0)), np.flatnonzero(mask.any(1))
    left, top = int(columns[0]), int(rows[0])
    return left, top, int(columns[-1]) - left + 1, int(rows[-1]) - top + 1


def cut_out(row: int, side: int) -> Floats:
    """A drawing without its transparent margin, its longer side ``side`` pixels long.

    Returns:
        float32 (h, w, 4) of 0 to 255: RGB multiplied by the opacity, and the opacity. Resized in this form, so that the
        unseen colours of transparent pixels do not bleed into the edge.
    """
    import cv2

    pixels = load_catalogue().pixels[row]
    left, top, width, height = bounding_box(pixels[..., 3] >= 128)
    drawing = pixels[top : top + height, left : left + width].astype(np.float32)
    drawing[..., :3] *= drawing[..., 3:] / 255
    factor = side / max(width, height)
    size = (max(round(width * factor), 1), max(round(height * factor), 1))
    resized: Floats = cv2.resize(drawing, size, interpolation=cv2.INTER_AREA if factor < 1 else cv2.INTER_LINEAR)
    return resized


def background(generator: np.random.Generator, height: int, width: int) -> Floats:
    """A smooth field of a few dull colours with some noise: float32 (height, width, 3), RGB of 0 to 255."""
    import cv2

    coarse = generator.uniform(70, 200, (4, 4, 3)).astype(np.float32)
    smooth = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
    grey = smooth.mean(2, keepdims=True)
    noise = generator.normal(0, 4, (height, width, 1)).astype(np.float32)
    dull: Floats = np.clip(grey + 0.5 * (smooth - grey) + noise, 0, 255)
    return dull


def paste(picture: Floats, drawing: Floats, top: int, left: int) -> NDArray[np.bool_]:
    """Lay a cut-out over a picture (H, W, 3), in place; it must fit in.

    Returns:
        The mask (H, W) of the pixels that the drawing covers.
    """
    height, width = drawing.shape[:2]
    assert 0 <= top <= picture.shape[0] - height, "the drawing must lie inside"
    assert 0 <= left <= picture.shape[1] - width, "the drawing must lie inside"
    patch = picture[top : top + height, left : left + width]
    patch *= 1 - drawing[..., 3:] / 255
    patch += drawing[..., :3]
    mask = np.zeros(picture.shape[:2], bool)
    mask[top : top + height, left : left + width] = drawing[..., 3] >= 127.5
    return mask


def write_picture(path: Path, picture: Floats) -> None:
    """Write a picture (H, W, 3) of 0 to 255 in the format of the name's ending.

    Raises:
        OSError: it cannot be written.
    """
    import cv2

    whole = np.clip(np.rint(picture), 0, 255).astype(np.uint8)
    if not cv2.imwrite(str(path), whole[..., ::-1]):
        raise OSError(f"{path} could not be written")


def check_options(bounds: dict[str, tuple[int, int, int]]) -> None:
    """Refuse numbers out of bounds.

    Args:
        bounds: name of the option -> (value, least, most).

    Raises:
        ValueError: a value is out of bounds; the message holds the option to give.
    """
    for name, (value, least, most) in bounds.items():
        if not least <= value <= most:
            raise ValueError(f"{name} must be {least} to {most}, got {value}: give such a number with --{name}")


def is_made(out: Path, recipe: dict[str, Any]) -> bool:
    """Whether ``out`` holds what the recipe makes: the folder is put there whole, and its last file is the recipe."""
    try:
        same: bool = json.loads((out / RECIPE).read_text(encoding="utf-8")) == recipe
    except (OSError, ValueError):
        return False
    return same
