"""The colours of a street: a gaudy source domain, and a target domain a chosen step nearer to a grey reality.

Every pixel's place in the world follows from its depth, so windows, lane marks and paving are drawn in metres and
shrink with the distance.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from alimm.projects.dcaa.synthetic.noise import Field, smooth_noise
from alimm.projects.dcaa.synthetic.scene import (
    BUILDING,
    CAMERA_HEIGHT,
    GLASS,
    LAMP,
    ROAD,
    SIDEWALK,
    SKIN,
    SKY,
    TRUNK,
    TYRE,
    Scene,
)

DOMAINS = ("source", "target")

# RGB by class: sky, building, vegetation, road, sidewalk, car, person, pole.
_GAUDY = np.array(
    [
        (88, 158, 238),
        (186, 124, 84),
        (62, 148, 44),
        (82, 80, 104),
        (186, 164, 150),
        (150, 60, 60),
        (120, 70, 150),
        (196, 196, 80),
    ],
    np.float64,
)
_GREY = np.array(
    [
        (206, 211, 216),
        (122, 116, 110),
        (78, 92, 64),
        (116, 115, 114),
        (140, 136, 131),
        (84, 84, 90),
        (66, 62, 64),
        (92, 92, 92),
    ],
    np.float64,
)
_KIND_COLOUR = {
    GLASS: (52, 66, 84),
    TYRE: (26, 26, 28),
    SKIN: (214, 164, 134),
    LAMP: (214, 70, 50),
    TRUNK: (96, 74, 54),
}
# How far parts of a class differ from each other, and how strong the grain on them is; both in grey values.
_SPREAD = np.array([10, 24, 14, 8, 9, 46, 42, 10], np.float64)
_GRAIN = np.array([2, 9, 17, 8, 9, 6, 7, 5], np.float64)


def paint(scene: Scene, domain: str, alpha: float, generator: np.random.Generator) -> NDArray[np.float32]:
    """Colour a street in clear daylight.

    Args:
        scene: the geometry.
        domain: ``'source'`` or ``'target'``.
        alpha: how far the target moves from the source's look (0) to the grey one (1); without effect on the source.
        generator: of the colours of things, the light and the textures.

    Returns:
        float32 (H, W, 3), RGB of 0 to 255.

    Raises:
        ValueError: the domain is unknown or alpha is outside [0, 1].
    """
    if domain not in DOMAINS:
        raise ValueError(f"paint: domain must be 'source' or 'target', got {domain!r}")
    if not 0 <= alpha <= 1:
        raise ValueError(f"paint: alpha must be in [0, 1], got {alpha!r}")
    step = alpha if domain == "target" else 0.0
    image = _part_colours(scene, step, generator)[scene.part]
    image *= _markings(scene)[..., None]
    image += _grain(scene, step, generator)[..., None]
    image *= _light(scene, generator)[..., None]
    image *= 1 + generator.normal(0, 0.025, 3)
    return np.clip(image, 0, 255).astype(np.float32)


def _part_colours(scene: Scene, step: float, generator: np.random.Generator) -> Field:
    """Colour of each part (parts, 3): that of its class, moved a little together with its class and alone."""
    base = (1 - step) * _GAUDY + step * _GREY
    base = base + generator.normal(0, 6, base.shape)
    parts = len(scene.part_class)
    spread = _SPREAD[scene.part_class][:, None]
    brightness, hue = generator.standard_normal((parts, 1)), generator.standard_normal((parts, 3))
    colours = base[scene.part_class] + spread * (0.7 * brightness + (0.7 - 0.4 * step) * hue)
    for kind, colour in _KIND_COLOUR.items():
        where = scene.part_kind == kind
        colours[where] = np.array(colour) + 6 * brightness[where]
    return np.clip(colours, 8, 250)


def _markings(scene: Scene) -> Field:
    """Factors (H, W): windows, lane marks and paving, fading where they are smaller than pixels."""
    height, width = scene.label.shape
    depth = scene.depth.astype(np.float64)
    metre = depth / scene.focal
    across = (np.arange(width) + 0.5 - scene.vanish) * metre
    above = CAMERA_HEIGHT - (np.arange(height) + 0.5 - scene.horizon)[:, None] * metre
    fade = np.clip(1.5 - depth / 40, 0, 1)
    factor = np.ones((height, width))

    wall = scene.label == BUILDING
    window = (np.mod(above, 3.0) > 1.1) & (np.mod(above, 3.0) < 2.5) & (np.mod(depth, 2.6) < 1.3) & wall
    factor[window] -= 0.42 * fade[window]

    road = scene.label == ROAD
    middle, half = (scene.road[0] + scene.road[1]) / 2, 0.09
    dashes = (np.abs(across - middle) < half) & (np.mod(depth, 6.0) < 3.0)
    edges = (np.abs(across - scene.road[0] - 0.3) < half) | (np.abs(across - scene.road[1] + 0.3) < half)
    factor[(dashes | edges) & road] = 1.7

    paving = scene.label == SIDEWALK
    joint = (np.mod(across, 0.8) < 0.1) | (np.mod(depth, 0.8) < 0.1)
    joint &= paving
    factor[joint] -= 0.22 * fade[joint]
    return factor


def _grain(scene: Scene, step: float, generator: np.random.Generator) -> Field:
    """Grey values to add (H, W): fine in the source, softer with ``step``; clouds and leaves in both."""
    height, width = scene.label.shape
    unit = height / 64
    fine = smooth_noise(generator, height, width, unit) if unit > 1.5 else generator.standard_normal((height, width))
    soft = smooth_noise(generator, height, width, 3 * unit)
    clouds = smooth_noise(generator, height, width, 14 * unit)
    grain = (_GRAIN * (1 - step))[scene.label] * fine + (_GRAIN * (0.4 + 0.6 * step))[scene.label] * soft
    sky = scene.label == SKY
    grain[sky] += 12 * clouds[sky]
    return grain


def _light(scene: Scene, generator: np.random.Generator) -> Field:
    """Factors (H, W): the brightness of the day, falling off to one side."""
    height, width = scene.label.shape
    gain, right, down = generator.uniform(0.88, 1.1), generator.uniform(-0.14, 0.14), generator.uniform(-0.08, 0.08)
    return gain + right * np.linspace(-1, 1, width) + down * np.linspace(-1, 1, height)[:, None]
