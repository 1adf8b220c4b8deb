"""PNGs of what an adapted model sees: attention, ambivalence, predictions, and a sheet of conditions by methods.

Pure functions: arrays in, the bytes of a PNG out. Pictures are RGB. Small pictures are enlarged and large ones reduced
by whole factors, label maps without mixing classes, so that the text beside them is legible at any size.
"""

from __future__ import annotations

import io
from collections.abc import Sequence

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

MIN_WIDTH, MAX_WIDTH = 256, 768
"""Width of a tile in pixels; whole factors bring every picture between them, or as near as they can."""

_GAP = 8
_LINE = 22
_FONT_SIZE = 14

Picture = NDArray[np.uint8]
"""RGB, (height, width, 3)."""


def labels_rgb(labels_HW: NDArray[np.integer], palette: Sequence[Sequence[int]], ignore_index: int = 255) -> Picture:
    """Colour a label map; pixels to ignore become black.

    Args:
        labels_HW: 0 to C - 1, or ``ignore_index``.
        palette: C colours (red, green, blue), 0 to 255.
        ignore_index: value of the pixels without a label.

    Raises:
        ValueError: a label without a colour, or no label map.
    """
    if labels_HW.ndim != 2 or labels_HW.dtype.kind not in "iu":
        raise ValueError(
            f"a label map holds whole numbers, (height, width); got {labels_HW.dtype} of shape {labels_HW.shape}"
        )
    known = labels_HW != ignore_index
    beyond = np.unique(labels_HW[known & ((labels_HW < 0) | (labels_HW >= len(palette)))])
    if len(beyond):
        raise ValueError(
            f"the palette has {len(palette)} colours, but the label map holds {beyond[:8].tolist()}: give a colour a "
            f"class, or mark pixels without a class as {ignore_index}"
        )
    colours = np.concatenate([np.asarray(palette, np.uint8).reshape(-1, 3), np.zeros((1, 3), np.uint8)])
    return colours[np.where(known, labels_HW, len(palette)).astype(np.int64)]


def heat_rgb(values_HW: NDArray[np.floating]) -> Picture:
    """Colour values of 0 (dark violet) to 1 (yellow); those beyond are clipped, NaN is 0."""
    levels = np.rint(np.clip(np.nan_to_num(values_HW), 0, 1) * 255).astype(np.uint8)
    return np.ascontiguousarray(cv2.applyColorMap(levels, cv2.COLORMAP_VIRIDIS)[:, :, ::-1])


def attention_png(image: Picture, mask_KHW: NDArray[np.floating], names: Sequence[str]) -> bytes:
    """The picture, and beside it the weight that the fusion gives to each condition.

    Args:
        image: (H, W, 3).
        mask_KHW: weights, 0 to 1, on any grid: enlarged to the picture.
        names: of the K conditions.

    Raises:
        ValueError: names and maps do not fit, or it is no picture.
    """
    if mask_KHW.ndim != 3 or len(mask_KHW) != len(names):
        raise ValueError(
            f"expected one map of weights for each of the conditions {', '.join(names)}, got {mask_KHW.shape}"
        )
    tiles = [_tile(_checked(image), "image", smooth=True)]
    for name, mask_HW in zip(names, mask_KHW, strict=True):
        tiles.append(_heat_tile(mask_HW, image, f"{name}, mean {float(np.mean(mask_HW)):.2f}"))
    return _png(_stack([_beside(tiles), _scale("weight 0", "1")]))


def ambivalence_png(
    image: Picture,
    d_HW: NDArray[np.floating],
    easy_HW: NDArray[np.floating],
    hard_HW: NDArray[np.floating],
    labels_HW: NDArray[np.integer],
    palette: Sequence[Sequence[int]],
    ignore_index: int = 255,
) -> bytes:
    """What self-training makes of a target picture.

    Args:
        image: (H, W, 3).
        d_HW: how much the prediction looks like one of the source, 0 to 1, on any grid.
        easy_HW: weights of the easy pixels, 0 to 1.
        hard_HW: mask of the hard pixels.
        labels_HW: pseudo labels.
        palette: a colour a class.
        ignore_index: label of the pixels without a pseudo label.
    """
    share = float(np.mean(np.asarray(hard_HW) > 0))
    labelled = float(np.mean(labels_HW != ignore_index))
    tiles = [
        _tile(_checked(image), "image", smooth=True),
        _heat_tile(d_HW, image, f"like source, mean {float(np.mean(d_HW)):.2f}"),
        _heat_tile(easy_HW, image, "weight of easy pixels"),
        _tile(_nearest(heat_rgb((np.asarray(hard_HW) > 0).astype(np.float32)), image), f"hard, {share:.0%}"),
        _tile(_nearest(labels_rgb(labels_HW, palette, ignore_index), image), f"pseudo labels, {labelled:.0%}"),
    ]
    return _png(_stack([_beside(tiles), _scale("0", "1")]))


