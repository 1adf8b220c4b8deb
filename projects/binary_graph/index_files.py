"""The folder of a `BinaryGraphIndex`: a JSON file that names a folder of data, published last.

    index.json                    options, and what must be known of each file: size, dtype, shape, checksums
    data-<random>/hasher.npz      the hasher, where one is fitted
    data-<random>/features.npy    float32 or float16, mapped as int32 or uint16, ascending by id
    data-<random>/ids.npy         int64
    data-<random>/graph/          the folder of the `BinaryGraph`
    saving.txt                    while somebody saves: the data folder that is written, and the one that goes then
    .lock                         held by who saves

Saving again writes another data folder, then replaces ``index.json``, then removes the former one: a kill leaves the
old index or the new one, and the next saving removes what was left. Nothing goes that no file of ours names.
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
from alimm.projects.binary_graph.wal import LOCK, writer_lock

NAME = "index.json"
SAVING = "saving.txt"
FORMAT = "alimm binary graph index"
VERSION = 1
_DATA = re.compile(r"data-[0-9a-f]{16}")
_DAMAGE = (ValueError, KeyError, TypeError, AttributeError, RecursionError)
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
        ValueError: the folder holds something else, an index that cannot be read, or another process saves there. It is
            left alone.
    """
    if path.is_symlink() or path.exists():
        if not path.is_dir():
            raise ValueError(f"{path} is a file; an index of this kind is a folder of its own: choose another name")
        ours = (NAME, SAVING, LOCK)
        foreign = [entry.name for entry in path.iterdir() if entry.name not in ours and not _DATA.fullmatch(entry.name)]
        if foreign:
            raise ValueError(f"{path} holds {sorted(foreign)[0]!r}, which is not of an index: choose another folder")
        _former(path)
    try:
        path.mkdir()
        new = True
    except FileExistsError:
        new = False
    with writer_lock(path):
        _write_locked(path, new, options, fill)
    if new:
        sync_folder(path.parent)


def _write_locked(path: Path, new: bool, options: dict[str, Any], fill: Callable[[Path], dict[str, Any]]) -> None:
    former = _former(path)
    _remove_unfinished(path, former)
    data = path / f"data-{os.urandom(8).hex()}"
    try:
        replace_file(path / SAVING, [f"{data.name} {former or ''}".encode()])
        data.mkdir()
        body = {"format": FORMAT, "version": VERSION, "data": data.name, "options": options, "files": fill(data)}
        sync_folder(data)
        sync_folder(path)
        text = json.dumps(body, sort_keys=True)
        replace_file(path / NAME, [json.dumps({"crc32": zlib.crc32(text.encode()), "body": body}).encode()])
    except BaseException:
        shutil.rmtree(data, ignore_errors=True)
        (path / SAVING).unlink(missing_ok=True)
        if new:
            shutil.rmtree(path, ignore_errors=True)
        raise
    if former is not None:
        shutil.rmtree(path / former, ignore_errors=True)
    (path / SAVING).unlink(missing_ok=True)


def _former(path: Path) -> str | None:
    """The name of the data folder of the index that is there; None without one."""
    try:
        return str(_read_body(path / NAME)["data"])
    except MissingFileError:
        return None
    except _DAMAGE as error:
        raise ValueError(
            f"{path / NAME} is not of an index that can be replaced ({error}): choose another folder, or remove it"
        ) from error


def _remove_unfinished(path: Path, former: str | None) -> None:
    """Remove the data folders that a saving which was killed left; the lock tells that none is under way."""
    try:
        with open_regular(path / SAVING) as stream:
            names = stream.read(64).decode("ascii", "replace").split()
    except DamagedIndexError:
        return
    for name in names:
        if _DATA.fullmatch(name) and name != former:
            shutil.rmtree(path / name, ignore_errors=True)


def _read_body(file: Path) -> dict[str, Any]:
    """The content of the JSON file, which anybody may have written; one of ``_DAMAGE`` where it is not ours."""
    with open_regular(file) as stream:
        outer = json.loads(stream.read(_LIMIT))
    body: dict[str, Any] = outer["body"]
    if outer["crc32"] != zlib.crc32(json.dumps(body, sort_keys=True).encode()):
        raise ValueError("its checksum does not match")
    if body["format"] != FORMAT or not isinstance(body["version"], int):
        raise ValueError(f"its format is {str(body['format'])[:80]!r}")
    if body["version"] > VERSION:
        raise ValueError(f"it was written by a newer alimm (version {body['version']}): upgrade")
    if not _DATA.fullmatch(body["data"]):
        raise ValueError("the name of its data folder is none")
    return body


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
        body = _read_body(file)
        yield path / body["data"], body["options"], body["files"]
    except MissingFileError as error:
        raise MissingFileError(path, f"is no index or incomplete: {error}") from error
    except DamagedIndexError:
        raise
    except _DAMAGE as error:
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
