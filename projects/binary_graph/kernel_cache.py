"""Where Numba keeps compiled kernels if it may write neither beside them nor into the user's cache folder.

Numba refuses to define a kernel with a cache that has no place, so an account without a home could not even search an
index. Such an account gets a private folder among the temporary files. Compiled code is loaded from it and run: nobody
else may be able to write there.
"""

from __future__ import annotations

import os
import stat
import sys
from contextlib import suppress
from pathlib import Path

VARIABLE = "NUMBA_CACHE_DIR"


def provide() -> Path | None:
    """Name a folder to Numba where it would find none; to be called before any kernel is defined.

    Returns:
        The folder, which is now in the environment, for the processes that we start too. None where Numba needs none.
    """
    config = getattr(sys.modules.get("numba"), "config", None)
    if os.environ.get(VARIABLE) or getattr(config, "CACHE_DIR", ""):
        return None
    import alimm_ops.graph

    beside = Path(alimm_ops.graph.__path__[0]) / "__pycache__"
    if is_writable(beside) or is_writable(_user_folder()):
        return None
    try:
        folder = _private_folder()
    except OSError:
        return None  # no place at all: Numba says so
    os.environ[VARIABLE] = str(folder)
    if config is not None:
        # Numba has read the environment already.
        config.CACHE_DIR = str(folder)
    return folder


def is_writable(folder: Path) -> bool:
    """Whether the folder takes files, or can be made and then does. Nothing is made."""
    folder = folder.absolute()
    there = next(place for place in (folder, *folder.parents) if os.path.exists(place))
    return there.is_dir() and os.access(there, os.W_OK | os.X_OK)


def _user_folder() -> Path:
    if sys.platform == "darwin":
        return Path(os.path.expanduser("~/Library/Caches/numba"))
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "numba"


def _private_folder() -> Path:
    """The folder of this user, made if need be. Where somebody else was there first: one for this process alone."""
    import tempfile

    folder = Path(tempfile.gettempdir()).absolute() / f"alimm-numba-{os.geteuid()}"
    with suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    found = folder.lstat()  # not of what a link leads to
    if stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid() and found.st_mode & 0o777 == 0o700:
        return folder
    import atexit

    own = Path(tempfile.mkdtemp(prefix="alimm-numba-"))
    atexit.register(_remove, own, os.getpid())
    return own


def _remove(folder: Path, process: int) -> None:
    if os.getpid() == process:  # not at the end of a forked child
        import shutil

        shutil.rmtree(folder, ignore_errors=True)
