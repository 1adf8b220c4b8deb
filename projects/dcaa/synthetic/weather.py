"""Weather on a rendered street, from its depth and labels.

With s the severity, I the clear picture and W the full effect, the result is I + s (W - I). Full effects, d in metres:

    fog    W = I t + A (1 - t), t = exp(-b d); b in [0.03, 0.07], A in [190, 215]
    rain   contrast pressed together, weak fog, the upper half mirrored in the wet ground, 60 to 140 streaks
    night  W = 255 (I / 255)^g gain (0.85, 0.9, 1.1) + warm lights + noise of 9; g in [1.4, 1.9], gain in [0.18, 0.34]
    snow   white cover where smooth noise on ground, trees and car roofs is high, weak fog, flakes on 2 % of the pixels

Fog is Koschmieder's law with a constant density; the other three are made to look like their names and to move the
statistics of a picture in ways of their own, not to obey physics. Labels stay as they are under all of them.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from alimm.projects.dcaa.synthetic.noise import Field, smooth_noise
from alimm.projects.dcaa.synthetic.scene import BUILDING, CAR, CLASSES, POLE, ROAD, SIDEWALK, SKY, VEGETATION

Labels = NDArray[np.uint8]
Effect = Callable[[Field, Field, Labels, np.random.Generator], Field]


def apply_weather(
    image: NDArray[np.float32] | NDArray[np.uint8],
    depth: NDArray[np.float32],
    label: Labels,
    condition: str,
    severity: float,
    generator: np.random.Generator,
) -> NDArray[np.uint8]:
    """Put weather on a picture.

    Args:
        image: (H, W, 3), RGB of 0 to 255, in clear daylight.
        depth: (H, W), metres.
        label: uint8 (H, W), classes of `scene.CLASSES`.
        condition: a name of `CONDITIONS`.
        severity: s of [0, 1]; 0 gives the picture rounded.
        generator: of the density, the light, streaks and flakes.

    Returns:
        uint8 (H, W, 3), RGB.

    Raises:
        ValueError: the condition is unknown, the severity outside [0, 1], or the maps do not fit the picture.
    """
    if condition not in _EFFECTS:
        raise ValueError(f"apply_weather: condition must be one of {', '.join(CONDITIONS)}, got {condition!r}")
    if not 0 <= severity <= 1:
        raise ValueError(f"apply_weather: severity must be in [0, 1], got {severity!r}")
    if image.ndim != 3 or image.shape[2] != 3 or depth.shape != image.shape[:2] or label.shape != image.shape[:2]:
        raise ValueError(
            f"apply_weather: expected a picture (H, W, 3) with depth and label (H, W), got {image.shape}, "
            f"{depth.shape} and {label.shape}"
        )
    clear = image.astype(np.float64)
    full = _EFFECTS[condition](clear, depth.astype(np.float64), label, generator)
    return np.clip(np.rint(clear + severity * (full - clear)), 0, 255).astype(np.uint8)


def _clear(image: Field, depth: Field, label: Labels, generator: np.random.Generator) -> Field:
    return image


def _haze(image: Field, depth: Field, density: float, air: Field) -> Field:
    passed = np.exp(-density * depth)[..., None]
    return image * passed + air * (1 - passed)


def _fog(image: Field, depth: Field, label: Labels, generator: np.random.Generator) -> Field:
    density, air = generator.uniform(0.03, 0.07), generator.uniform(190, 215)
    return _haze(image, depth, density, air * np.array([0.99, 1.0, 1.01]))


def _rain(image: Field, depth: Field, label: Labels, generator: np.random.Generator) -> Field:
    height, width = label.shape
    contrast, grey = generator.uniform(0.5, 0.65), generator.uniform(92, 112)
    air = generator.uniform(135, 160) * np.array([0.96, 1.0, 1.05])
    dull = grey * np.array([0.95, 1.0, 1.06]) + contrast * (image - image.mean(axis=(0, 1)))
    dull = _haze(dull, depth, generator.uniform(0.008, 0.016), air)
    dull += generator.uniform(-6, 6)
    _mirror(dull, label, generator.uniform(0.35, 0.6))
    streaks = _streaks(height, width, generator)
    return dull + generator.uniform(35, 60) * streaks[..., None]


def _mirror(image: Field, label: Labels, strength: float) -> None:
    """Mirror what is above the road's far end in road (and, half as strong, sidewalk), in place."""
    height = label.shape[0]
    rows = np.flatnonzero((label == ROAD).any(axis=1))
    if not len(rows):
        return
    first = int(rows[0])
    source = np.clip(2 * first - 1 - np.arange(first, height), 0, height - 1)
    share = strength * np.where(label == ROAD, 1.0, np.where(label == SIDEWALK, 0.5, 0.0))[first:, :, None]
    image[first:] += share * (0.85 * image[source] - image[first:])


