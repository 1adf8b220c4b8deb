"""Make the composite set: drawn cut-outs on drawn grounds (source), photographic ones on photographs (target).

The target is shown in four conditions: plain, dark, haze and rain. The masks are exact. No cut-out and no photograph
is in both train and val; a val scene of the target is the same in all conditions, so that figures by condition
compare. The gap between the domains is another one than that of the drawn weather set: drawings against photographs.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from alimm.datasets.emoji_scenes import RECIPE, check_options, is_made, write_picture
from alimm.datasets.fetch import FetchError, replaced_folder
from alimm.paths import data_root
from alimm.projects.dcaa.composites_packages import DOMAINS, FOLDERS, PACKAGES
from alimm.projects.dcaa.composites_render import (
    CONDITIONS,
    SIDES,
    Picture,
    compose_scene,
    composite_condition,
    drawn_ground,
    photo_ground,
)
from alimm.projects.dcaa.composites_sources import (
    CutOut,
    Material,
    read_cut_outs,
    read_photographs,
    split_material,
)
from alimm.seeding import numpy_stream

FOLDER = "dcaa_composites"
CLASSES = ("background", "animal", "food", "household", "plant")
"""Names in the order of the labels. The other candidates have fewer than `LEAST` cut-outs in a domain."""
PALETTE = ([0, 0, 0], [220, 60, 50], [240, 170, 40], [60, 110, 220], [60, 170, 70])
"""RGB colour of each class."""
METAINFO = {"classes": CLASSES, "palette": [list(colour) for colour in PALETTE]}
LEAST = 25
"""Cut-outs that a class needs in each domain."""
MOST_SHOWN = 6


def prepare(
    out: Path,
    source_count: int = 300,
    target_count: int = 100,
    val_count: int = 40,
    height: int = 96,
    width: int = 128,
    seed: int = 0,
    packages: Path | None = None,
    overwrite: bool = False,
) -> bool:
    """Make the set: ``<domain>/<split>/img`` and ``labels``, below them one folder a condition in the target.

    Labels are PNGs of one channel that hold the index in `CLASSES`. A killed run leaves no half set under ``out``.

    Args:
        out: the folder to make.
        source_count: training pictures of the source.
        target_count: training pictures of the target in each condition.
        val_count: validation pictures of the source, and of the target in each condition.
        height: of a picture in pixels.
        width: of a picture in pixels.
        seed: of every random choice, the split included.
        packages: folder with the Debian packages, or with their files; else they are fetched.
        overwrite: replace another set in ``out``.

    Returns:
        False where the folder held this very set already and nothing was done.

    Raises:
        FetchError: a package cannot be had.
        ValueError: a number is out of bounds, the folder holds something else, a class has too few cut-outs.
    """
    check_options(
        {
            "source-count": (source_count, 1, 1_000_000),
            "target-count": (target_count, 1, 1_000_000),
            "val-count": (val_count, 1, 1_000_000),
            "height": (height, 32, 1024),
            "width": (width, 32, 1024),
            "seed": (seed, 0, 2**31 - 1),
        }
    )
    recipe = dict(
        kind=FOLDER, version=1, source_count=source_count, target_count=target_count, val_count=val_count,
        height=height, width=width, seed=seed,
    )  # fmt: skip
    if is_made(out, recipe):
        return False
    if out.exists() and any(out.iterdir()) and not overwrite:
        raise ValueError(f"{out} holds files already: give --overwrite to replace the set in it, or another --out")
    longest = round(height * SIDES[1])
    counts: dict[str, dict[str, int]] = {}
    material: dict[str, dict[str, Material]] = {}
    for domain in DOMAINS:
        cut_outs = read_cut_outs(domain, longest, packages)
        counts[domain] = {label: len(found) for label, found in cut_outs.items()}
        _check_counts(domain, cut_outs)
        photographs = read_photographs(8 * max(height, width), packages) if domain == "target" else []
        material[domain] = split_material(domain, cut_outs, photographs, CLASSES[1:], seed)
    with replaced_folder(out) as folder:
        for split, number in (("train", source_count), ("val", val_count)):
            for index in range(number):
                scene = draw_scene(material["source"][split], f"source/{split}", index, height, width, seed)
                _write(folder / "source" / split, "", index, *scene)
        for split, number in (("train", target_count), ("val", val_count)):
            for cond_id, condition in enumerate(CONDITIONS):
                for index in range(number):
                    # In val the number of the scene leaves the condition out.
                    scene_index = index if split == "val" else cond_id * number + index
                    picture, labels = draw_scene(
                        material["target"][split], f"target/{split}", scene_index, height, width, seed
                    )
                    weather = numpy_stream(seed, f"composites/{split}/{condition}", index)
                    picture = composite_condition(picture, condition, weather)
                    _write(folder / "target" / split, condition, index, picture, labels)
        (folder / "README.md").write_text(_card(recipe, counts, material), encoding="utf-8")
        (folder / RECIPE).write_text(json.dumps(recipe), encoding="utf-8")
    return True


def draw_scene(
    material: Material, stream: str, index: int, height: int, width: int, seed: int
) -> tuple[Picture, Picture]:
    """Draw scene ``index`` of a stream: the picture (height, width, 3), RGB, and its labels (height, width)."""
    generator = numpy_stream(seed, f"composites/{stream}", index)
    if material.photographs:
        photograph = material.photographs[int(generator.integers(len(material.photographs)))]
        ground = photo_ground(photograph, generator, height, width)
    else:
        ground = drawn_ground(generator, height, width)
    drawings = []
    for turn in range(int(generator.integers(3, MOST_SHOWN + 1))):
        # The first cut-out's class goes round, so that no class is missing from a few pictures.
        label = 1 + (index % (len(CLASSES) - 1) if turn == 0 else int(generator.integers(len(CLASSES) - 1)))
        members = material.cut_outs[CLASSES[label]]
        drawings.append((members[int(generator.integers(len(members)))].drawing, label))
    order = generator.permutation(len(drawings))
    return compose_scene(ground, [drawings[int(position)] for position in order], generator)


def _check_counts(domain: str, cut_outs: Mapping[str, Sequence[CutOut]]) -> None:
    if few := {label: len(cut_outs[label]) for label in CLASSES[1:] if len(cut_outs[label]) < LEAST}:
        raise ValueError(
            f"{domain}: each class needs {LEAST} cut-outs, got {few}. Fetch the whole package "
            f"{PACKAGES[domain].package.name} and give it with --from"
        )


def _write(folder: Path, condition: str, index: int, picture: Picture, labels: Picture) -> None:
    paths = [folder / kind / condition / f"{index:05d}.png" for kind in ("img", "labels")]
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
    write_picture(paths[0], picture.astype(np.float32))
    Image.fromarray(labels).save(paths[1])


def _card(
    recipe: Mapping[str, Any], counts: Mapping[str, Mapping[str, int]], material: Mapping[str, Mapping[str, Material]]
) -> str:
    def line(label: str) -> str:
        cells = [str(counts[domain][label]) for domain in DOMAINS]
        for domain in DOMAINS:
            sides = material[domain]
            cells.append(
                " / ".join(str(len(side.cut_outs[label])) for side in sides.values())
                if label in CLASSES
                else "left out"
            )
        return f"| {label} | " + " | ".join(cells) + " |"

    table = "\n".join(line(label) for label in FOLDERS)
    photographs = " / ".join(str(len(side.photographs)) for side in material["target"].values())
    packages = "\n".join(
        f"- {domain}: {bundle.package.name} {bundle.package.version}. {bundle.licence}."
        for domain, bundle in PACKAGES.items()
    )
    return f"""# DCAA composites

