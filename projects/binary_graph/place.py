"""The place where an index is to be written: what may be replaced there, and the folder in which a new one is made.

A new index is made in a folder beside its place, ``.<name>.part-<host>-<pid>-<random>``, which is renamed when all is
in it. The name says whose it is: what a killed process left is removed when the place is written to again.
"""

from __future__ import annotations

import os
import re
import shutil
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from alimm.projects.binary_graph.array_files import DamagedIndexError
from alimm.projects.binary_graph.manifest import IndexVersionError, Manifest, NoIndexError, load
from alimm.projects.binary_graph.part_files import host_name, is_alive

_MEND = "A folder that cannot be read is not replaced: remove it, or name another one, then build the index again"


def replaceable(path: Path) -> Manifest | None:
    """The manifest of the index that is to be replaced; None where the place is free.

    Raises:
        ValueError: a file is there, a folder with something else, or an index that cannot be read.
    """
    try:
        return load(path)
    except NoIndexError:
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise ValueError(
                f"{path} is there and is no index: name a new or an empty folder, or that of an index to replace"
            ) from None
        return None
    except IndexVersionError as error:
        raise IndexVersionError(f"{error}. {_MEND}") from None
    except DamagedIndexError as error:
        raise DamagedIndexError(path, f"holds an index that is damaged ({error})", _MEND) from None


@contextmanager
def folder_beside(path: Path) -> Iterator[Path]:
    """A new folder to make an index in, on the same disk as its place; removed in the end unless it was renamed.

    Raises:
        OSError: nothing can be written beside the place; what of its parents was made is taken back.
    """
    missing = [parent for parent in path.parents if not parent.exists()]
    prefix = f".{path.name}.part-{zlib.crc32(host_name().encode()):08x}-"
    temporary = path.with_name(f"{prefix}{os.getpid()}-{os.urandom(4).hex()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with suppress(OSError):
            _clean(path.parent, prefix)
        temporary.mkdir()
        yield temporary
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        with suppress(OSError):  # somebody else may use them by now
            for parent in missing:
                parent.rmdir()
        raise
    shutil.rmtree(temporary, ignore_errors=True)


def _clean(parent: Path, prefix: str) -> None:
    """Remove the folders that processes of this machine began and did not live to rename."""
    for folder in parent.iterdir():
        match = re.fullmatch(rf"{re.escape(prefix)}(\d{{1,9}})-[0-9a-f]{{8}}", folder.name)
        if match and not folder.is_symlink() and not is_alive(int(match[1])):
            shutil.rmtree(folder, ignore_errors=True)