def prediction_png(
    image: Picture,
    gt_HW: NDArray[np.integer] | None,
    prediction_HW: NDArray[np.integer],
    palette: Sequence[Sequence[int]],
    classes: Sequence[str],
    ignore_index: int = 255,
) -> bytes:
    """The picture, its ground truth, the prediction and what is wrong in it, above the names of the classes.

    Args:
        image: (H, W, 3).
        gt_HW: true classes, or None: then neither they nor the mistakes are shown.
        prediction_HW: predicted classes.
        palette: a colour a class.
        classes: names.
        ignore_index: label of the pixels that do not count.

    Raises:
        ValueError: a label map is not of the picture's size, or a label has no colour.
    """
    image = _checked(image)
    for name, labels in (("ground truth", gt_HW), ("prediction", prediction_HW)):
        if labels is not None and labels.shape != image.shape[:2]:
            raise ValueError(f"the {name} is {labels.shape}, the picture {image.shape[:2]}: they must be of one size")
    tiles, occurring = [_tile(image, "image", smooth=True)], set(np.unique(prediction_HW).tolist())
    title = "prediction"
    if gt_HW is not None:
        counts = gt_HW != ignore_index
        wrong = counts & (gt_HW != prediction_HW)
        occurring |= set(np.unique(gt_HW).tolist())
        title = f"prediction, {1 - wrong.sum() / max(counts.sum(), 1):.1%} right"
        tiles.append(_tile(labels_rgb(gt_HW, palette, ignore_index), "ground truth"))
    tiles.append(_tile(labels_rgb(prediction_HW, palette, ignore_index), title))
    if gt_HW is not None:
        grey = image.mean(axis=2, keepdims=True) * 0.5
        marked = np.where(wrong[:, :, None], np.array([255, 40, 40]), np.broadcast_to(grey, image.shape))
        tiles.append(_tile(marked.astype(np.uint8), f"wrong, {wrong.sum()} pixels"))
    row = _beside(tiles)
    return _png(_stack([row, _legend(occurring, palette, classes, row.shape[1], ignore_index)]))


def gallery_png(
    rows: Sequence[tuple[str, Sequence[NDArray[np.integer]]]],
    columns: Sequence[str],
    palette: Sequence[Sequence[int]],
    classes: Sequence[str],
    ignore_index: int = 255,
) -> bytes:
    """A sheet: a row a condition, a column for the picture, for its ground truth and for each method.

    Args:
        rows: title, and as many maps as there are columns: a picture (H, W, 3) or a label map (H, W), all of a row of
            one size.
        columns: titles.
        palette: a colour a class.
        classes: names.
        ignore_index: label of the pixels without a class.

    Raises:
        ValueError: no row, a row with another number of maps than columns or with maps of several sizes.
    """
    if not rows:
        raise ValueError("the gallery has no row: give (title, maps) of at least one condition")
    lines, occurring = [], set[int]()
    margin = 12 + max(int(_font().getlength(title)) for title, _ in rows)
    for number, (title, maps) in enumerate(rows):
        if len(maps) != len(columns):
            raise ValueError(f"row {title!r} has {len(maps)} maps for the columns {', '.join(columns)}")
        if len({picture.shape[:2] for picture in maps}) > 1:
            raise ValueError(f"the maps of row {title!r} differ in size: {[picture.shape[:2] for picture in maps]}")
        tiles = []
        for column, picture in zip(columns, maps, strict=True):
            if picture.ndim == 2:
                occurring |= set(np.unique(picture).tolist())
                rgb = labels_rgb(picture, palette, ignore_index)
            else:
                rgb = _checked(picture)
            tiles.append(_tile(rgb, column if number == 0 else None, smooth=picture.ndim == 3))
        side = np.full((tiles[0].shape[0], margin, 3), 255, np.uint8)
        top = (len(side) + (_LINE if number == 0 else 0) - _LINE) // 2
        side[top : top + _LINE] = _text(title, margin)
        lines.append(_beside([side, *tiles]))
    width = max(line.shape[1] for line in lines)
    return _png(_stack([*lines, _legend(occurring, palette, classes, width, ignore_index)]))


def _checked(image: NDArray[np.integer]) -> Picture:
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise ValueError(f"a picture is RGB, uint8 (height, width, 3); got {image.dtype} of shape {image.shape}")
    return image.astype(np.uint8, copy=False)


