"""Inputs of a build, in memory or larger than it: arrays, ``.npy`` files and Parquet files as one kind of thing.

``source_from`` makes a source of whatever the user names. Each worker process opens the same source again from the JSON
that ``describe`` returns, so that no rows travel between processes.
"""

from __future__ import annotations

import glob
import os
import re
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from alimm.projects.binary_graph.array_files import write_array
from alimm.projects.binary_graph.packing import check_codes
from alimm.projects.binary_graph.source_base import BLOCK_ROWS, CodeSource, SourceBase, check_ids
from alimm.projects.binary_graph.source_npy import NpySource

__all__ = ["BLOCK_ROWS", "ArraySource", "CodeSource", "NpySource", "open_source", "source_from"]

Paths = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]

_KINDS = {".npy": "npy", ".parquet": "parquet", ".pq": "parquet"}


class ArraySource(SourceBase):
    """Codes, and perhaps ids, that are in memory.

    Args:
        codes: uint64 of shape (N, W), or bytes, uint8 of shape (N, 8 W). N may be 0.
        ids: whole numbers from 0, shape (N,); None: a row's number is its id.

    Raises:
        ValueError: arrays that are no codes, or ids that do not fit.
    """

    def __init__(self, codes: NDArray[Any], ids: NDArray[Any] | None = None) -> None:
        self._codes = check_codes("codes", codes)
        self.count, self.words = self._codes.shape
        self._ids = None if ids is None else np.ascontiguousarray(check_ids("ids", np.asarray(ids)))
        if self._ids is not None and len(self._ids) != self.count:
            raise ValueError(f"there are {self.count} codes and {len(self._ids)} ids; one id for each row is needed")
        self.has_ids = ids is not None

    def read(self, start: int, stop: int) -> NDArray[np.uint64]:
        """Codes of the rows [start, stop): a copy of shape (stop - start, W)."""
        self._check_range(start, stop)
        return self._codes[start:stop].copy()

    def ids(self, start: int, stop: int) -> NDArray[np.int64] | None:
        """External ids of the rows [start, stop), or None."""
        self._check_range(start, stop)
        return None if self._ids is None else self._ids[start:stop].copy()

    def describe(self, folder: Path | None = None) -> dict[str, Any]:
        """Write the arrays into ``folder`` and describe the files; what is there already is not written again.

        Raises:
            OSError: they could not be written; no file that is cut short is left behind.
            ValueError: ``folder`` is None.
        """
        if folder is None:
            raise ValueError("an array in memory can be read by other processes only from a file: name a folder for it")
        codes = _spill(folder, "codes", self._codes)
        ids = None if self._ids is None else [_spill(folder, "ids", self._ids)]
        return NpySource.scan([codes], ids).describe()


def _spill(folder: Path, name: str, array: NDArray[Any]) -> Path:
    crc32 = zlib.crc32(array.data)
    path = folder / f"{name}-{crc32:08x}-{'x'.join(map(str, array.shape))}.npy"
    if not _holds(path, array, crc32):
        folder.mkdir(parents=True, exist_ok=True)
        write_array(path, array)
    return path


def _holds(path: Path, array: NDArray[Any], crc32: int) -> bool:
    """Whether a file is there and holds the array, whatever its name says: a crash may have cut it short."""
    try:
        stored = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return False
    if stored.shape != array.shape or stored.dtype != array.dtype or not stored.flags.c_contiguous:
        return False
    if path.stat().st_size != getattr(stored, "offset", 0) + array.nbytes:
        return False
    return zlib.crc32(stored.data) == crc32


def open_source(description: dict[str, Any]) -> CodeSource:
    """The source that ``CodeSource.describe`` described, in this process.

    Raises:
        ValueError: a kind that is not known here.
    """
    kind = description.get("kind")
    if kind == "npy":
        return NpySource.from_description(description)
    if kind == "parquet":
        from alimm.projects.binary_graph.source_parquet import ParquetSource

        return ParquetSource.from_description(description)
    raise ValueError(f"expected the description of a source of the kind npy or parquet, got {kind!r}")


