"""Render Han characters from freely licensed fonts that are fetched as Debian packages, without root."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from alimm.datasets.fetch import FetchError, fetch_files, replaced_folder
from alimm.datasets.han_fonts import FAMILIES, Family
from alimm.datasets.han_glyphs import FOLDER, FORMAT, INDEX
from alimm.extras import require
from alimm.paths import data_root

HAN_BLOCKS = (
    (0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0x20000, 0x2A6DF), (0x2A700, 0x2B739), (0x2B740, 0x2B81D), (0x2B820, 0x2CEA1),
    (0x2CEB0, 0x2EBE0), (0x2EBF0, 0x2EE5D), (0x30000, 0x3134A), (0x31350, 0x323AF),
)  # fmt: skip
"""The blocks of unified ideographs. Compatibility ideographs are left out: they are drawings of characters in these."""

CHUNK = 500
BASELINE = 0.88
"""Where the baseline lies in the em square of a Han font, from its top: fonts then agree on place and size."""

INK = 223
"""A glyph without a pixel at least this dark is blank."""


def is_han(codepoint: int) -> bool:
    """Whether a code point is a unified ideograph."""
    return any(first <= codepoint <= last for first, last in HAN_BLOCKS)


def covered(path: Path) -> set[int]:
    """The Han code points that a font (of a collection, the first face) maps to a glyph other than ``.notdef``."""
    fonts = require("fontTools.ttLib", "rendering glyphs")
    with fonts.TTFont(path, fontNumber=0, lazy=True) as font:
        missing = font.getGlyphOrder()[0]
        return {int(code) for code, glyph in font.getBestCmap().items() if glyph != missing and is_han(code)}


@lru_cache(maxsize=4)
def _font(path: Path, size: int) -> Any:
    from PIL import ImageFont

    # The basic layout: one character needs no shaping, and the result is the same with and without Raqm.
    em = round(size * 15 / 16)
    return ImageFont.truetype(str(path), em, index=0, layout_engine=ImageFont.Layout.BASIC)


def render(path: Path, size: int, codepoints: Sequence[int]) -> NDArray[np.uint8]:
    """Draw characters, black on white with grey edges: uint8, shape (characters, size, size).

    The em square lies in the middle of the picture and fills 15/16 of it, so a small mark stays small and in its place.
    """
    from PIL import Image, ImageDraw

    font = _font(path, size)
    baseline = (size - font.size) / 2 + BASELINE * font.size
    pixels = np.empty((len(codepoints), size, size), np.uint8)
    for row, codepoint in enumerate(codepoints):
        character = chr(codepoint)
        canvas = Image.new("L", (size, size), 255)
        place = ((size - font.getlength(character)) / 2, baseline)
        ImageDraw.Draw(canvas).text(place, character, fill=0, font=font, anchor="ls")
        pixels[row] = np.asarray(canvas)
    return pixels


def _render_job(job: tuple[Path, int, list[int]]) -> NDArray[np.uint8]:
    return render(*job)


def render_all(jobs: Sequence[tuple[Path, int, list[int]]], workers: int) -> Iterator[NDArray[np.uint8]]:
    """Render jobs in their order, in processes where ``workers`` is above 1, with a progress bar on a terminal."""
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    bar = dict(description="Rendering", total=len(jobs), console=console, disable=not console.is_terminal)
    if workers == 1:
        yield from track(map(_render_job, jobs), **bar)  # type: ignore[arg-type]
        return
    with ProcessPoolExecutor(workers) as pool:
        yield from track(pool.map(_render_job, jobs), **bar)  # type: ignore[arg-type]


def choose(coverage: dict[str, set[int]], min_fonts: int, limit: int | None) -> list[int]:
    """The code points to render, sorted.

    Args:
        coverage: family -> its code points.
        min_fonts: keep those in at least so many families.
        limit: keep at most so many, those in most families first, then by code point.

    Raises:
        ValueError: none is left.
    """
    fonts: dict[int, int] = {}
    for codepoints in coverage.values():
        for codepoint in codepoints:
            fonts[codepoint] = fonts.get(codepoint, 0) + 1
    kept = sorted((code for code, count in fonts.items() if count >= min_fonts), key=lambda code: (-fonts[code], code))
    if not kept:
        raise ValueError(f"no Han character is in {min_fonts} of the families {', '.join(coverage)}; lower --min-fonts")
    return sorted(kept[:limit])


def prepare(
    out: Path,
    families: Sequence[Family] = FAMILIES,
    own_fonts: dict[str, Path] | None = None,
    source: Path | None = None,
    size: int = 32,
    min_fonts: int = 1,
    limit: int | None = None,
    workers: int = 1,
) -> dict[str, Any]:
    """Fetch the fonts, render their characters, and write pixels, code points, index and data card.

    Args:
        out: the folder to make.
        families: what to fetch.
        own_fonts: further families, name -> font file on this machine.
        source: a folder with the packages or with the font files; None asks apt.
        size: side of a picture.
        min_fonts: as in `choose`.
        limit: as in `choose`.
        workers: processes that render.

    Returns:
        The index, as it is written.
    """
    with tempfile.TemporaryDirectory(prefix="alimm-fonts-") as fonts, replaced_folder(out) as folder:
        sources = _collect(families, own_fonts or {}, source, Path(fonts))
        tables = {name: [(path, covered(path)) for path in paths] for name, (paths, _) in sources.items()}
        chosen = choose({name: set().union(*(t for _, t in files)) for name, files in tables.items()}, min_fonts, limit)
        plan: list[tuple[str, list[int]]] = []
        jobs: list[tuple[Path, int, list[int]]] = []
        for name, files in tables.items():
            left = set(chosen)
            for path, has in files:
                mine = sorted(left & has)
                left -= has
                for start in range(0, len(mine), CHUNK):
                    plan.append((name, mine[start : start + CHUNK]))
                    jobs.append((path, size, mine[start : start + CHUNK]))
        drawn: dict[str, list[tuple[list[int], NDArray[np.uint8]]]] = {name: [] for name in tables}
        for (name, codepoints), pixels in zip(plan, render_all(jobs, workers), strict=True):
            drawn[name].append((codepoints, pixels))
        entries = [_write_family(folder, name, drawn[name], size, meta) for name, (_, meta) in sources.items()]
        index = _index(entries, folder, size, min_fonts, limit)
        (folder / "README.md").write_text(_card(index), encoding="utf-8")
        (folder / INDEX).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
    return index


def _collect(
    families: Sequence[Family], own_fonts: dict[str, Path], source: Path | None, folder: Path
) -> dict[str, tuple[list[Path], dict[str, Any]]]:
    """Family -> its font files, and what the index says of it."""
    sources: dict[str, tuple[list[Path], dict[str, Any]]] = {}
    for family in families:
        paths = []
        for name, data in fetch_files(family.package, source).items():
            paths.append(folder / PurePosixPath(name).name)
            paths[-1].write_bytes(data)
        meta = dict(package=family.package.name, version=family.package.version, licence=family.licence)
        # In the order of the declaration, not of the archive: the first file draws what both have.
        order = [PurePosixPath(name).name for name in family.package.files]
        sources[family.name] = sorted(paths, key=lambda path: order.index(path.name)), meta
    for name, path in own_fonts.items():
        if name in sources or not path.is_file():
            fault = "the name is taken" if name in sources else f"there is no font file {path}"
            raise ValueError(f"--font {name}={path}: {fault}")
        sources[name] = [path], dict(package=None, version=None, licence="not known, a font of this machine")
    if not sources:
        raise ValueError("there is no font to render: give --font NAME=FILE or leave out --no-fetch")
    return sources


def _write_family(
    folder: Path, name: str, drawn: list[tuple[list[int], NDArray[np.uint8]]], size: int, meta: dict[str, Any]
) -> dict[str, Any]:
    codepoints = np.array([code for codes, _ in drawn for code in codes], np.uint32)
    pixels = np.concatenate([np.empty((0, size, size), np.uint8), *(part for _, part in drawn)])
    kept = np.flatnonzero((pixels <= INK).any(axis=(1, 2)))
    kept = kept[np.argsort(codepoints[kept])]
    blank = len(codepoints) - len(kept)
    codepoints, pixels = codepoints[kept], pixels[kept]
    np.save(folder / f"{name}.pixels.npy", pixels)
    np.save(folder / f"{name}.codepoints.npy", codepoints)
    distinct = len({picture.tobytes() for picture in pixels})
    return dict(
        name=name,
        **meta,
        glyphs=len(codepoints),
        blank=blank,
        same_as_another=len(codepoints) - distinct,
        pixels_sha256=hashlib.sha256(pixels.tobytes()).hexdigest(),
    )


def _index(entries: list[dict[str, Any]], folder: Path, size: int, min_fonts: int, limit: int | None) -> dict[str, Any]:
    from PIL import __version__ as pillow
    from PIL import features

    codepoints = np.concatenate([np.load(folder / f"{entry['name']}.codepoints.npy") for entry in entries])
    _, counts = np.unique(codepoints, return_counts=True)
    return dict(
        format=FORMAT,
        size=size,
        min_fonts=min_fonts,
        limit=limit,
        glyphs=len(codepoints),
        classes_by_fonts={str(least): int((counts >= least).sum()) for least in range(1, len(entries) + 1)},
        pillow=pillow,
        freetype=features.version("freetype2"),
        families=entries,
    )


def _card(index: dict[str, Any]) -> str:
    rows = "\n".join(
        f"| {entry['name']} | {entry['package'] or '-'} {entry['version'] or ''} | {entry['glyphs']:,} | "
        f"{entry['same_as_another']:,} | {entry['licence']} |"
        for entry in index["families"]
    )
    counts = ", ".join(f"{count:,} in at least {least}" for least, count in index["classes_by_fonts"].items())
    return f"""# HanGlyphs

