"""What a program calls: ``load_config``, models by name, inferencers; ``train.train`` and ``test.test`` in modules.

The names are loaded when first used, so that importing one does not bring the runner.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from alimm.apis.config import load_config
    from alimm.apis.inferencers import EmbeddingInferencer, ImageClassificationInferencer
    from alimm.apis.model import get_model, init_model, list_models

_LAZY = {
    "load_config": "alimm.apis.config",
    "init_model": "alimm.apis.model",
    "get_model": "alimm.apis.model",
    "list_models": "alimm.apis.model",
    "ImageClassificationInferencer": "alimm.apis.inferencers",
    "EmbeddingInferencer": "alimm.apis.inferencers",
}

__all__ = [
    "EmbeddingInferencer",
    "ImageClassificationInferencer",
    "get_model",
    "init_model",
    "list_models",
    "load_config",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'alimm.apis' has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)
