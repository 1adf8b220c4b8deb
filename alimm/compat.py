"""The gaps between the pinned packages, one function each. Each says when it can go.

``apply`` closes them all; ``alimm.apis`` calls it before anything is built. Importing alimm, or this module, patches
nothing. Nothing here imports mmdet, mmseg or mmaction: what concerns them acts when somebody else imports them.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import partial, wraps
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from mmengine.fileio import LocalBackend
from mmengine.hooks import CheckpointHook, checkpoint_hook
from mmengine.runner import checkpoint, runner

from alimm.apis import checkpoints
from alimm.distributed.launch import init_gloo


def apply(work_dir: str | os.PathLike[str] | None = None) -> None:
    """Close every gap of this process. May be called again, with another run's folder.

    Args:
        work_dir: the run's own folder, see ``checkpoint_loading``.
    """
    checkpoint_loading(work_dir)
    checkpoint_writing()
    checkpoint_keeping()
    checkpoint_finding()
    apply_to_imports()


def apply_to_imports() -> None:
    """Close the gaps that keep mmdet, mmseg and mmaction from importing; enough to build a model."""
    package_paths()
    mmaction_missing_module()
    mmaction_importlib_metadata()
    removed_numpy_names()


def checkpoint_loading(work_dir: str | os.PathLike[str] | None) -> None:
    """Read local checkpoints with the restricted unpickler, see ``alimm.apis.checkpoints``.

    torch 2.6 made ``weights_only=True`` the default of ``torch.load``, which refuses what MMEngine 0.10.7 saves, so no
    run could be resumed. Can go when MMEngine saves and loads plain types only.
    """
    loader = checkpoints.make_local_loader(work_dir)
    checkpoint.CheckpointLoader.register_scheme(prefixes="", loader=loader, force=True)


def checkpoint_writing() -> None:
    """Write files of the local backend, and ``last_checkpoint``, whole or not at all.

    MMEngine 0.10.7 opens the final name and writes into it: a kill in between leaves half a file under the name that
    the run resumes from. Can go when MMEngine writes to a temporary name and renames.
    """

    def put(self: LocalBackend, obj: bytes, filepath: str | os.PathLike[str]) -> None:
        os.makedirs(os.path.dirname(os.path.abspath(filepath)), exist_ok=True)
        with checkpoints.atomic_open(filepath) as file:
            file.write(obj)

    def open_whole(path: str, mode: str = "r") -> Any:
        return checkpoints.atomic_open(path, mode, encoding="utf-8") if mode == "w" else open(path, mode)

    LocalBackend.put = put
    # The hook writes the pointer with the built-in open; a name in its module hides that one there and nowhere else.
    checkpoint_hook.open = open_whole


class _LaterRemoval:
    """A local file backend whose removals wait until ``flush``."""

    def __init__(self, backend: Any) -> None:
        self._backend = backend
        self._waiting: list[tuple[str, int]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def remove(self, path: str) -> None:
        self._waiting.append((path, os.stat(path).st_ino))

    def flush(self) -> None:
        for path, inode in self._waiting:
            # The new checkpoint may bear the name of the old one; it is another file then.
            if os.path.isfile(path) and os.stat(path).st_ino == inode:
                self._backend.remove(path)


def checkpoint_keeping() -> None:
    """Remove old checkpoints after the new one is written, not before.

    With ``max_keep_ckpts=1`` MMEngine 0.10.7 deletes the only checkpoint and then starts to write the next; a kill in
    between loses the run. It does the same with the best checkpoint. Can go when MMEngine changes the order.
    """
    if getattr(CheckpointHook, "_alimm_removes_later", False):
        return
    for name in ("_save_checkpoint_with_step", "_save_best_checkpoint"):
        original = getattr(CheckpointHook, name)

        @wraps(original)
        def removing_later(self: Any, *args: Any, _original: Any = original, **kwargs: Any) -> None:
            backend = self.file_backend
            if not isinstance(backend, LocalBackend):
                _original(self, *args, **kwargs)
                return
            self.file_backend = later = _LaterRemoval(backend)
            try:
                _original(self, *args, **kwargs)
            finally:
                self.file_backend = backend
            later.flush()

        setattr(CheckpointHook, name, removing_later)
    CheckpointHook._alimm_removes_later = True


def checkpoint_finding() -> None:
    """Let a run that resumes by itself pass over checkpoints that cannot be read.

    MMEngine 0.10.7 takes what ``last_checkpoint`` names, whatever state that is in. Can go when MMEngine checks it.
    """
    runner.find_latest_checkpoint = checkpoints.find_resumable


def package_paths() -> None:
    """Find installed packages without ``pkg_resources``, which setuptools 82 dropped.

    MMEngine 0.10.7 imports it to resolve ``_base_ = 'mmdet::...'``. Acts only where it is missing. Can go when MMEngine
    uses ``importlib.metadata``.
    """
    if importlib.util.find_spec("pkg_resources") is not None:
        return
    import mmengine.config.config
    import mmengine.hub.hub
    import mmengine.utils

    def get_installed_path(package: str) -> str:
        spec = importlib.util.find_spec(package.replace("-", "_"))
        if spec is None or spec.origin is None:
            raise ImportError(f"the package {package} is not installed", name=package)
        return os.path.dirname(spec.origin)

    def is_installed(package: str) -> bool:
        return importlib.util.find_spec(package.replace("-", "_")) is not None

    for module in (mmengine.config.config, mmengine.hub.hub, mmengine.utils, mmengine.utils.package_utils):
        module.get_installed_path = get_installed_path
    for module in (mmengine.utils, mmengine.utils.package_utils):
        module.is_installed = is_installed


class _MissingDrn(MetaPathFinder, Loader):
    """Finds ``mmaction.models.localizers.drn`` when nobody else does."""

    NAMES = ("mmaction.models.localizers.drn", "mmaction.models.localizers.drn.drn")

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        return ModuleSpec(fullname, self, is_package=fullname == self.NAMES[0]) if fullname in self.NAMES else None

    def exec_module(self, module: ModuleType) -> None:
        class DRN:
            """Takes the place of the localizer that the wheel of mmaction2 1.2.0 lacks."""

            def __init__(self, *args: Any, **kwargs: Any) -> None:
                raise ImportError("the wheel of mmaction2 1.2.0 does not contain the localizer DRN")

        vars(module)["DRN"] = DRN


def mmaction_missing_module() -> None:
    """Let ``mmaction.models`` be imported although its wheel lacks the folder ``localizers/drn``.

    Asked last, so a complete mmaction is left alone. Can go when a fixed mmaction2 (after 1.2.0) is pinned.
    """
    if not any(isinstance(finder, _MissingDrn) for finder in sys.meta_path):
        sys.meta_path.append(_MissingDrn())


REMOVED_NUMPY_NAMES: dict[str, tuple[str, ...]] = {
    "mmcv.ops.pixel_group": ("float",),
    "mmdet.evaluation.functional.ytviseval": ("float",),
    "mmaction.datasets.transforms.pose_transforms": ("Inf",),
    "mmaction.evaluation.functional.accuracy": ("trapz",),
    "mmaction.evaluation.functional.ava_evaluation.metrics": ("NAN",),
    "mmaction.evaluation.metrics.multimodal_metric": ("in1d",),
    "mmaction.utils.misc": ("Inf",),
}
"""Module -> the names that it takes from NumPy and that NumPy 1.24 to 2.4 removed."""


def _removed_numpy_value(name: str) -> Any:
    values = {"float": float, "Inf": np.inf, "NAN": np.nan, "trapz": getattr(np, "trapezoid", None), "in1d": np.isin}
    return values[name]


class _NumpyWithRemovedNames(ModuleType):
    """NumPy for one module: what NumPy has, and the names that it had."""

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__("numpy")
        for name in names:
            setattr(self, name, _removed_numpy_value(name))

    def __getattr__(self, name: str) -> Any:
        return getattr(np, name)


class _AroundImport(MetaPathFinder):
    """Imports certain modules inside a context manager of ours; finds nothing itself."""

    def __init__(self) -> None:
        self.contexts: dict[str, Callable[[ModuleType], AbstractContextManager[None]]] = {}

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if fullname not in self.contexts:
            return None
        for finder in sys.meta_path:
            if finder is self or (spec := finder.find_spec(fullname, path, target)) is None:
                continue
            loader: Any = spec.loader
            loader.exec_module = partial(self._exec_module, loader.exec_module)
            return spec
        return None

    def _exec_module(self, original: Callable[[ModuleType], None], module: ModuleType) -> None:
        with self.contexts[module.__name__](module):
            original(module)


def _around_import() -> _AroundImport:
    for finder in sys.meta_path:
        if isinstance(finder, _AroundImport):
            return finder
    sys.meta_path.insert(0, new := _AroundImport())
    return new


@contextlib.contextmanager
def _with_removed_numpy_names(module: ModuleType) -> Iterator[None]:
    yield
    names = [name for name in REMOVED_NUMPY_NAMES[module.__name__] if not hasattr(np, name)]
    if names:
        vars(module)["np"] = _NumpyWithRemovedNames(names)


def removed_numpy_names() -> None:
    """Give back removed NumPy names to the modules of mmcv, mmdet and mmaction that use them, and to no other.

    Can go when those packages are pinned to releases that run on NumPy 2.
    """
    for name in REMOVED_NUMPY_NAMES:
        _around_import().contexts[name] = _with_removed_numpy_names
        if name in sys.modules and not isinstance(sys.modules[name].np, _NumpyWithRemovedNames):
            with _with_removed_numpy_names(sys.modules[name]):
                pass


@contextlib.contextmanager
def _with_importlib_metadata(module: ModuleType) -> Iterator[None]:
    added = importlib.util.find_spec("importlib_metadata") is None
    if added:
        sys.modules["importlib_metadata"] = importlib.metadata
    try:
        yield
    finally:
        if added:
            del sys.modules["importlib_metadata"]


def mmaction_importlib_metadata() -> None:
    """Let mmaction find ``importlib_metadata``, which it needs and does not declare, in the standard library.

    The name exists only while ``mmaction.utils.dependency`` is imported. Can go when mmaction2 declares it or uses
    ``importlib.metadata``.
    """
    _around_import().contexts["mmaction.utils.dependency"] = _with_importlib_metadata


def cpu_distributed(config: Config, launcher: str, device: str) -> None:
    """Prepare a distributed run on the CPU: a gloo group, and a model wrapper without device numbers.

    MMEngine 0.10.7 calls ``torch.cuda.set_device`` and gives ``device_ids`` to DistributedDataParallel for every
    launcher. It makes no group of its own when there is one, and takes a ``model_wrapper_cfg`` of the config, so a
    config that has one keeps it. Can go when MMEngine's launchers know the CPU.

    Args:
        config: changed in place.
        launcher: ``'pytorch'``, ``'slurm'`` or ``'mpi'``; nothing is done for ``'none'``.
        device: nothing is done unless it is ``'cpu'``.
    """
    if launcher == "none" or device != "cpu":
        return
    timeout = config.get("env_cfg", {}).get("dist_cfg", {}).get("timeout", 1800)
    init_gloo(launcher, timeout_s=float(timeout))
    if config.get("model_wrapper_cfg") is None:
        config.model_wrapper_cfg = dict(
            type="alimm.CpuDistributedDataParallel",
            find_unused_parameters=config.get("find_unused_parameters", False),
        )


@contextlib.contextmanager
def chosen_device(device: str) -> Iterator[None]:
    """Make MMEngine put models on ``device`` (``'cpu'``, ``'cuda'`` or ``'cuda:N'``) inside the block.

    MMEngine 0.10.7 takes CUDA whenever there is one. Can go when its runner has a device option.
    """
    import mmengine.device.utils as device_utils

    kind, _, index = device.partition(":")
    before = device_utils.DEVICE
    device_utils.DEVICE = kind
    if index:
        torch.cuda.set_device(int(index))
    try:
        yield
    finally:
        device_utils.DEVICE = before
