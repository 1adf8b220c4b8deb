"""Make a small detection set in COCO's format out of EmojiProducts; nothing is downloaded.

Each picture shows two to five products of six sub-groups on a generated background. The boxes are exact: the smallest
ones around the pixels that can be seen of each product. The training pictures show the drawings of two vendors, the
validation pictures those of the third. The set is for tests and for comparing two ways to train; it says nothing about
how well a detector does on photos.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from alimm.datasets.emoji_scenes import (
    CLASSES,
    RECIPE,
    SPLIT_VENDORS,
    Floats,
    background,
    bounding_box,
    check_options,
    cut_out,
    is_made,
    paste,
    rows_of,
    write_picture,
)
from alimm.datasets.fetch import replaced_folder
from alimm.paths import data_root
from alimm.seeding import numpy_stream

FOLDER = "emoji_coco"
MAX_PRODUCTS = 5
# Of the picture's side. Small products have few anchors of their own, and training from scratch must stay short.
SIDES = (0.2, 0.5)
LEAST_VISIBLE = 0.75
TRIES = 30


@dataclass(frozen=True)
class Scene:
    """A picture with what it shows.

    Attributes:
        picture: float32 (size, size, 3), RGB of 0 to 255.
        owner: int (size, size), the index of the product that a pixel shows, -1 where it shows the background.
        labels: the class of each product.
        rows: its row in the catalogue.
        whole: how many pixels it covers, those that a later product hides included.
    """

    picture: Floats
    owner: NDArray[np.int64]
    labels: list[int]
    rows: list[int]
    whole: list[int]


def draw_scene(split: str, index: int, size: int = 160, seed: int = 0) -> Scene:
    """Draw picture ``index`` of a split.

    A product is not put where it would hide more than a quarter of one that is there already.
    """
    generator = numpy_stream(seed, f"emoji_coco/{split}", index)
    picture = background(generator, size, size)
    owner = np.full((size, size), -1, np.int64)
    labels: list[int] = []
    rows: list[int] = []
    whole: list[int] = []
    for turn in range(int(generator.integers(2, MAX_PRODUCTS + 1))):
        # The first product's class goes round, so that no class is missing from a few pictures.
        label = index % len(CLASSES) if turn == 0 else int(generator.integers(len(CLASSES)))
        row = int(generator.choice(rows_of(split, label)))
        drawing = cut_out(row, round(size * float(generator.uniform(*SIDES))))
        for _ in range(TRIES):
            top = int(generator.integers(size - drawing.shape[0] + 1))
            left = int(generator.integers(size - drawing.shape[1] + 1))
            tried = picture.copy()
            mask = paste(tried, drawing, top, left)
            if all(
                np.count_nonzero((owner == other) & ~mask) >= LEAST_VISIBLE * pixels
                for other, pixels in enumerate(whole)
            ):
                picture = tried
                owner[mask] = len(labels)
                labels.append(label)
                rows.append(row)
                whole.append(int(np.count_nonzero(mask)))
                break
    return Scene(picture, owner, labels, rows, whole)


def annotate(scene: Scene, image_id: int, first_id: int) -> list[dict[str, Any]]:
    """COCO's annotations of a scene: the boxes and areas of what can be seen of each product."""
    found = []
    for product, label in enumerate(scene.labels):
        mask = scene.owner == product
        found.append(
            dict(
                id=first_id + product,
                image_id=image_id,
                category_id=label + 1,
                bbox=list(bounding_box(mask)),
                area=int(np.count_nonzero(mask)),
                iscrowd=0,
            )
        )
    return found


def prepare(out: Path, count: int = 16, size: int = 160, seed: int = 0) -> bool:
    """Draw the set: ``train/*.png``, ``val/*.png``, ``train.json``, ``val.json`` and a data card.

    Args:
        out: the folder to make.
        count: pictures of each split.
        size: side of a picture in pixels.
        seed: of every random choice.

    Returns:
        False where the folder held this very set already and nothing was done.

    Raises:
        ValueError: a number is out of bounds, or the folder holds other files.
    """
    check_options({"count": (count, 1, 100_000), "size": (size, 64, 1024), "seed": (seed, 0, 2**31 - 1)})
    recipe = dict(kind=FOLDER, version=1, count=count, size=size, seed=seed)
    if is_made(out, recipe):
        return False
    with replaced_folder(out) as folder:
        for split in SPLIT_VENDORS:
            (folder / split).mkdir()
            images: list[dict[str, Any]] = []
            annotations: list[dict[str, Any]] = []
            for index in range(count):
                scene = draw_scene(split, index, size, seed)
                name = f"{index:05d}.png"
                write_picture(folder / split / name, scene.picture)
                images.append(dict(id=index, file_name=name, width=size, height=size))
                annotations += annotate(scene, index, len(annotations) + 1)
            content = dict(
                images=images,
                annotations=annotations,
                categories=[dict(id=label + 1, name=name) for label, name in enumerate(CLASSES)],
            )
            (folder / f"{split}.json").write_text(json.dumps(content), encoding="utf-8")
        (folder / "README.md").write_text(_card(recipe), encoding="utf-8")
        (folder / RECIPE).write_text(json.dumps(recipe), encoding="utf-8")
    return True


def _card(recipe: dict[str, Any]) -> str:
    vendors = "; ".join(f"{split}: {', '.join(names)}" for split, names in SPLIT_VENDORS.items())
    return f"""# EmojiCoco

{recipe["count"]} pictures of {recipe["size"]} x {recipe["size"]} pixels in each of train and val, made from
EmojiProducts with the seed {recipe["seed"]}, with boxes in COCO's format. Classes: {", ".join(CLASSES)}.

- Drawings by vendor, {vendors}.
- Boxes and areas are of what can be seen of a product; at least three quarters of it.
- The same options give the same pictures. Do not add files here: the folder is replaced as a whole.

The licences are those of EmojiProducts: Noto Emoji, Apache-2.0; Twemoji, CC-BY-4.0, Copyright Twitter, Inc and other
contributors; Fluent Emoji, MIT, Copyright (c) Microsoft Corporation. Name them where you pass the pictures on.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of ``tools/data/prepare_emoji_coco.py``."""
    parser = argparse.ArgumentParser(prog="prepare_emoji_coco.py", description=__doc__)
    parser.add_argument("--out", type=Path, help=f"folder to make; by default {FOLDER} in alimm's data folder")
    parser.add_argument("--count", type=int, default=16, metavar="N", help="pictures of each split (16)")
    parser.add_argument("--size", type=int, default=160, metavar="N", help="side of a picture in pixels (160)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of every random choice (0)")
    args = parser.parse_args(argv)
    out = (args.out or data_root() / FOLDER).expanduser().absolute()
    try:
        made = prepare(out, args.count, args.size, args.seed)
    except (ValueError, OSError) as error:
        print(f"prepare_emoji_coco.py: {error}", file=sys.stderr)
        return 1
    print(f"{out}: {args.count:,} pictures in each of train and val" + ("" if made else ", there already"))
    return 0
