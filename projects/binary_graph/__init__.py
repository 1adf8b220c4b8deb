"""Binary Distributed Graph: approximate nearest neighbours over binary codes, built by many workers (CIKM 2019).

Importing this package is cheap: searching a saved index needs neither torch nor MMEngine.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

from alimm.projects.binary_graph import kernel_cache

if TYPE_CHECKING:
    from alimm.projects.binary_graph.config import BuildConfig
    from alimm.projects.binary_graph.graph import BinaryGraph

_LAZY = {
    "BinaryGraph": "alimm.projects.binary_graph.graph",
    "BuildConfig": "alimm.projects.binary_graph.config",
}

__all__ = ["BinaryGraph", "BuildConfig"]

kernel_cache.provide()  # before any kernel is imported

if "mmengine" in sys.modules:
    # A config or a registry asks for the plugin: MMEngine is there already.
    import_module("alimm.projects.binary_graph.registered")


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'alimm.projects.binary_graph' has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)
