"""alimm: ten published systems of large-scale visual recognition and search, as plugins for MMEngine.

Importing this module is cheap: it imports neither torch nor mmengine. The names below are loaded when first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from alimm.version import __version__

if TYPE_CHECKING:
    from alimm.apis.inferencers import EmbeddingInferencer, ImageClassificationInferencer
    from alimm.apis.model import get_model, init_model, list_models

_LAZY = {
    "init_model": "alimm.apis.model",
    "get_model": "alimm.apis.model",
    "list_models": "alimm.apis.model",
    "ImageClassificationInferencer": "alimm.apis.inferencers",
    "EmbeddingInferencer": "alimm.apis.inferencers",
}

__all__ = [
    "EmbeddingInferencer",
    "ImageClassificationInferencer",
    "__version__",
    "get_model",
    "init_model",
    "list_models",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'alimm' has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY])
