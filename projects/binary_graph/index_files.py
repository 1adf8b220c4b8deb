"""The folder of a `BinaryGraphIndex`: a JSON file that names a folder of data, published last.

    index.json                    options, and what must be known of each file: size, dtype, shape, checksums
    data-<random>/hasher.npz      the hasher, where one is fitted
    data-<random>/features.npy    float32 or float16, mapped as int32 or uint16, ascending by id
    data-<random>/ids.npy         int64
    data-<random>/graph/          the folder of the `BinaryGraph`

Saving again writes another data folder, then replaces ``index.json``, then removes the former one: a kill leaves the
old index or the new one.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from alimm.projects.binary_graph.array_files import (
    ArrayEntry,
    DamagedIndexError,
    MissingFileError,
    open_array,
    open_regular,
    replace_file,
    sync_folder,
    write_array,
)

NAME = "index.json"
FORMAT = "alimm binary graph index"
VERSION = 1
_DATA = re.compile(r"data-[0-9a-f]{16}")
_LIMIT = 1 << 28
_CARRIERS = {"float32": "<i4", "float16": "<u2"}
"""Features lie in the files as whole numbers of their width, the types that these files know."""


def write_index(path: Path, options: dict[str, Any], fill: Callable[[Path], dict[str, Any]]) -> None:
    """Publish an index.

    Args:
        path: its folder: new, empty, or an index, which is replaced. Its parent must be there.
        options: what JSON takes.
        fill: writes the files into the folder it is given, and returns what ``read_index`` is to return of them.

    Raises:
        ValueError: the folder holds something else. It is left alone.
    """
    if path.is_symlink() or path.exists():
        if not path.is_dir():
            raise ValueError(f"{path} is a file; an index of this kind is a folder of its own: choose another name")
        foreign = [entry.name for entry in path.iterdir() if entry.name != NAME and not _DATA.fullmatch(entry.name)]
        if foreign:
            raise ValueError(f"{path} holds {sorted(foreign)[0]!r}, which is not of an index: choose another folder")
    new = not path.exists()
    path.mkdir(exist_ok=True)
    data = path / f"data-{os.urandom(8).hex()}"
    try:
        data.mkdir()
        body = {"format": FORMAT, "version": VERSION, "data": data.name, "options": options, "files": fill(data)}
        sync_folder(data)
        sync_folder(path)
        text = json.dumps(body, sort_keys=True)
        replace_file(path / NAME, [json.dumps({"crc32": zlib.crc32(text.encode()), "body": body}).encode()])
    except BaseException:
        shutil.rmtree(data, ignore_errors=True)
        if new:
            shutil.rmtree(path, ignore_errors=True)
        raise
    if new:
        sync_folder(path.parent)
    for entry in path.iterdir():
        if _DATA.fullmatch(entry.name) and entry.name != data.name:
            shutil.rmtree(entry, ignore_errors=True)


@contextmanager
def reading(path: Path) -> Iterator[tuple[Path, dict[str, Any], dict[str, Any]]]:
    """The data folder, the options and the files of an index; what goes wrong in the block names the index.

    Raises:
        ValueError: there is no index, or it is damaged.
    """
    file = path / NAME
    if not path.is_dir():
        raise ValueError(f"there is no index folder {path}")
    try:
        with open_regular(file) as stream:
            outer = json.loads(stream.read(_LIMIT))
        body = outer["body"]
        if outer["crc32"] != zlib.crc32(json.dumps(body, sort_keys=True).encode()):
            raise ValueError("its checksum does not match")
        if body["format"] != FORMAT or not isinstance(body["version"], int):
            raise ValueError(f"its format is {str(body['format'])[:80]!r}")
        if body["version"] > VERSION:
            raise ValueError(f"it was written by a newer alimm (version {body['version']}): upgrade")
        if not _DATA.fullmatch(body["data"]):
            raise ValueError("the name of its data folder is none")
        yield path / body["data"], body["options"], body["files"]
    except MissingFileError as error:
        raise MissingFileError(path, f"is no index or incomplete: {error}") from error
    except DamagedIndexError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DamagedIndexError(file, f"or a file of its index is damaged: {error}") from error


def write_features(data: Path, features: NDArray[Any], ids: NDArray[np.int64]) -> dict[str, Any]:
    """Write features and ids; what ``read_features`` needs."""
    carrier = _CARRIERS[features.dtype.name]
    return {
        "features": write_array(data / "features.npy", features.view(carrier)).to_json(),
        "ids": write_array(data / "ids.npy", ids).to_json(),
    }


def read_features(
    data: Path, files: dict[str, Any], dtype: str, dim: int, verify: str
) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """Map features (N, dim) and ids (N,), ascending.

    Raises:
        ValueError: they differ from what was written of them.
    """
    carriers = open_array(data / "features.npy", ArrayEntry.from_json(files["features"], "features.npy"), verify)
    ids = open_array(data / "ids.npy", ArrayEntry.from_json(files["ids"], "ids.npy"), verify)
    if carriers.dtype.str != _CARRIERS[dtype] or carriers.shape != (*ids.shape, dim) or ids.dtype != np.int64:
        raise ValueError(f"features {carriers.dtype} {carriers.shape} and ids {ids.shape} do not fit")
    if len(ids) and (ids[0] < 0 or not (ids[1:] > ids[:-1]).all()):
        raise ValueError("the ids are not unique and ascending")
    return carriers.view(dtype), ids


def checksum(path: Path) -> dict[str, int]:
    """Size and crc32 of a small file; and see that it is on the disk."""
    with path.open("rb") as file:
        content = file.read()
        os.fsync(file.fileno())
    return {"bytes": len(content), "crc32": zlib.crc32(content)}


def check_file(path: Path, entry: dict[str, int]) -> None:
    """Compare a small file with its checksum; `DamagedIndexError` if it differs."""
    with open_regular(path) as file:
        content = file.read()
    if len(content) != entry["bytes"] or zlib.crc32(content) != entry["crc32"]:
        raise DamagedIndexError(path, "does not match its checksum")
