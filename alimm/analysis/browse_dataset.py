"""Draw samples of a data set as a contact sheet: as they are stored, as the model gets them, or both side by side."""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from mmengine.config import Config, DictAction
from mmengine.registry import DefaultScope
from numpy.typing import NDArray

from alimm.apis.config import load_config
from alimm.apis.errors import explain_build_errors
from alimm.registry import DATASETS, MODELS
from alimm.seeding import numpy_stream, seed_everything
from alimm.zoo.index import config_of

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageFont import FreeTypeFont, ImageFont

PHASES, MODES = ("train", "val", "test"), ("original", "transformed", "concat")
SIDE = 128
"""Longest side of a picture on the sheet, in pixels."""
PER_PAGE = 120
INK, FAINT, PANEL, PAPER = "#1c2430", "#5f6b7a", "#eef1f5", "#ffffff"


@dataclass
class Sample:
    """What a tile shows.

    Attributes:
        pictures: one or two, RGB uint8 (H, W, 3).
        label: name of the class, or empty.
        name: the sample's id.
    """

    pictures: list[NDArray[np.uint8]]
    label: str
    name: str


def build_dataset(config: Config, phase: str) -> Any:
    """Build the data set of a phase.

    Raises:
        ValueError: the config has none for this phase, or it is empty, or cannot be built.
    """
    loader = config.get(f"{phase}_dataloader")
    if not loader or not loader.get("dataset"):
        there = [name for name in PHASES if (config.get(f"{name}_dataloader") or {}).get("dataset")]
        raise ValueError(f"the config has no {phase}_dataloader with a dataset; it has {', '.join(there) or 'none'}")
    with DefaultScope.overwrite_default_scope(config.get("default_scope") or "alimm"), explain_build_errors(config):
        dataset = DATASETS.build(loader["dataset"])
    if len(dataset) == 0:
        raise ValueError(f"the {phase} data set of the config is empty")
    return dataset


class Viewer:
    """Turns items into samples.

    Args:
        config: says which data set, and which preprocessor the model has.
        phase: ``'train'``, ``'val'`` or ``'test'``.
        mode: ``'original'``, ``'transformed'`` or ``'concat'`` (both).
        seed: of the random transforms; a row looks the same whatever else is drawn.
    """

    def __init__(self, config: Config, phase: str, mode: str, seed: int = 0) -> None:
        self.dataset = build_dataset(config, phase)
        self.phase, self.mode, self.seed = phase, mode, seed
        self.classes: Sequence[str] = (getattr(self.dataset, "metainfo", None) or {}).get("classes") or ()
        settings = dict((config.get("model") or {}).get("data_preprocessor") or {})
        self.swap = bool(settings.get("bgr_to_rgb") or settings.get("to_rgb"))
        self.preprocessor: Any = None
        if mode != "original" and phase == "train" and settings.get("batch_augments"):
            # Augmentation of whole batches is part of what the model gets. Other steps of the preprocessor, as
            # normalisation, would only make the pictures hard to see.
            channels = len(settings.get("mean", (0,) * 3))
            plain = {**settings, "mean": (0.0,) * channels, "std": (1.0,) * channels}
            scope = DefaultScope.overwrite_default_scope(config.get("default_scope") or "alimm")
            with scope, explain_build_errors(config):
                self.preprocessor = MODELS.build(plain)

    def sample(self, row: int) -> Sample:
        """The sample of one row of the data set."""
        item = self.dataset.get_data_info(row)
        pictures = []
        label, name = item.get("gt_label"), item.get("sample_id", item.get("img_path", row))
        if self.mode != "transformed":
            pictures.append(_original(item))
        if self.mode != "original":
            seed_everything(self.seed, "browse_dataset", row)
            pictures.append(self._transformed(row))
        known = isinstance(label, int | np.integer) and 0 <= int(label) < len(self.classes)
        text = str(self.classes[int(label)]) if known else "" if label is None else str(label)
        return Sample(pictures, text, str(name))

    def _transformed(self, row: int) -> NDArray[np.uint8]:
        packed = self.dataset[row]
        if not isinstance(packed, dict) or "inputs" not in packed:
            raise ValueError(
                "the pipeline does not end in packed inputs: put dict(type='alimm.PackInputs') at its end, or use "
                "--mode original"
            )
        if self.preprocessor is not None:
            batch = {"inputs": [packed["inputs"]], "data_samples": [packed["data_samples"]]}
            values = self.preprocessor(batch, training=True)["inputs"][0].cpu().numpy()
        else:
            values = packed["inputs"].cpu().numpy()
            values = values[::-1] if self.swap else values
        if values.ndim != 3 or values.shape[0] not in (1, 3):
            raise ValueError(f"expected inputs of shape (1 or 3, H, W), got {values.shape}: these are no pictures")
        pixels = np.clip(np.rint(values.astype(np.float32)), 0, 255).astype(np.uint8).transpose(1, 2, 0)
        return np.repeat(pixels, 3 // pixels.shape[2], axis=2)


def _original(item: dict[str, Any]) -> NDArray[np.uint8]:
    from alimm.datasets.loading import LoadImage

    return np.asarray(LoadImage()(dict(item))["img"])


def choose_rows(length: int, number: int, seed: int) -> list[int]:
    """Draw ``number`` rows without repetition, in ascending order; all where there are no more."""
    if number >= length:
        return list(range(length))
    return sorted(numpy_stream(seed, "browse_dataset/rows").choice(length, number, replace=False).tolist())


def _fit(picture: NDArray[np.uint8]) -> Image:
    """Scale to the side of a tile; enlarged pixels stay square, so that one sees what there is."""
    from PIL import Image as Pillow

    height, width = picture.shape[:2]
    factor = SIDE / max(height, width)
    size = max(1, round(width * factor)), max(1, round(height * factor))
    method = Pillow.Resampling.NEAREST if factor >= 1 else Pillow.Resampling.LANCZOS
    return Pillow.fromarray(np.ascontiguousarray(picture)).resize(size, method)


def _font(size: int) -> FreeTypeFont | ImageFont:
    from PIL import ImageFont as Fonts

    return Fonts.load_default(size)


def _shown(text: str) -> str:
    """The text as Pillow's own font can draw it: other scripts as code points, ``U+6F22``."""
    try:
        text.encode("latin-1")
    except UnicodeEncodeError:
        pieces = [char if char.isascii() else f" U+{ord(char):04X} " for char in text]
        return " ".join("".join(pieces).split())
    return text


def _shortened(text: str, font: FreeTypeFont | ImageFont, width: int, keep_end: bool = False) -> str:
    text = _shown(text)
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "...") > width:
        text = text[1:] if keep_end else text[:-1]
    return "..." + text if keep_end else text + "..."