Pictures of {recipe["width"]} x {recipe["height"]} pixels, made with the seed {recipe["seed"]}: {recipe["source_count"]}
of the source for training, {recipe["target_count"]} of the target in each of {", ".join(CONDITIONS)}, and
{recipe["val_count"]} of the source and of each condition for validation. Labels: {", ".join(CLASSES)}, from 0.

| class | source cut-outs | target cut-outs | source train / val | target train / val |
| --- | --- | --- | --- | --- |
{table}

A class with fewer than {LEAST} cut-outs in a domain is left out. Photographs behind the target, train / val:
{photographs}. Train and val share no cut-out and no photograph: files that differ only in a number at the end, or look
alike, are on one side. A val scene of the target is the same in all conditions. The conditions know no depth.

The same options give the same pictures. Do not add files here: the folder is replaced as a whole.

{packages}
- backgrounds of the target: tuxpaint-data, GPL-2 or later, Copyright 2002-2021 Bill Kendrick; scikit-image's astronaut,
  hubble_deep_field (NASA, public domain), brick, gravel (CC0Textures, CC0), rocket (SpaceX, public domain).

The pictures of the target are derived from works under the GPL: pass them on under its terms.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of ``tools/data/prepare_composites.py``."""
    parser = argparse.ArgumentParser(prog="prepare_composites.py", description=__doc__)
    parser.add_argument("--out", type=Path, help=f"folder to make; by default {FOLDER} in alimm's data folder")
    parser.add_argument("--from", dest="packages", type=Path, help="folder with the Debian packages or their files")
    parser.add_argument("--source-count", type=int, default=300, metavar="N", help="training pictures, source (300)")
    parser.add_argument("--target-count", type=int, default=100, metavar="N", help="the same, a target condition (100)")
    parser.add_argument("--val-count", type=int, default=40, metavar="N", help="validation pictures, each (40)")
    parser.add_argument("--height", type=int, default=96, metavar="N", help="of a picture in pixels (96)")
    parser.add_argument("--width", type=int, default=128, metavar="N", help="of a picture in pixels (128)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of every random choice (0)")
    parser.add_argument("--overwrite", action="store_true", help="replace another set in the folder")
    args = parser.parse_args(argv)
    out = (args.out or data_root() / FOLDER).expanduser().absolute()
    try:
        made = prepare(
            out, args.source_count, args.target_count, args.val_count, args.height, args.width, args.seed,
            args.packages, args.overwrite,
        )  # fmt: skip
    except (ValueError, OSError, FetchError) as error:
        print(f"prepare_composites.py: {error}", file=sys.stderr)
        return 1
    state = "made" if made else "there already"
    print(f"{out}: {state}; {args.source_count:,} source, {args.target_count:,} target pictures a condition")
    return 0
