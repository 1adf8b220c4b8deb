"""The optional dependencies: one place that knows which extra brings which module."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

EXTRAS: dict[str, tuple[str, ...]] = {
    "det": ("mmcv", "mmdet", "pycocotools", "shapely"),
    "seg": ("mmcv", "mmseg", "ftfy", "regex", "prettytable"),
    "video": ("mmcv", "mmaction", "decord", "av", "einops"),
    "cuda": ("numba_cuda",),
    "cluster": ("ray",),
    "parquet": ("pyarrow",),
    "text": ("ftfy", "regex"),
    "focus": ("sklearn",),
    "batching": ("networkx",),
    "export": ("onnx", "onnxruntime"),
    "rivals": ("hnswlib", "usearch"),
    "dev": ("pytest", "hypothesis", "sklearn", "skimage", "tensorboard", "resvg_py", "fontTools"),
}
"""Extra -> the modules it brings. A module in two extras is named with the first."""


def require(module: str, why: str) -> ModuleType:
    """Import an optional module, or say which extra brings it.

    Args:
        module: what to import, e.g. ``'mmdet'``.
        why: what needs it, as the subject of a sentence: ``'the RetinaNet config'``.

    Raises:
        ImportError: it is not installed; the message holds the command that mends it.
    """
    try:
        return import_module(module)
    except ImportError as error:
        root = module.split(".")[0]
        if error.name is not None and error.name.split(".")[0] != root:
            raise
        extra = next((name for name, modules in EXTRAS.items() if root in modules), None)
        mend = f"pip install 'alimm[{extra}]'" if extra else f"pip install {root}"
        raise ImportError(f"{why} needs {root}, which is not installed. Install it with: {mend}", name=root) from error
