"""Where alimm's own files lie: configs and tools in a checkout or a wheel, the cache, the data folder."""

from __future__ import annotations

import os
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent


def resource_root() -> Path:
    """The folder that holds ``configs/`` and ``tools/``: the checkout, or ``alimm/.mim`` of an installed wheel."""
    checkout = PACKAGE.parent
    if (checkout / "configs").is_dir() and (checkout / "pyproject.toml").is_file():
        return checkout
    return PACKAGE / ".mim"


def cache_dir() -> Path:
    """``$MMENGINE_HOME/alimm``, else ``$XDG_CACHE_HOME/alimm``, else ``~/.cache/alimm``. Not created here."""
    if home := os.environ.get("MMENGINE_HOME"):
        return Path(home).expanduser() / "alimm"
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "alimm"


def data_root() -> Path:
    """Where the prepare scripts write and the dataset classes read: ``$ALIMM_DATA``, else ``data`` in the cache."""
    if root := os.environ.get("ALIMM_DATA"):
        return Path(root).expanduser()
    return cache_dir() / "data"
