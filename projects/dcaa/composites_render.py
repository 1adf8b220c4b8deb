"""Scenes of the composite set: cut-outs on a ground, and the four conditions of the target pictures.

A pixel belongs to the last cut-out whose opacity there, once scaled, is at least half (127.5 of 255). The
conditions know no depth:

    plain  x
    dark   255 * g * (x / 255)^p * tint + noise
    haze   x * (1 - a(y)) + A * a(y), a falling linearly from the top row to the bottom row
    rain   streaks over blur(m + c * (x - m)), m the mean colour

with a colour x of 0 to 255 and g, p, a, A, c drawn for each picture.
"""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np
from numpy.typing import NDArray

from alimm.datasets.emoji_scenes import paste

CONDITIONS = ("plain", "dark", "haze", "rain")
"""Names of the target's conditions in the order of their ids."""
SIDES = (0.3, 0.7)
"""Bounds of a cut-out's longer side, as a share of the picture's height."""

Floats = NDArray[np.float32]
Picture = NDArray[np.uint8]


def compose_scene(
    ground: Floats,
    drawings: Sequence[tuple[Picture, int]],
    generator: np.random.Generator,
    sides: tuple[float, float] = SIDES,
) -> tuple[Picture, Picture]:
    """Lay cut-outs over a ground at random scales and places, mirrored or not; later ones hide earlier ones.

    The middle of a cut-out lies inside the picture, its rim may be cut off.

    Args:
        ground: (H, W, 3), RGB of 0 to 255; left as it is.
        drawings: cut-outs (h, w, 4) with RGB multiplied by the opacity, each with its label.
        generator: of the random choices.
        sides: bounds of a cut-out's longer side, as a share of H.

    Returns:
        The picture (H, W, 3) and the labels (H, W), 0 where the ground is seen.
    """
    height, width = ground.shape[:2]
    picture = ground.astype(np.float32, copy=True)
    labels = np.zeros((height, width), np.uint8)
    for drawing, label in drawings:
        scaled = _scaled(drawing, max(round(height * float(generator.uniform(*sides))), 2))
        if generator.random() < 0.5:
            scaled = scaled[:, ::-1]
        top = int(generator.integers(height)) - scaled.shape[0] // 2
        left = int(generator.integers(width)) - scaled.shape[1] // 2
        seen = scaled[max(-top, 0) : height - top, max(-left, 0) : width - left]
        labels[paste(picture, seen, max(top, 0), max(left, 0))] = label
    return to_picture(picture), labels


def _scaled(drawing: Picture, longest: int) -> Floats:
    height, width = drawing.shape[:2]
    factor = longest / max(height, width)
    size = max(round(width * factor), 1), max(round(height * factor), 1)
    method = cv2.INTER_AREA if factor < 1 else cv2.INTER_LINEAR
    scaled: Floats = cv2.resize(drawing.astype(np.float32), size, interpolation=method)
    return scaled


def drawn_ground(generator: np.random.Generator, height: int, width: int) -> Floats:
    """A ground as in clip art: one colour, a slope of two, a horizon, or stripes; (height, width, 3), RGB, 0 to 255."""
    first, second = generator.uniform(60, 250, (2, 3))
    if generator.random() < 0.3:
        first = np.full(3, 255.0)
    rows, columns = np.mgrid[0:height, 0:width] / float(max(height, width))
    kind = int(generator.integers(4))
    if kind == 0:
        share = np.zeros((height, width))
    elif kind == 1:
        angle = float(generator.uniform(0, np.pi))
        slope = np.cos(angle) * columns + np.sin(angle) * rows
        share = (slope - slope.min()) / max(float(np.ptp(slope)), 1e-6)
    elif kind == 2:
        wave = 0.03 * np.sin(columns * float(generator.uniform(4, 16)))
        share = (rows + wave > float(generator.uniform(0.3, 0.6))).astype(np.float64)
    else:
        turns = float(generator.uniform(3, 8))
        share = ((columns * turns + rows * float(generator.uniform(-4, 4))) % 1 > 0.5).astype(np.float64)
    return (first + share[..., None] * (second - first)).astype(np.float32)


def photo_ground(photograph: Picture, generator: np.random.Generator, height: int, width: int) -> Floats:
    """A random part of a photograph with the picture's shape, mirrored or not: (height, width, 3), RGB of 0 to 255."""
    full_height, full_width = photograph.shape[:2]
    part = min(full_height / height, full_width / width) * float(generator.uniform(0.5, 1))
    rows, columns = max(int(part * height), 1), max(int(part * width), 1)
    top = int(generator.integers(full_height - rows + 1))
    left = int(generator.integers(full_width - columns + 1))
    crop = photograph[top : top + rows, left : left + columns]
    if generator.random() < 0.5:
        crop = np.ascontiguousarray(crop[:, ::-1])
    ground: Floats = cv2.resize(crop, (width, height), interpolation=cv2.INTER_AREA).astype(np.float32)
    return ground


def composite_condition(picture: Picture, condition: str, generator: np.random.Generator) -> Picture:
    """Show a picture under a condition.

    Args:
        picture: (H, W, 3), RGB.
        condition: one of `CONDITIONS`.
        generator: of the condition's strength and details.

    Raises:
        ValueError: there is no such condition.
    """
    if condition not in CONDITIONS:
        raise ValueError(f"condition must be one of {', '.join(CONDITIONS)}, got {condition!r}")
    values = picture.astype(np.float32)
    if condition == "dark":
        values = _dark(values, generator)
    elif condition == "haze":
        values = _haze(values, generator)
    elif condition == "rain":
        values = _rain(values, generator)
    return to_picture(values)


def _dark(values: Floats, generator: np.random.Generator) -> Floats:
    gain, power = generator.uniform(0.35, 0.55), generator.uniform(1.3, 1.8)
    tint = np.array([0.85, 0.95, 1.1])
    noise = generator.normal(0, generator.uniform(3, 7), values.shape)
    return (255 * gain * (values / 255) ** power * tint + noise).astype(np.float32)


def _haze(values: Floats, generator: np.random.Generator) -> Floats:
    airlight = generator.uniform(195, 235) + generator.uniform(-6, 6, 3)
    dense, thin = generator.uniform(0.65, 0.85), generator.uniform(0.3, 0.5)
    share = np.linspace(dense, thin, values.shape[0])[:, None, None]
    return (values * (1 - share) + airlight * share).astype(np.float32)


def _rain(values: Floats, generator: np.random.Generator) -> Floats:
    mean = values.mean((0, 1))
    values = mean + np.float32(generator.uniform(0.45, 0.65)) * (values - mean)
    values = cv2.GaussianBlur(values, (0, 0), float(generator.uniform(0.6, 1.0)))
    height, width = values.shape[:2]
    layer = np.zeros((height, width), np.float32)
    slant = float(generator.uniform(-0.4, 0.4))
    for _ in range(int(height * width * generator.uniform(0.006, 0.010))):
        left, top = (
            int(generator.integers(-width // 4, width + width // 4)),
            int(generator.integers(-height // 8, height)),
        )
        length = height * float(generator.uniform(0.08, 0.18))
        end = round(left + slant * length), round(top + length)
        cv2.line(layer, (left, top), end, float(generator.uniform(0.25, 0.6)), 1, cv2.LINE_AA)
    share = cv2.GaussianBlur(layer, (3, 3), 0.5)[..., None]
    rainy: Floats = values * (1 - share) + np.float32(215) * share
    return rainy


def to_picture(values: Floats) -> Picture:
    """Round and clip to uint8."""
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)