{index["glyphs"]:,} pictures of Han characters, {index["size"]} x {index["size"]} pixels, grey, dark on white, drawn
from {len(index["families"])} font families with Pillow {index["pillow"]} and FreeType {index["freetype"]}. A class is a
code point (unified ideographs, without compatibility forms).

Classes by the number of families that have them: {counts}.

| family | package | glyphs | drawn as another one is | licence of the font |
|---|---|---|---|---|
{rows}

- Read by `alimm.HanGlyphs`, which keeps one family for the test.
- Rendered, not written by hand: pictures of one family differ by character alone, without noise.
- arphic-uming and babelstone-han go back to the same drawings: test on neither with the other in training.
- "Drawn as another one is" counts pictures equal, pixel by pixel, to that of another character in the family. No
  method can tell these apart.
- The licences are those of the fonts; their full texts are in the packages' copyright files. Look there before you
  pass pictures on.
"""


def _own_font(text: str) -> tuple[str, Path]:
    name, separator, path = text.partition("=")
    if not separator or not path or not name or not all(char.isalnum() or char in "-_" for char in name):
        raise argparse.ArgumentTypeError(f"expected NAME=FILE with a name of letters, digits, - and _, got {text!r}")
    return name, Path(path).expanduser()


def _count(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number above 0, got {text!r}")
    return int(text)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of ``tools/data/prepare_han_glyphs.py``."""
    parser = argparse.ArgumentParser(prog="prepare_han_glyphs.py", description=__doc__)
    parser.add_argument("--out", type=Path, help="folder to make; by default han_glyphs in alimm's data folder")
    parser.add_argument(
        "--from", dest="source", type=Path, metavar="DIR", help="a folder with the packages or the font files"
    )
    parser.add_argument(
        "--font", type=_own_font, action="append", default=[], metavar="NAME=FILE", help="one more font"
    )
    parser.add_argument("--no-fetch", action="store_true", help="use the fonts of --font alone")
    parser.add_argument("--size", type=_count, default=32, help="side of a picture in pixels (32)")
    parser.add_argument(
        "--min-fonts", type=_count, default=1, metavar="N", help="leave out characters in fewer families (1)"
    )
    parser.add_argument("--limit", type=_count, metavar="N", help="render N characters, those in most families first")
    parser.add_argument(
        "--workers", type=_count, default=os.cpu_count() or 1, metavar="N", help="processes (one a core)"
    )
    args = parser.parse_args(argv)
    out = (args.out or data_root() / FOLDER).expanduser().absolute()
    families = () if args.no_fetch else FAMILIES
    try:
        index = prepare(
            out, families, dict(args.font), args.source, args.size, args.min_fonts, args.limit, args.workers
        )
    except (ValueError, FetchError, ImportError) as error:
        print(f"prepare_han_glyphs.py: {error}", file=sys.stderr)
        return 1
    for entry in index["families"]:
        print(f"{entry['name']:<16} {entry['glyphs']:>7,} glyphs")
    print(f"{out}: {index['glyphs']:,} glyphs of {index['classes_by_fonts']['1']:,} characters")
    return 0
