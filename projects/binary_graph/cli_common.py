"""What the sub-commands of ``alimm index`` share: how they read words, and how they print."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from alimm.projects.binary_graph.config import BuildConfig
    from alimm.projects.binary_graph.graph import BinaryGraph

_UNITS = {"": 1, "b": 1} | {
    unit: base**power
    for power, letter in enumerate("kmgt", 1)
    for unit, base in ((f"{letter}b", 1000), (f"{letter}ib", 1024))
}


def size(text: str) -> int:
    """Bytes of ``256MB``, ``1GiB``, ``1.5 GB`` or ``4096``; for argparse.

    Raises:
        argparse.ArgumentTypeError: another form, or less than one byte.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", text.lower())
    if found is None or found[2] not in _UNITS or round(float(found[1]) * _UNITS[found[2]]) < 1:
        raise argparse.ArgumentTypeError(f"expected a size like 256MB, 1GiB or 4096 (bytes), got {text!r}")
    return round(float(found[1]) * _UNITS[found[2]])


def at_least_one(text: str) -> int:
    """A whole number above 0; for argparse.

    Raises:
        argparse.ArgumentTypeError: anything else.
    """
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


def numbers(text: str) -> list[int]:
    """Whole numbers above 0, separated by commas; for argparse."""
    return [at_least_one(part.strip()) for part in text.split(",")]


def read_ids(words: Sequence[str]) -> NDArray[np.int64]:
    """External ids that are named one by one, as ranges, or in files.

    Args:
        words: each a number; a range, ``10-19``, both ends included; a ``.npy`` file; or a text file, one id a line.

    Raises:
        FileNotFoundError: a word is none of these.
        ValueError: a file holds something else, or a number is out of range.
    """
    found = [_ids_of(word) for word in words]
    return np.concatenate([np.empty(0, np.int64), *found])


def _ids_of(word: str) -> NDArray[np.int64]:
    from alimm.projects.binary_graph.source_base import check_ids
    from alimm.projects.binary_graph.source_npy import NpyRows

    path = Path(word)
    named = re.fullmatch(r"(\d+)(?:-(\d+))?", word)
    if named and not path.is_file():
        first, last = int(named[1]), int(named[2] or named[1])
        if last >= 2**63:
            raise ValueError(f"ids lie from 0 to 2**63 - 1, got {word}")
        if last < first:
            raise ValueError(f"a range of ids goes up, got {word}")
        if last - first >= 10**9:
            raise ValueError(f"a range of ids has at most 1e9 of them, got {word}")
        return np.arange(last - first + 1, dtype=np.int64) + first
    if not path.is_file():
        raise FileNotFoundError(f"{word} is neither an id, nor a range of ids (10-19), nor a file of ids")
    if path.suffix.lower() == ".npy":
        rows = NpyRows.scan([path])
        return check_ids(f"ids in {path}", rows.read(0, rows.count))
    ids = []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        text = line.decode("ascii", "replace").strip()
        if not text:
            continue
        if not text.isdecimal() or int(text) >= 2**63:
            raise ValueError(f"line {number} of {path} is no id, a whole number from 0: {text[:40]!r}")
        ids.append(int(text))
    return np.array(ids, np.int64)


def build_config(settings: Sequence[str], **values: Any) -> BuildConfig:
    """The configuration of a build.

    Args:
        settings: ``name=value``, values as JSON or plain words.
        values: further ones; None is left out.

    Raises:
        ValueError: a name that there is not, or a value that it does not take.
    """
    from dataclasses import fields

    from alimm.projects.binary_graph.config import BuildConfig

    names = [entry.name for entry in fields(BuildConfig) if entry.init]
    given = {name: value for name, value in values.items() if value is not None}
    for setting in settings:
        name, equals, text = setting.partition("=")
        if not equals or name not in names:
            raise ValueError(f"--set takes NAME=VALUE with one of {', '.join(names)}; got {setting!r}")
        if name in given:
            raise ValueError(f"{name} is set twice; leave one out")
        given[name] = _value(text)
    try:
        return BuildConfig(**given)
    except TypeError as error:
        raise ValueError(f"a value of --set does not fit: {error}") from error


def _value(text: str) -> Any:
    words = {"True": True, "False": False, "None": None}
    if text in words:
        return words[text]
    try:
        return json.loads(text)
    except ValueError:
        return text


def open_index(folder: str, read_only: bool = True) -> BinaryGraph:
    """Open the index in a folder.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: there is no index in it, or it is damaged.
    """
    from alimm.projects.binary_graph.graph import BinaryGraph

    if not Path(folder).is_dir():
        raise FileNotFoundError(
            f"there is no index folder {folder}; `alimm index build INPUT --out {folder}` makes one"
        )
    return BinaryGraph.open(folder, read_only=read_only)


def claim(index: BinaryGraph) -> None:
    """Keep other writers out until the index is closed: what is checked now must hold when the change comes.

    Raises:
        ValueError: another writer has the folder, or it cannot be written to.
    """
    index.delete(np.empty(0, np.int64))  # no change, but the first change locks


def at_most_rows(k: int, index: BinaryGraph) -> int:
    """``k``, or the number of live rows where it is more, and a note about that on standard error."""
    rows = len(index)
    if k <= max(1, rows):
        return k
    print(f"note: -k {k:,} is lowered to {max(1, rows):,}, as the index has {rows:,} live rows", file=sys.stderr)
    return max(1, rows)


def segment_infos(index: BinaryGraph) -> list[dict[str, Any]]:
    """How each segment was built, as its builder noted it."""
    return [part.segment.info for part in index._view.parts]


def shown_size(count: float) -> str:
    """Bytes with a unit, powers of 1000."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def print_pairs(pairs: Iterable[tuple[str, Any]]) -> None:
    """Print a name and a value a line, whole numbers with separators."""
    pairs = list(pairs)
    width = max((len(name) for name, _ in pairs), default=0)
    for name, value in pairs:
        whole = isinstance(value, int) and not isinstance(value, bool)
        print(f"{name:<{width}}  {format(value, ',') if whole else value}")


def print_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print columns that are as wide as they need, aligned to the right."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    for row in (head, *rows):
        print("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