def _fit(picture: Picture, smooth: bool) -> Picture:
    """Bring the width between the limits by a whole factor, without mixing pixels unless ``smooth``."""
    height, width = picture.shape[:2]
    if width < MIN_WIDTH:
        factor = -(-MIN_WIDTH // width)
        return picture.repeat(factor, axis=0).repeat(factor, axis=1)
    factor = -(-width // MAX_WIDTH)
    if factor == 1:
        return picture
    size = (max(width // factor, 1), max(height // factor, 1))
    small = cv2.resize(picture, size, interpolation=cv2.INTER_AREA if smooth else cv2.INTER_NEAREST_EXACT)
    return np.asarray(small, np.uint8)


def _nearest(picture: Picture, like: Picture) -> Picture:
    size = (like.shape[1], like.shape[0])
    return np.asarray(cv2.resize(picture, size, interpolation=cv2.INTER_NEAREST_EXACT), np.uint8)


def _heat_tile(values_HW: NDArray[np.floating], like: Picture, title: str) -> Picture:
    values = np.asarray(values_HW, np.float32)
    if values.ndim != 2:
        raise ValueError(f"{title.split(',')[0]!r}: a map is (height, width), got {values.shape}")
    large = cv2.resize(values, (like.shape[1], like.shape[0]), interpolation=cv2.INTER_LINEAR)
    return _tile(heat_rgb(large), title, smooth=True)


def _tile(picture: Picture, title: str | None, smooth: bool = False) -> Picture:
    fitted = _fit(picture, smooth)
    return fitted if title is None else np.concatenate([_text(title, fitted.shape[1]), fitted])


def _font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size=_FONT_SIZE)


def _text(text: str, width: int) -> Picture:
    """One line, cut with two dots where it is too long."""
    font = _font()
    if font.getlength(text) > width:
        while text and font.getlength(text + "..") > width:
            text = text[:-1]
        text += ".."
    strip = Image.new("RGB", (width, _LINE), "white")
    ImageDraw.Draw(strip).text((0, 1), text, fill="black", font=font)
    return np.asarray(strip)


def _scale(low: str, high: str) -> Picture:
    """A bar of the colours of `heat_rgb` between its two ends."""
    bar = np.full((_LINE, 128, 3), 255, np.uint8)
    bar[4:-4] = heat_rgb(np.linspace(0, 1, 128)[None])
    ends = [_text(end, int(_font().getlength(end)) + 2) for end in (low, high)]
    return _beside([ends[0], bar, ends[1]])


def _legend(
    occurring: set[int], palette: Sequence[Sequence[int]], classes: Sequence[str], width: int, ignore_index: int
) -> Picture:
    """The names of the classes that occur, each behind its colour, in as many lines as they need."""
    entries = [(str(classes[c]), palette[c]) for c in sorted(occurring - {ignore_index})]
    if ignore_index in occurring:
        entries.append(("not labelled", (0, 0, 0)))
    lines: list[list[Picture]] = [[]]
    for name, colour in entries:
        swatch = np.full((_LINE, 16, 3), 255, np.uint8)
        swatch[3:-3] = colour
        entry = _beside([swatch, _text(name, int(_font().getlength(name)) + 10)])
        if lines[-1] and sum(part.shape[1] + _GAP for part in lines[-1]) + entry.shape[1] > width:
            lines.append([])
        lines[-1].append(entry)
    return _stack([_beside(line) for line in lines if line])


def _beside(pictures: Sequence[Picture]) -> Picture:
    return _joined(pictures, axis=1)


def _stack(pictures: Sequence[Picture]) -> Picture:
    return _joined(pictures, axis=0)


def _joined(pictures: Sequence[Picture], axis: int) -> Picture:
    """Join along an axis with a gap, white where one is shorter than the others; bottoms and left edges are even."""
    across = max(picture.shape[1 - axis] for picture in pictures)
    parts: list[Picture] = []
    for picture in pictures:
        missing = across - picture.shape[1 - axis]
        pads = [(missing, 0), (0, 0)] if axis == 1 else [(0, 0), (0, missing)]
        if parts:
            pads[axis] = (_GAP, 0)
        parts.append(np.pad(picture, [*pads, (0, 0)], constant_values=255))
    return np.concatenate(parts, axis=axis)


def _png(picture: Picture) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.pad(picture, [(_GAP, _GAP), (_GAP, _GAP), (0, 0)], constant_values=255)).save(stream, "PNG")
    return stream.getvalue()