def source_from(
    origin: NDArray[Any] | CodeSource | Paths,
    *,
    column: str | None = None,
    id_column: str | None = None,
    ids: NDArray[Any] | Paths | None = None,
    block: int = BLOCK_ROWS,
) -> CodeSource:
    """Make a source of what the user has.

    Args:
        origin: an array of codes; or files, folders and patterns (``*``, ``**``), one or several: ``.npy`` or
            ``.parquet``. Files of a folder or a pattern come in natural order (part-9 before part-10), else in the
            order given. A source is returned as it is.
        column: the column of codes of Parquet files; None: the only one that can hold some.
        id_column: the column of external ids of Parquet files.
        ids: external ids: an array for an array, else ``.npy`` files, named as ``origin`` is.
        block: rows of a Parquet file that are decoded at a time.

    Raises:
        FileNotFoundError: a file is not there, or a pattern finds none.
        ImportError: a Parquet file without pyarrow.
        ValueError: files that hold no codes, differ in width or kind, or have no rows.
    """
    if isinstance(origin, CodeSource):
        if ids is not None or column is not None or id_column is not None:
            raise ValueError("a source brings its own ids and columns; give them where the source is made")
        return origin
    if isinstance(origin, np.ndarray):
        if column is not None or id_column is not None:
            raise ValueError("an array has no columns; leave column and id_column out")
        if ids is not None and not isinstance(ids, np.ndarray | list | tuple):
            raise ValueError(f"ids of an array must be an array, got {type(ids).__name__}")
        return ArraySource(origin, None if ids is None else np.asarray(ids))
    if isinstance(ids, np.ndarray):
        raise ValueError("ids of files must be in a file too: numpy.save them and name the file")
    paths = _expand(origin)
    id_paths = None if ids is None else _expand(ids)
    if id_column is not None and id_paths is not None:
        raise ValueError("ids come from a column or from a file, not from both; leave one out")
    kinds = {_kind(path) for path in paths}
    if len(kinds) > 1:
        raise ValueError("an input is either of .npy files or of .parquet files, got both; give one kind at a time")
    if id_paths is not None and any(_kind(path) != "npy" for path in id_paths):
        raise ValueError(f"ids must be in .npy files, got {id_paths[0].name}")
    if kinds == {"parquet"}:
        from alimm.projects.binary_graph.source_parquet import ParquetSource

        return ParquetSource.scan(paths, column, id_column, id_paths, block)
    if column is not None or id_column is not None:
        raise ValueError(
            ".npy files have no columns; leave column and id_column out (ids come from a file: ids=, --ids)"
        )
    source = NpySource.scan(paths, id_paths)
    if source.count == 0:
        raise ValueError(f"{paths[0]} has no rows; an input needs at least one")
    return source


def _kind(path: Path) -> str:
    suffix = path.suffix.lower()
    if suffix in _KINDS:
        return _KINDS[suffix]
    mend = "save its array with numpy.save" if suffix == ".npz" else "convert it"
    raise ValueError(f"{path} is neither a .npy nor a .parquet file; {mend}")


def _expand(origin: Any) -> list[Path]:
    names = [origin] if isinstance(origin, str | os.PathLike) else list(origin)
    if not names:
        raise ValueError("no input is named; name at least one file, folder or pattern")
    found: list[Path] = []
    for name in names:
        if not isinstance(name, str | os.PathLike):
            raise ValueError(f"an input is an array or the name of files, got {type(name).__name__}")
        path = Path(name)
        if path.is_dir():
            files = [child for child in path.iterdir() if child.suffix.lower() in _KINDS and child.name[0] not in "._"]
            if not files:
                raise FileNotFoundError(f"the folder {path} holds neither .npy nor .parquet files")
            found += sorted(files, key=_natural)
        elif path.exists() or not glob.has_magic(str(path)):
            if not path.exists():
                raise FileNotFoundError(f"there is no file {path}")
            found.append(path)
        else:
            files = [Path(match) for match in glob.glob(str(path), recursive=True) if os.path.isfile(match)]
            if not files:
                raise FileNotFoundError(f"no file matches {path}")
            found += sorted(files, key=_natural)
    real = [path.resolve() for path in found]
    twice = next((path for number, path in enumerate(found) if real[number] in real[:number]), None)
    if twice is not None:
        raise ValueError(f"{twice} is named twice; each file may be read once")
    return found


def _natural(path: Path) -> list[tuple[int, int, str]]:
    parts = re.split(r"(\d+)", str(path))
    return [(0, int(part), part) if part.isdecimal() else (1, 0, part) for part in parts]