def draw_sheet(samples: Sequence[Sample], title: str) -> Image:
    """One page: a title and the samples in a grid that is about as wide as high."""
    from PIL import Image as Pillow
    from PIL import ImageDraw

    gap, margin, pad, caption, head = 10, 20, 8, 36, 40
    per_sample = max(len(sample.pictures) for sample in samples)
    tile_width = per_sample * (SIDE + pad) + pad
    tile_height = SIDE + 2 * pad + caption
    columns = min(len(samples), max(1, math.ceil(math.sqrt(len(samples) * 1.4 * tile_height / tile_width))))
    rows = math.ceil(len(samples) / columns)
    bold, small = _font(13), _font(11)
    width = max(2 * margin + columns * (tile_width + gap) - gap, 420)
    height = head + rows * (tile_height + gap) - gap + 2 * margin
    page = Pillow.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(page)
    heading = _font(16)
    draw.text((margin, margin - 4), _shortened(title, heading, width - 2 * margin), fill=INK, font=heading)
    for number, sample in enumerate(samples):
        left = margin + number % columns * (tile_width + gap)
        top = head + margin + number // columns * (tile_height + gap)
        draw.rounded_rectangle((left, top, left + tile_width, top + SIDE + 2 * pad), 6, fill=PANEL)
        for place, picture in enumerate(sample.pictures):
            scaled = _fit(picture)
            corner = left + pad + place * (SIDE + pad) + (SIDE - scaled.width) // 2
            page.paste(scaled, (corner, top + pad + (SIDE - scaled.height) // 2))
        below = top + SIDE + 2 * pad + 3
        lines = [(sample.label, bold, INK, False)] if sample.label else []
        lines.append((sample.name, small, FAINT, True))
        for line, (text, font, colour, keep_end) in enumerate(lines):
            short = _shortened(text, font, tile_width - 4, keep_end)
            draw.text((left + 2, below + 16 * line), short, fill=colour, font=font)
    return page


def write_png(samples: Sequence[Sample], title: str, out: Path, per_page: int = PER_PAGE) -> list[Path]:
    """Write one PNG, or ``NAME_1.png``, ``NAME_2.png``, ... where the samples need more than one page."""
    pages = [samples[start : start + per_page] for start in range(0, len(samples), per_page)]
    digits = len(str(len(pages)))
    paths = []
    out.parent.mkdir(parents=True, exist_ok=True)
    for number, page in enumerate(pages, start=1):
        path = out if len(pages) == 1 else out.with_name(f"{out.stem}_{number:0{digits}d}{out.suffix}")
        heading = title if len(pages) == 1 else f"{title}, page {number} of {len(pages)}"
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        draw_sheet(page, heading).save(temporary, format="PNG")
        os.replace(temporary, path)
        paths.append(path)
    return paths


def write_html(samples: Sequence[Sample], title: str, lead: str, out: Path) -> list[Path]:
    """Write one self-contained page with every picture inside."""
    from alimm.report.page import Page, Raw, escape, picture

    tiles = []
    for sample in samples:
        pictures = "".join(
            picture(np.asarray(_fit(pixels)), alt=sample.label or sample.name) for pixels in sample.pictures
        )
        tiles.append(
            f'<div><div style="display:flex;gap:4px">{pictures}</div><b>{escape(sample.label)}</b>'
            f'<div style="opacity:.7;overflow-wrap:anywhere">{escape(sample.name)}</div></div>'
        )
    columns = SIDE * max(len(sample.pictures) for sample in samples) + 8
    style = f"display:grid;gap:1rem;grid-template-columns:repeat(auto-fill,{columns}px);font-size:.8rem;line-height:1.3"
    page = Page(title, lead)
    page.section("Samples", Raw(f'<div style="{style}">{"".join(tiles)}</div>'))
    page.write(out)
    return [out]


def browse(
    config: str | os.PathLike[str] | Config,
    out: Path,
    phase: str = "train",
    mode: str = "transformed",
    number: int = 40,
    seed: int = 0,
    cfg_options: dict[str, Any] | None = None,
) -> list[Path]:
    """Draw samples of a data set.

    Args:
        config: a path, ``package::path`` or a Config.
        out: ``.png`` (a grid; more than 120 samples make several files) or ``.html`` (one self-contained page).
        phase: which data set of the config.
        mode: ``'original'``, ``'transformed'`` (pipeline and batch augmentation) or ``'concat'``, both side by side.
        number: how many samples, drawn without repetition; all where there are no more.
        seed: of the draw and of the random transforms.
        cfg_options: changes to the config.

    Returns:
        The files written.

    Raises:
        ValueError: an option or the config is wrong, or a picture cannot be read.
    """
    if out.suffix not in (".png", ".html"):
        raise ValueError(f"-o must end in .png or .html, got {out}")
    if number < 1:
        raise ValueError(f"--number must be at least 1, got {number}")
    loaded = load_config(config, cfg_options)
    viewer = Viewer(loaded, phase, mode, seed)
    rows = choose_rows(len(viewer.dataset), number, seed)
    samples = [viewer.sample(row) for row in _track(rows)]
    count = f"{len(rows):,} of {len(viewer.dataset):,}"
    title = f"{type(viewer.dataset).__name__}, {phase}, {mode}"
    if out.suffix == ".png":
        return write_png(samples, f"{title}: {count}", out)
    note = " Left as it is stored, right as the model gets it." if mode == "concat" else ""
    return write_html(samples, title, f"{count} samples, drawn with seed {seed}.{note}", out)


def _track(rows: list[int]) -> Iterable[int]:
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    return track(rows, description="Samples", console=console, transient=True, disable=not console.is_terminal)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of ``tools/browse_dataset.py``."""
    parser = argparse.ArgumentParser(prog="browse_dataset.py", description=__doc__)
    parser.add_argument("config", metavar="CONFIG", help="path, package::path, or a model of the zoo")
    parser.add_argument(
        "-o", "--output", type=Path, default=Path("samples.png"), metavar="FILE", help=".png or .html (samples.png)"
    )
    parser.add_argument("--phase", choices=PHASES, default="train", help="which data set of the config (train)")
    parser.add_argument(
        "--mode", choices=MODES, default="transformed", help="as stored, as the model gets them, or both (transformed)"
    )
    parser.add_argument("--number", type=int, default=40, metavar="N", help="how many samples (40)")
    parser.add_argument("--seed", type=int, default=0, help="of the draw and of the transforms (0)")
    parser.add_argument("--cfg-options", nargs="+", action=DictAction, help="changes to the config, key=value")
    args = parser.parse_args(argv)
    try:
        paths = browse(
            config_of(args.config), args.output, args.phase, args.mode, args.number, args.seed, args.cfg_options
        )
    except (ValueError, OSError, ImportError) as error:
        print(f"browse_dataset.py: {error}", file=sys.stderr)
        return 1
    for path in paths:
        print(path)
    return 0
