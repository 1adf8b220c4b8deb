"""From a picture file, of whatever kind, to RGB uint8."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from alimm.registry import TRANSFORMS

WHITE = (255, 255, 255)


def check_colour(colour: Sequence[int], name: str) -> tuple[int, int, int]:
    """Return an RGB colour as a tuple.

    Raises:
        ValueError: it is not three whole numbers of 0 to 255.
    """
    values = tuple(colour)
    if len(values) != 3 or not all(isinstance(value, int) and 0 <= value <= 255 for value in values):
        raise ValueError(f"{name} must be three whole numbers of 0 to 255 (red, green, blue), got {colour!r}")
    return values[0], values[1], values[2]


def composite(pixels: NDArray[np.uint8], background: Sequence[int] = WHITE) -> NDArray[np.uint8]:
    """Lay RGBA pixels (..., 4) over one colour; uint8 (..., 3), rounded to nearest."""
    alpha = pixels[..., 3:].astype(np.uint16)
    mixed = pixels[..., :3] * alpha + np.asarray(background, np.uint16) * (255 - alpha)
    return ((mixed + 127) // 255).astype(np.uint8)


def to_rgb(img: NDArray[np.uint8], background: Sequence[int] = WHITE) -> NDArray[np.uint8]:
    """Grey (H, W) or (H, W, 1), RGB (H, W, 3) or RGBA (H, W, 4) to RGB (H, W, 3).

    Raises:
        ValueError: the array is no such picture.
    """
    if not isinstance(img, np.ndarray) or img.dtype != np.uint8:
        kind = img.dtype if isinstance(img, np.ndarray) else type(img).__name__
        raise ValueError(f"a picture must be a uint8 array, got {kind}")
    if img.ndim not in (2, 3) or img.size == 0 or (img.ndim == 3 and img.shape[2] not in (1, 3, 4)):
        raise ValueError(f"a picture must have the shape (H, W), (H, W, 1), (H, W, 3) or (H, W, 4), got {img.shape}")
    if img.ndim == 2 or img.shape[2] == 1:
        return np.repeat(img.reshape(*img.shape[:2], 1), 3, axis=2)
    return composite(img, background) if img.shape[2] == 4 else img


def read_picture(path: str | Path, background: Sequence[int] = WHITE) -> NDArray[np.uint8]:
    """Read a picture file as RGB uint8 (H, W, 3), turned upright as its EXIF entry says.

    Any format of Pillow: palettes, CMYK, 16-bit grey and transparency included; of a moving picture the first frame.

    Raises:
        ValueError: the file is missing, is no picture, or is cut off or damaged. The message names it.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as opened:
            opened.load()
            picture = ImageOps.exif_transpose(opened)
            if picture.mode.startswith("I"):
                return to_rgb(_from_16_bit(np.asarray(picture)))
            if picture.has_transparency_data:
                return composite(np.asarray(picture.convert("RGBA")), background)
            if picture.mode == "F":
                raise ValueError("its pixels are floats; store it with 8 or 16 bits")
            return np.array(picture.convert("RGB"))
    except FileNotFoundError:
        raise ValueError(f"there is no picture {path}") from None
    # Pillow's decoders raise many kinds of errors on damaged data: OSError, SyntaxError, struct.error, ...
    except Exception as error:
        raise ValueError(f"{path} cannot be read as a picture: {error}. Replace the file or leave it out") from error


def _from_16_bit(values: NDArray[Any]) -> NDArray[np.uint8]:
    if values.min() < 0 or values.max() > 65535:
        raise ValueError("its pixels have 32 bits; store it with 8 or 16")
    return (values >> 8).astype(np.uint8)


@TRANSFORMS.register_module()
class LoadImage:
    """Read ``img_path`` into ``img``, RGB uint8 of shape (H, W, 3); sets ``img_shape`` and ``ori_shape``.

    Where the item has an ``img`` already, that one is brought to three channels and no file is read.

    Args:
        background: RGB colour behind transparent pictures.
    """

    def __init__(self, background: Sequence[int] = WHITE) -> None:
        self.background = check_colour(background, "LoadImage: background")

    def __call__(self, results: dict[str, Any]) -> dict[str, Any]:
        """Load the picture of one item.

        Raises:
            ValueError: it cannot be read. The message names the file and, where known, the line that lists it.
        """
        if results.get("img") is not None:
            img = to_rgb(results["img"], self.background)
        elif "img_path" in results:
            try:
                img = read_picture(results["img_path"], self.background)
            except ValueError as error:
                place = results.get("ann_place")
                raise ValueError(f"{error} (listed at {place})" if place else str(error)) from error
        else:
            raise ValueError(f"LoadImage needs img_path or img in the item, got the keys {', '.join(sorted(results))}")
        results["img"] = img
        results["img_shape"] = results["ori_shape"] = img.shape[:2]
        return results

    def __repr__(self) -> str:
        return f"LoadImage(background={self.background!r})"
