"""Make short video clips out of EmojiProducts, as raw frames; nothing is downloaded.

In each clip one product moves over a generated background that stands still. Two lists name the same clips with
different labels:

- ``<split>_motion.txt``: left, right, up, down, grow, shrink. Played backwards each motion is another one of these, so
  a single frame cannot tell left from right, up from down or grow from shrink. For recognisers that see time.
- ``<split>_product.txt``: the sub-group of the product. Each frame shows it. For recognisers of single frames, such as
  TSN, whose votes over the frames do not depend on their order.

Motion and product are crossed, so neither tells the other. The training clips show the drawings of two vendors, the
validation clips those of the third.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from alimm.datasets.emoji_scenes import (
    CLASSES,
    RECIPE,
    SPLIT_VENDORS,
    Floats,
    background,
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

FOLDER = "emoji_clips"
MOTIONS = ("left", "right", "up", "down", "grow", "shrink")
SMALL, LARGE = 0.25, 0.6
"""Side of the product relative to that of the frame, where it grows from or shrinks to."""


def labels_of(index: int) -> tuple[int, int]:
    """Motion and product of clip ``index``: each run of 36 has each pair once, each run of six each of both once."""
    motion, block = index % len(MOTIONS), index // len(MOTIONS)
    return motion, (motion + block) % len(CLASSES)


def path_of(motion: int, generator: np.random.Generator, frames: int) -> np.ndarray:
    """Where the product is and how large, relative to the frame: (frames, 3) with centre x, centre y and side.

    The second motion of a pair is the first one played backwards.
    """
    steps = np.linspace(0, 1, frames)
    side = np.full(frames, generator.uniform(0.35, 0.45))
    x, y = (np.full(frames, generator.uniform(0.35, 0.65)) for _ in range(2))
    if MOTIONS[motion] in ("grow", "shrink"):
        side = SMALL + (LARGE - SMALL) * steps
    else:
        moving = x if MOTIONS[motion] in ("left", "right") else y
        # Right and down: from one side of the frame to the other.
        moving[:] = 0.25 + generator.uniform(-0.02, 0.02) + 0.5 * steps
    path = np.stack([x, y, side], axis=1)
    return path[::-1] if MOTIONS[motion] in ("left", "up", "shrink") else path


def draw_clip(split: str, index: int, frames: int = 8, size: int = 64, seed: int = 0) -> list[Floats]:
    """The frames of clip ``index`` of a split, float32 (size, size, 3) each, RGB of 0 to 255."""
    generator = numpy_stream(seed, f"emoji_clips/{split}", index)
    motion, label = labels_of(index)
    still = background(generator, size, size)
    row = int(generator.choice(rows_of(split, label)))
    drawn = []
    for x, y, side in path_of(motion, generator, frames):
        frame = still.copy()
        drawing = cut_out(row, round(size * side))
        height, width = drawing.shape[:2]
        top, left = (
            min(max(round(size * centre - length / 2), 0), size - length)
            for centre, length in ((y, height), (x, width))
        )
        paste(frame, drawing, top, left)
        drawn.append(frame)
    return drawn


def prepare(out: Path, count: int = 24, frames: int = 8, size: int = 64, seed: int = 0) -> bool:
    """Draw the clips: ``<split>/00000/img_00001.jpg`` and so on, two lists a split and a data card.

    A line of a list is ``folder frames label``, as mmaction2's ``RawframeDataset`` reads it.

    Args:
        out: the folder to make.
        count: clips of each split.
        frames: of each clip.
        size: side of a frame in pixels.
        seed: of every random choice.

    Returns:
        False where the folder held these very clips already and nothing was done.

    Raises:
        ValueError: a number is out of bounds, or the folder holds other files.
    """
    check_options(
        {
            "count": (count, 1, 100_000),
            "frames": (frames, 2, 1000),
            "size": (size, 32, 512),
            "seed": (seed, 0, 2**31 - 1),
        }
    )
    recipe = dict(kind=FOLDER, version=1, count=count, frames=frames, size=size, seed=seed)
    if is_made(out, recipe):
        return False
    with replaced_folder(out) as folder:
        for split in SPLIT_VENDORS:
            lines: dict[str, list[str]] = {"motion": [], "product": []}
            for index in range(count):
                clip = folder / split / f"{index:05d}"
                clip.mkdir(parents=True)
                for number, frame in enumerate(draw_clip(split, index, frames, size, seed), 1):
                    write_picture(clip / f"img_{number:05d}.jpg", frame)
                for kind, label in zip(lines, labels_of(index), strict=True):
                    lines[kind].append(f"{split}/{clip.name} {frames} {label}\n")
            for kind, listed in lines.items():
                (folder / f"{split}_{kind}.txt").write_text("".join(listed), encoding="utf-8")
        (folder / "README.md").write_text(_card(recipe), encoding="utf-8")
        (folder / RECIPE).write_text(json.dumps(recipe), encoding="utf-8")
    return True


def _card(recipe: dict[str, Any]) -> str:
    vendors = "; ".join(f"{split}: {', '.join(names)}" for split, names in SPLIT_VENDORS.items())
    return f"""# EmojiClips

{recipe["count"]} clips of {recipe["frames"]} frames of {recipe["size"]} x {recipe["size"]} pixels in each of train
and val, made from EmojiProducts with the seed {recipe["seed"]}.

- `<split>_motion.txt`, labels in this order: {", ".join(MOTIONS)}. A single frame does not tell them apart.
- `<split>_product.txt`, labels in this order: {", ".join(CLASSES)}. Each frame shows the product.
- Drawings by vendor, {vendors}.
- The same options give the same frames. Do not add files here: the folder is replaced as a whole.

The licences are those of EmojiProducts: Noto Emoji, Apache-2.0; Twemoji, CC-BY-4.0, Copyright Twitter, Inc and other
contributors; Fluent Emoji, MIT, Copyright (c) Microsoft Corporation. Name them where you pass the frames on.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of ``tools/data/prepare_emoji_clips.py``."""
    parser = argparse.ArgumentParser(
        prog="prepare_emoji_clips.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help=f"folder to make; by default {FOLDER} in alimm's data folder")
    parser.add_argument("--count", type=int, default=24, metavar="N", help="clips of each split (24)")
    parser.add_argument("--frames", type=int, default=8, metavar="N", help="frames of a clip (8)")
    parser.add_argument("--size", type=int, default=64, metavar="N", help="side of a frame in pixels (64)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of every random choice (0)")
    args = parser.parse_args(argv)
    out = (args.out or data_root() / FOLDER).expanduser().absolute()
    try:
        made = prepare(out, args.count, args.frames, args.size, args.seed)
    except (ValueError, OSError) as error:
        print(f"prepare_emoji_clips.py: {error}", file=sys.stderr)
        return 1
    print(f"{out}: {args.count:,} clips in each of train and val" + ("" if made else ", there already"))
    return 0
