"""Cut-outs and photographs for the composite set, divided between train and val.

A cut-out is on one side of the split: files that differ only in a number (``cep``, ``cep-1``, ``cep-2``) and files
that look alike, mirrored or not, stay together; equal ones count once.
"""

from __future__ import annotations

import hashlib
import io
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from alimm.datasets.fetch import fetch_files
from alimm.projects.dcaa.composites_packages import (
    FOLDERS,
    PACKAGES,
    TEMPLATES,
    class_of,
    fetch_tree,
    skimage_photographs,
)
from alimm.seeding import numpy_stream

SPLITS = ("train", "val")
VAL_SHARE = 0.25
MAX_PIXELS = 8_000_000
"""Larger files are left out: openclipart holds a few of 170 million pixels."""
MIN_SIDE = 32
ALIKE = 5.0
"""Two cut-outs are alike below this mean distance of their 16 x 16 thumbnails, of 255."""
COVERAGE = (0.12, 0.97)
"""Bounds of the opaque share of a cut-out's box: neither a few lines nor a whole rectangle."""


@dataclass(frozen=True)
class CutOut:
    """A cut-out.

    Attributes:
        drawing: uint8 (h, w, 4), RGB multiplied by the opacity, and the opacity; without the transparent margin.
        name: path inside the package's tree.
        group: what the split keeps together.
    """

    drawing: NDArray[np.uint8]
    name: str
    group: str


@dataclass
class Material:
    """What one side of the split of one domain may show.

    Attributes:
        cut_outs: class -> its cut-outs.
        photographs: uint8 (h, w, 3), RGB; empty in the source domain.
    """

    cut_outs: dict[str, list[CutOut]] = field(default_factory=dict)
    photographs: list[NDArray[np.uint8]] = field(default_factory=list)


def decode_cut_out(data: bytes, name: str, longest: int) -> CutOut | None:
    """Cut out what a picture file shows.

    Args:
        data: content of the file.
        name: path in the package's tree.
        longest: of the result's sides, in pixels; smaller pictures keep their size.

    Returns:
        None for a file that makes no good cut-out: without transparency, tiny, huge, some lines only.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            opened = Image.open(io.BytesIO(data))
        with opened:
            if opened.width * opened.height > MAX_PIXELS:
                return None
            pixels = np.asarray(opened.convert("RGBA"))
    except (OSError, ValueError, SyntaxError):
        return None
    opaque = pixels[..., 3] > 127
    rows, columns = np.flatnonzero(opaque.any(1)), np.flatnonzero(opaque.any(0))
    if len(rows) == 0:
        return None
    box = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
    share = float(opaque[box].mean())
    height, width = opaque[box].shape
    if max(height, width) < MIN_SIDE or not COVERAGE[0] <= share <= COVERAGE[1]:
        return None
    drawing = pixels[box].astype(np.float32)
    drawing[..., :3] *= drawing[..., 3:] / 255
    factor = min(longest / max(height, width), 1.0)
    size = max(round(width * factor), 1), max(round(height * factor), 1)
    small = cv2.resize(drawing, size, interpolation=cv2.INTER_AREA)
    stem = PurePosixPath(name).with_suffix("").as_posix().lower()
    group = re.sub(r"[\d_\-. ]+$", "", stem) or stem
    return CutOut(np.clip(np.rint(small), 0, 255).astype(np.uint8), name, group)


def read_cut_outs(domain: str, longest: int, source: Path | None = None) -> dict[str, list[CutOut]]:
    """All good cut-outs of a domain by candidate class, in the order of their names; equal pictures once.

    Raises:
        FetchError: the package cannot be had.
        ValueError: it is not the pinned one.
    """
    files = fetch_tree(PACKAGES[domain], lambda name: class_of(domain, name) is not None, source)
    found: dict[str, list[CutOut]] = {label: [] for label in FOLDERS}
    seen: set[str] = set()
    for name in sorted(files):
        cut_out = decode_cut_out(files[name], name, longest)
        label = class_of(domain, name)
        assert label is not None, "only files with a class were read"
        if cut_out is None:
            continue
        digest = hashlib.sha256(repr(cut_out.drawing.shape).encode() + cut_out.drawing.tobytes()).hexdigest()
        if digest not in seen:
            seen.add(digest)
            found[label].append(cut_out)
    return found


def read_photographs(longest: int, source: Path | None = None) -> list[NDArray[np.uint8]]:
    """The photographs, uint8 (h, w, 3), RGB, in a fixed order, at most ``longest`` pixels long.

    Raises:
        FetchError: Tux Paint's cannot be had.
        ValueError: scikit-image is missing, or a file is not the right one.
    """
    files = fetch_files(TEMPLATES, source)
    contents = [files[name] for name in sorted(files)] + skimage_photographs()
    photographs = []
    for data in contents:
        with Image.open(io.BytesIO(data)) as opened:
            opened.thumbnail((longest, longest))
            photographs.append(np.asarray(opened.convert("RGB")))
    return photographs


def merge_alike(cut_outs: Sequence[CutOut]) -> list[str]:
    """Group of each cut-out, the groups of cut-outs that look alike taken together."""
    small = [
        cv2.resize(member.drawing.astype(np.float32), (16, 16), interpolation=cv2.INTER_AREA) for member in cut_outs
    ]
    leader = {member.group: member.group for member in cut_outs}

    def find(group: str) -> str:
        while leader[group] != group:
            group = leader[group]
        return group

    for index, first in enumerate(small):
        for other in range(index):
            if min(np.abs(first - small[other]).mean(), np.abs(first[:, ::-1] - small[other]).mean()) < ALIKE:
                leader[find(cut_outs[index].group)] = find(cut_outs[other].group)
    return [find(member.group) for member in cut_outs]


def split_groups(groups: Sequence[str], seed: int, name: str) -> NDArray[np.bool_]:
    """Which items go to val: about a quarter of them, whole groups only.

    Args:
        groups: of each item.
        seed: of the run.
        name: of the random stream.
    """
    members: dict[str, int] = {}
    for group in groups:
        members[group] = members.get(group, 0) + 1
    order = numpy_stream(seed, f"composites/split/{name}").permutation(len(members))
    names = sorted(members)
    wanted = max(round(VAL_SHARE * len(groups)), 1)
    val: set[str] = set()
    count = 0
    for index in order:
        group = names[int(index)]
        if count + members[group] <= wanted:
            val.add(group)
            count += members[group]
    return np.array([group in val for group in groups], bool)


def split_material(
    domain: str,
    cut_outs: Mapping[str, Sequence[CutOut]],
    photographs: Iterable[NDArray[np.uint8]],
    classes: Sequence[str],
    seed: int,
) -> dict[str, Material]:
    """Divide a domain's cut-outs and photographs between train and val; nothing is in both."""
    sides = {split: Material() for split in SPLITS}
    for label in classes:
        members = cut_outs[label]
        is_val = split_groups(merge_alike(members), seed, f"{domain}/{label}")
        for split, side in sides.items():
            side.cut_outs[label] = [
                member for member, val in zip(members, is_val, strict=True) if val == (split == "val")
            ]
    pictures = list(photographs)
    is_val = split_groups([f"{number:04d}" for number in range(len(pictures))], seed, f"{domain}/photographs")
    for split, side in sides.items():
        side.photographs = [picture for picture, val in zip(pictures, is_val, strict=True) if val == (split == "val")]
    return sides