def _streaks(height: int, width: int, generator: np.random.Generator) -> Field:
    """1 on thin slanted lines (H, W), 0 elsewhere; as many on a picture of any size, and as long for its height."""
    number = round(int(generator.integers(60, 141)) * width / (2 * height))
    slant, unit = generator.uniform(-0.35, 0.35), max(1, round(height / 64))
    along = np.arange(round(generator.uniform(6, 11) * height / 64))
    top = generator.uniform(-0.1, 1.0, number) * height
    left = generator.uniform(-0.1, 1.1, number) * width
    y = np.floor(top[:, None] + along).astype(np.int64)
    x = np.floor(left[:, None] + slant * along).astype(np.int64)
    field = np.zeros((height, width))
    for shift in range(unit):
        inside = (y >= 0) & (y < height) & (x + shift >= 0) & (x + shift < width)
        field[y[inside], x[inside] + shift] = 1
    return field


def _night(image: Field, depth: Field, label: Labels, generator: np.random.Generator) -> Field:
    gamma, gain = generator.uniform(1.4, 1.9), generator.uniform(0.18, 0.34)
    dark = 255 * gain * np.array([0.85, 0.9, 1.1]) * (image / 255) ** gamma
    dark = np.where((label == SKY)[..., None], 0.45 * dark, dark)
    dark += _lights(depth, label, generator)
    return dark + 9 * generator.standard_normal(image.shape)


def _lights(depth: Field, label: Labels, generator: np.random.Generator) -> Field:
    """Warm light (H, W, 3) around lamps: pixels drawn from poles, cars and houses, larger where they are near."""
    height, width = label.shape
    # Lamps are at the tops of poles, head lamps anywhere on cars, lit windows anywhere on houses.
    weight = np.zeros(len(CLASSES))
    weight[[POLE, CAR, BUILDING]] = 6.0, 4.0, 1.0
    total = np.cumsum(weight[label].ravel())
    number = int(generator.integers(5, 11))
    if total[-1] == 0:
        return np.zeros((height, width, 3))
    place = np.searchsorted(total, generator.random(number) * total[-1], side="right")
    row, column = np.divmod(np.minimum(place, height * width - 1), width)
    reach = height / 64 * np.clip(60 / depth[row, column], 1.6, 7.0)
    power = generator.uniform(60, 170, number)
    down = np.exp(-0.5 * ((np.arange(height)[:, None] - row) / reach) ** 2)
    right = np.exp(-0.5 * ((np.arange(width)[:, None] - column) / reach) ** 2)
    return ((down * power) @ right.T)[..., None] * np.array([1.0, 0.78, 0.45])


def _snow(image: Field, depth: Field, label: Labels, generator: np.random.Generator) -> Field:
    height, width = label.shape
    white = generator.uniform(222, 238) * np.array([0.98, 1.0, 1.02])
    air = generator.uniform(205, 220) * np.ones(3)
    blots = smooth_noise(generator, height, width, height / 9)
    blots += 0.5 * smooth_noise(generator, height, width, height / 32)
    lying = np.full(len(CLASSES), 9.0)
    # The higher the mark, the less lies there.
    lying[[VEGETATION, ROAD, SIDEWALK]] = generator.uniform(-0.5, 0.1), generator.uniform(-0.4, 0.3), -0.8
    cover = np.clip((blots - lying[label]) * 3, 0, 1)
    below = np.zeros(label.shape, bool)
    rim = max(1, round(height / 64))
    below[rim:] = label[rim:] != label[:-rim]
    cover[below & ((label == CAR) | (label == BUILDING))] = 0.9
    cover = 0.9 * cover[..., None]
    lit = 0.85 * image + 0.15 * air
    snowy = _haze(lit * (1 - cover) + white * cover, depth, generator.uniform(0.012, 0.022), air)
    small = generator.random((-(-height // rim), -(-width // rim))) < 0.02
    flakes = np.repeat(np.repeat(small, rim, 0), rim, 1)[:height, :width]
    snowy[flakes] = 245
    return snowy


_EFFECTS: dict[str, Effect] = {"clear": _clear, "fog": _fog, "rain": _rain, "night": _night, "snow": _snow}
CONDITIONS = tuple(_EFFECTS)
"""Names of the conditions."""
