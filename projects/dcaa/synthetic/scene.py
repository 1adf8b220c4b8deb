"""The geometry of a street: what stands where, and how far away.

A pinhole camera 1.5 m above the ground looks along a straight road. With the focal length f in pixels, the horizon at
row h and the vanishing point at column v, a point at X metres to the right, Y above the ground and Z ahead is seen at

    column = v + f X / Z        row = h + f (1.5 - Y) / Z

so the ground in row y is at Z = 1.5 f / (y - h). f is 60 pixels for a picture of 64 rows and grows with it: a scene
looks the same at every size. Both domains draw their geometry here; only colours, textures and weather differ.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from alimm.seeding import numpy_stream

CLASSES = ("sky", "building", "vegetation", "road", "sidewalk", "car", "person", "pole")
PALETTE = (
    (70, 130, 180),
    (110, 110, 110),
    (107, 142, 35),
    (128, 64, 128),
    (244, 35, 232),
    (0, 0, 142),
    (220, 20, 60),
    (230, 200, 40),
)
"""RGB colours of the classes in pictures of labels."""

SKY, BUILDING, VEGETATION, ROAD, SIDEWALK, CAR, PERSON, POLE = range(len(CLASSES))
PLAIN, GLASS, TYRE, SKIN, LAMP, TRUNK = range(6)
"""Kinds of parts: a part of a kind other than PLAIN has a colour of its own, whatever its class."""

CAMERA_HEIGHT = 1.5
SKY_DEPTH = 300.0
FAR = 120.0
"""Where the rows of houses end, in metres."""


@dataclass(frozen=True, eq=False)
class Scene:
    """A street without colours.

    Attributes:
        label: uint8 (H, W), the class of each pixel.
        depth: float32 (H, W), metres ahead of the camera; the sky is at 300.
        part: uint8 (H, W), number of the thing, or of the part of one, that a pixel belongs to.
        part_class: uint8 (parts,), the class of each part.
        part_kind: uint8 (parts,), its kind.
        horizon: row of the horizon, in pixels from the upper edge.
        vanish: column of the vanishing point.
        road: left and right edge of the road, metres to the right of the camera.
    """

    label: NDArray[np.uint8]
    depth: NDArray[np.float32]
    part: NDArray[np.uint8]
    part_class: NDArray[np.uint8]
    part_kind: NDArray[np.uint8]
    horizon: float
    vanish: float
    road: tuple[float, float]

    @property
    def focal(self) -> float:
        """The focal length in pixels."""
        return focal_length(self.label.shape[0])


def focal_length(height: int) -> float:
    """The focal length in pixels of a picture of ``height`` rows."""
    return 60.0 * height / 64.0


@dataclass
class _Canvas:
    """The maps that are drawn on, from far to near."""

    label: NDArray[np.uint8]
    depth: NDArray[np.float32]
    part: NDArray[np.uint8]
    horizon: float
    vanish: float
    focal: float
    classes: list[int] = field(default_factory=list)
    kinds: list[int] = field(default_factory=list)

    def new_part(self, label: int, kind: int = PLAIN) -> int:
        self.classes.append(label)
        self.kinds.append(kind)
        assert len(self.classes) <= 256
        return len(self.classes) - 1

    def fill(self, where: tuple[slice, slice] | NDArray[np.bool_], part: int, depth: float) -> None:
        self.label[where] = self.classes[part]
        self.part[where] = part
        self.depth[where] = depth

    def window(self, left: float, right: float, top: float, bottom: float, depth: float) -> tuple[slice, slice]:
        """Pixels of an upright rectangle given in metres, one wide and high at least where it meets the picture."""
        height, width = self.label.shape
        scale = self.focal / depth
        columns = round(self.vanish + scale * left), round(self.vanish + scale * right)
        rows = (
            round(self.horizon + scale * (CAMERA_HEIGHT - top)),
            round(self.horizon + scale * (CAMERA_HEIGHT - bottom)),
        )
        return (
            slice(min(max(rows[0], 0), height), min(max(rows[1], rows[0] + 1, 0), height)),
            slice(min(max(columns[0], 0), width), min(max(columns[1], columns[0] + 1, 0), width)),
        )

    def box(self, left: float, right: float, top: float, bottom: float, depth: float, part: int) -> None:
        self.fill(self.window(left, right, top, bottom, depth), part, depth)

    def ellipse(self, x: float, y: float, radius_x: float, radius_y: float, depth: float, part: int) -> None:
        rows, columns = self.window(x - radius_x, x + radius_x, y + radius_y, y - radius_y, depth)
        scale = self.focal / depth
        down = (np.arange(rows.start, rows.stop) + 0.5 - self.horizon) / scale - (CAMERA_HEIGHT - y)
        right = (np.arange(columns.start, columns.stop) + 0.5 - self.vanish) / scale - x
        inside = (down[:, None] / radius_y) ** 2 + (right / radius_x) ** 2 <= 1
        for array, value in (
            (self.label, self.classes[part]),
            (self.part, part),
            (self.depth, depth),
        ):
            array[rows, columns][inside] = value


def draw_scene(seed: int, index: int, size: tuple[int, int] = (64, 128)) -> Scene:
    """Draw the geometry of street ``index``.

    Args:
        seed: of the collection.
        index: which street; the same pair always gives the same one, at every size up to rounding.
        size: rows and columns, at least 16 each.

    Raises:
        ValueError: the size is too small.
    """
    height, width = size
    if min(height, width) < 16:
        raise ValueError(f"draw_scene: size must be (rows, columns) of at least 16 each, got {size!r}")
    generator = numpy_stream(seed, "dcaa/scene", index)
    horizon = generator.uniform(0.38, 0.48) * height
    canvas = _Canvas(
        np.zeros((height, width), np.uint8),
        np.full((height, width), SKY_DEPTH, np.float32),
        np.zeros((height, width), np.uint8),
        horizon,
        width / 2 + generator.uniform(-0.2, 0.2) * height,
        focal_length(height),
    )
    canvas.new_part(SKY)
    road = -generator.uniform(2.2, 5.5), generator.uniform(2.2, 5.5)
    paths = generator.uniform(1.4, 2.6, 2)
    walls = -road[0] + paths[0] + generator.uniform(0.0, 5.0), road[1] + paths[1] + generator.uniform(0.0, 5.0)
    _ground(canvas, road, paths)
    _houses(canvas, generator, walls)
    _things(canvas, generator, road, paths, walls)
    return Scene(
        canvas.label,
        canvas.depth,
        canvas.part,
        np.array(canvas.classes, np.uint8),
        np.array(canvas.kinds, np.uint8),
        horizon,
        canvas.vanish,
        road,
    )


def _ground(canvas: _Canvas, road: tuple[float, float], paths: NDArray[np.float64]) -> None:
    """Road, a sidewalk on either side, and grass beyond."""
    height, width = canvas.label.shape
    first = int(np.ceil(canvas.horizon))
    depth = CAMERA_HEIGHT * canvas.focal / (np.arange(first, height) + 0.5 - canvas.horizon)
    depth = np.minimum(depth, SKY_DEPTH)
    across = (np.arange(width) + 0.5 - canvas.vanish) * (depth[:, None] / canvas.focal)
    parts = np.array([canvas.new_part(label) for label in (VEGETATION, SIDEWALK, ROAD, SIDEWALK, VEGETATION)])
    edges = np.array([road[0] - paths[0], road[0], road[1], road[1] + paths[1]])
    part = parts[np.searchsorted(edges, across)]
    canvas.part[first:] = part
    canvas.label[first:] = np.array(canvas.classes, np.uint8)[part]
    canvas.depth[first:] = depth[:, None]


def _houses(canvas: _Canvas, generator: np.random.Generator, walls: tuple[float, float]) -> None:
    """A row of houses, hedges and groves on either side, and whatever closes the view at its end."""
    height, width = canvas.label.shape
    right = np.arange(width) + 0.5 - canvas.vanish
    distance = np.where(right < 0, walls[0], walls[1]) * canvas.focal / np.maximum(np.abs(right), 1e-6)
    depth, top, part = np.empty(width), np.empty(width), np.empty(width, np.int64)
    ragged = np.repeat(generator.uniform(0.7, 1.1, 2 * width // max(1, height // 32) + 2), max(1, height // 32))[:width]
    for is_right in (False, True):
        ends = np.append(np.cumsum(generator.uniform(6.0, 20.0, 12)), np.inf)
        ends = np.append(ends[ends < FAR], FAR)
        green = generator.random(len(ends) + 1) < 0.3
        heights = np.where(green, generator.uniform(1.5, 9.0, len(green)), generator.uniform(5.0, 20.0, len(green)))
        setback = generator.uniform(1.0, 1.25, len(green))
        numbers = np.array([canvas.new_part(VEGETATION if leafy else BUILDING) for leafy in green])
        here = (right >= 0) == is_right
        block = np.searchsorted(ends, distance[here])
        depth[here] = np.minimum(distance[here], FAR) * setback[block]
        top[here] = heights[block] * np.where(green[block], ragged[here], 1.0)
        part[here] = numbers[block]
    rows = np.arange(height)[:, None] + 0.5
    first = canvas.horizon + canvas.focal * (CAMERA_HEIGHT - top) / depth
    last = canvas.horizon + canvas.focal * CAMERA_HEIGHT / depth
    wall = (rows >= first) & (rows < last)
    canvas.part[wall] = np.broadcast_to(part, wall.shape)[wall]
    canvas.label[wall] = np.array(canvas.classes, np.uint8)[canvas.part[wall]]
    canvas.depth[wall] = np.broadcast_to(depth, wall.shape)[wall]


def _things(
    canvas: _Canvas,
    generator: np.random.Generator,
    road: tuple[float, float],
    paths: NDArray[np.float64],
    walls: tuple[float, float],
) -> None:
    """Trees, cars, people and poles, the farthest first."""
    things: list[tuple[float, float, int]] = []

    def side() -> int:
        return int(generator.integers(2))

    for _ in range(int(generator.integers(0, 5))):
        which = side()
        near = abs(road[which]) + paths[which] * 0.8
        x = generator.uniform(near, max(near + 0.1, walls[which]))
        things.append((generator.uniform(7.0, 40.0), x if which else -x, VEGETATION))
    for _ in range(int(generator.integers(2, 7))):
        parked = generator.random() < 0.5
        x = road[side()] * 0.8 if parked else generator.uniform(road[0] * 0.7, road[1] * 0.7)
        things.append((float(np.exp(generator.uniform(np.log(6.5), np.log(40.0)))), x, CAR))
    for _ in range(int(generator.integers(1, 6))):
        which = side()
        x = abs(road[which]) + generator.uniform(-0.3, 1.0) * paths[which]
        things.append((float(np.exp(generator.uniform(np.log(4.5), np.log(18.0)))), x if which else -x, PERSON))
    for _ in range(int(generator.integers(2, 6))):
        which = side()
        x = abs(road[which]) + 0.3
        things.append((float(np.exp(generator.uniform(np.log(4.0), np.log(22.0)))), x if which else -x, POLE))
    draw = {VEGETATION: _tree, CAR: _car, PERSON: _person, POLE: _pole}
    for depth, x, label in sorted(things, reverse=True):
        draw[label](canvas, generator, x, depth)


def _tree(canvas: _Canvas, generator: np.random.Generator, x: float, depth: float) -> None:
    crown, radius = generator.uniform(3.2, 5.0), generator.uniform(1.2, 2.2)
    canvas.box(x - 0.2, x + 0.2, crown, 0.0, depth, canvas.new_part(VEGETATION, TRUNK))
    part = canvas.new_part(VEGETATION)
    canvas.ellipse(x, crown, radius, radius * generator.uniform(0.8, 1.2), depth, part)
    canvas.ellipse(x + generator.uniform(-0.8, 0.8), crown + 0.6 * radius, radius * 0.7, radius * 0.7, depth, part)


def _car(canvas: _Canvas, generator: np.random.Generator, x: float, depth: float) -> None:
    half, tall = generator.uniform(0.85, 1.05), generator.uniform(1.4, 1.8)
    if generator.random() < 0.15:
        half *= 2.2  # crosses the road
    paint, glass = canvas.new_part(CAR), canvas.new_part(CAR, GLASS)
    tyre, lamp = canvas.new_part(CAR, TYRE), canvas.new_part(CAR, LAMP)
    canvas.box(x - half, x + half, 0.25, 0.0, depth, tyre)
    canvas.box(x - half, x + half, 0.58 * tall, 0.2, depth, paint)
    canvas.box(x - 0.82 * half, x + 0.82 * half, tall, 0.55 * tall, depth, paint)
    canvas.box(x - 0.68 * half, x + 0.68 * half, 0.92 * tall, 0.6 * tall, depth, glass)
    canvas.box(x - half, x - 0.75 * half, 0.5 * tall, 0.36 * tall, depth, lamp)
    canvas.box(x + 0.75 * half, x + half, 0.5 * tall, 0.36 * tall, depth, lamp)


def _person(canvas: _Canvas, generator: np.random.Generator, x: float, depth: float) -> None:
    tall, half = generator.uniform(1.55, 1.9), generator.uniform(0.24, 0.34)
    coat, legs, head = canvas.new_part(PERSON), canvas.new_part(PERSON), canvas.new_part(PERSON, SKIN)
    canvas.box(x - 0.75 * half, x + 0.75 * half, 0.5 * tall, 0.0, depth, legs)
    canvas.box(x - half, x + half, 0.86 * tall, 0.42 * tall, depth, coat)
    canvas.box(x - 0.14, x + 0.14, tall, 0.86 * tall, depth, head)


def _pole(canvas: _Canvas, generator: np.random.Generator, x: float, depth: float) -> None:
    tall, half = generator.uniform(3.5, 6.0), generator.uniform(0.1, 0.16)
    part = canvas.new_part(POLE)
    canvas.box(x - half, x + half, tall, 0.0, depth, part)
    if generator.random() < 0.6:
        reach = -np.sign(x) * generator.uniform(0.6, 1.2)
        canvas.box(min(x, x + reach), max(x, x + reach), tall, tall - 0.3, depth, part)
