"""MMEngine's checkpoints for models whose classifier is cut over ranks: ``alimm.ShardedCheckpointHook``."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from mmengine.fileio import LocalBackend
from mmengine.hooks import CheckpointHook, EMAHook
from mmengine.model import is_model_wrapper
from torch import nn

from alimm import compat
from alimm.apis.checkpoints import SHARDS_KEY, make_local_loader, remove_leftovers
from alimm.apis.sharded import (
    check_shards,
    folder_names,
    folders_of,
    load_module,
    load_module_optimizer,
    save_module,
    sharded_modules,
)
from alimm.distributed.block_writer import agree, gather_objects, partial_name
from alimm.distributed.blocks import BLOCK_ROWS
from alimm.distributed.collectives import rank_and_size
from alimm.heads.sharded_state import shards_left_out
from alimm.optim.row_state import without_row_arrays
from alimm.registry import HOOKS


@HOOKS.register_module()
class ShardedCheckpointHook(CheckpointHook):
    """`CheckpointHook` that saves every rank's rows of sharded heads, and loads them on any number of ranks.

    ``epoch_3.pth`` holds all but the rows of the classes and their optimizer state. These lie beside it in
    ``epoch_3.shards``, in blocks that do not depend on the number of ranks. The folder is complete before the ``.pth``
    that names it is written, and goes after it; a kill at any moment leaves the old checkpoint or the new one. Without
    a sharded head it is MMEngine's hook.

    Args:
        block_rows: rows of a block on the disk.
        **kwargs: passed on to ``CheckpointHook``.
    """

    def __init__(self, *args: Any, block_rows: int = BLOCK_ROWS, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if block_rows < 1:
            raise ValueError(f"block_rows must be at least 1, got {block_rows}")
        self.block_rows = block_rows
        self._loaded: dict[str, Path] = {}
        self._handles: list[Any] = []

    def before_run(self, runner: Any) -> None:
        """Prepare the runner: checkpoints as ``alimm.compat`` reads and writes them, shards as each rank drew them."""
        compat.checkpoint_loading(runner.work_dir)
        compat.checkpoint_writing()
        compat.checkpoint_keeping()
        compat.checkpoint_finding()
        if not hasattr(runner, "_alimm_keeps_shards"):
            runner._alimm_keeps_shards = True
            runner._init_model_weights = partial(_init_model_weights, runner._init_model_weights)

    def before_train(self, runner: Any) -> None:
        """Find the folder, clear what killed runs left there, and give the optimizer its rows where a run resumes.

        Raises:
            ValueError: the model, the hooks or the folder do not go together with sharded checkpoints.
        """
        super().before_train(runner)
        modules = sharded_modules(_model(runner))
        self._forget_loading()
        if not modules:
            return
        self._check(runner, modules)
        self.file_backend = _LocalBackendWithShards(list(modules))
        if rank_and_size()[0] == 0:
            for leftover in [*remove_leftovers(self.out_dir), *self._remove_orphans(list(modules))]:
                runner.logger.warning(f"removed {leftover}, which a killed run left")
        # Weights alone (load_from) start at iteration 0, and the optimizer with nothing.
        if runner.iter > 0:
            for path, folder in self._loaded.items():
                load_module_optimizer(modules[path], folder, _optimizers(runner))
        self._loaded = {}

    def _check(self, runner: Any, modules: dict[str, Any]) -> None:
        if any(isinstance(hook, EMAHook) for hook in runner.hooks):
            raise ValueError(
                "EMAHook averages a copy of the whole model, and the average of the classes would not be saved: leave "
                "it out of custom_hooks with a sharded head"
            )
        if not isinstance(self.file_backend, LocalBackend):
            raise ValueError(f"shards are saved to a local path, got out_dir={str(self.out_dir)!r}")
        world_size = rank_and_size()[1]
        for path, module in modules.items():
            if module.sharding.world_size != world_size:
                raise ValueError(
                    f"{path or 'the model'} is cut over {module.sharding.world_size} of {world_size} ranks; "
                    "checkpoints of shards need a head that is cut over all of them: leave out its group"
                )

    def _save_checkpoint_with_step(self, runner: Any, step: int, meta: dict[str, Any]) -> None:
        with self._saving_shards(runner):
            super()._save_checkpoint_with_step(runner, step, meta)

    def _save_best_checkpoint(self, runner: Any, metrics: dict[str, float]) -> None:
        with self._saving_shards(runner):
            super()._save_best_checkpoint(runner, metrics)

    @contextmanager
    def _saving_shards(self, runner: Any) -> Iterator[None]:
        """Within it `runner.save_checkpoint`, which MMEngine calls on every rank, writes the folders first."""
        if "save_checkpoint" in vars(runner) or not sharded_modules(_model(runner)):
            yield
            return
        runner.save_checkpoint = partial(self._save, runner, runner.save_checkpoint)
        try:
            yield
        finally:
            del runner.save_checkpoint

    def _save(
        self,
        runner: Any,
        save_rest: Any,
        out_dir: str,
        filename: str,
        *args: Any,
        save_optimizer: bool = True,
        meta: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        modules, folder, first = sharded_modules(_model(runner)), Path(out_dir), rank_and_size()[0] == 0
        names = self._choose_names(folder, filename, list(modules))
        optimizers = _optimizers(runner) if save_optimizer else []
        error: Exception | None = None
        try:
            for path, module in modules.items():
                save_module(module, folder / names[path], optimizers, self.block_rows)
            try:
                with shards_left_out():
                    meta = {**(meta or {}), SHARDS_KEY: names}
                    save_rest(out_dir, filename, *args, save_optimizer=save_optimizer, meta=meta, **kwargs)
            except Exception as problem:
                error = problem
            agree(error)
        except Exception:
            if first:
                for name in names.values():
                    discard_folder(folder / name)
            raise
        if first:
            for name in _both_names(Path(filename).stem, list(modules)) - set(names.values()):
                discard_folder(folder / name)

    def _choose_names(self, folder: Path, filename: str, paths: list[str]) -> dict[str, str]:
        """Names of folders that an older checkpoint of the name ``filename`` does not use; the same on all ranks."""
        names, error = folder_names(Path(filename).stem, paths), None
        if rank_and_size()[0] == 0:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                used = _names_in_use(folder / filename)
                if used & set(names.values()):
                    names = folder_names(Path(filename).stem, paths, again=True)
                for name in names.values():
                    discard_folder(folder / name)
            except OSError as problem:
                error = problem
        agree(error)
        chosen: dict[str, str] = gather_objects(names)[0]
        return chosen

    def _remove_orphans(self, paths: list[str]) -> list[Path]:
        """Delete folders of this hook's names without the checkpoint that would name them."""
        template = Path(self.filename_tmpl)
        step = re.escape(template.stem).replace(r"\{\}", r"\d+")
        middles = "|".join(re.escape(f".{path or 'model'}") for path in paths)
        pattern = re.compile(rf"(?P<stem>(best_.+_)?{step})(?:{middles})?(?:\.again)?\.shards")
        removed = []
        for folder in Path(self.out_dir).glob("*.shards"):
            match = pattern.fullmatch(folder.name)
            if match and folder.is_dir() and not folder.with_name(match["stem"] + template.suffix).exists():
                discard_folder(folder)
                removed.append(folder)
        return removed

    def before_save_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
        """Leave the optimizer's state of each row out: it is in the folder."""
        if SHARDS_KEY not in checkpoint["meta"] or "optimizer" not in checkpoint:
            return
        state, wrapper = checkpoint["optimizer"], runner.optim_wrapper
        if hasattr(wrapper, "optimizer"):
            checkpoint["optimizer"] = without_row_arrays(wrapper.optimizer, state)
        else:
            checkpoint["optimizer"] = {
                name: without_row_arrays(part.optimizer, state[name]) for name, part in wrapper.items()
            }

    def after_load_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
        """Check the folders that a checkpoint names, and load them when the rest of the model has been loaded.

        Raises:
            ValueError: on every rank: a folder is missing, damaged or of another classifier. The model is as it was.
        """
        self._forget_loading()
        model = _model(runner)
        self._loaded = folders_of(checkpoint)
        check_shards(model, self._loaded)
        modules = sharded_modules(model)
        for path, folder in self._loaded.items():
            hook = partial(_load_after, folder=folder)
            self._handles.append(modules[path].register_load_state_dict_post_hook(hook))

    def before_val(self, runner: Any) -> None:
        """Loading is over."""
        self._forget_loading()

    def before_test(self, runner: Any) -> None:
        """Loading is over."""
        self._forget_loading()

    def _forget_loading(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []


def _init_model_weights(init_model_weights: Any) -> None:
    # MMEngine sends every tensor of rank 0's state dict to all ranks here; the shards differ and must stay.
    with shards_left_out():
        init_model_weights()


def _load_after(module: nn.Module, incompatible_keys: Any, folder: Path) -> None:
    load_module(module, folder)


class _LocalBackendWithShards(LocalBackend):
    """Removes the folders of a checkpoint after the checkpoint."""

    def __init__(self, paths: list[str]) -> None:
        super().__init__()
        self._paths = paths

    def remove(self, filepath: str | os.PathLike[str]) -> None:
        super().remove(filepath)
        path = Path(filepath)
        for name in _both_names(path.stem, self._paths):
            discard_folder(path.with_name(name))


def discard_folder(folder: Path) -> None:
    """Delete a folder; a kill in between leaves a hidden name that the next run clears away."""
    if folder.is_dir():
        hidden = partial_name(folder)
        shutil.rmtree(hidden, ignore_errors=True)
        folder.rename(hidden)
        shutil.rmtree(hidden, ignore_errors=True)


def _both_names(stem: str, paths: list[str]) -> set[str]:
    return {name for again in (False, True) for name in folder_names(stem, paths, again).values()}


def _names_in_use(checkpoint: Path) -> set[str]:
    """The folders that the file names, none where there is no such file or it cannot be read."""
    if not checkpoint.is_file():
        return set()
    try:
        content = make_local_loader(checkpoint.parent)(str(checkpoint), "cpu")
        return {folder.name for folder in folders_of(content, checkpoint).values()}
    except Exception:
        return set()


def _model(runner: Any) -> nn.Module:
    model: nn.Module = runner.model.module if is_model_wrapper(runner.model) else runner.model
    return model


def _optimizers(runner: Any) -> list[torch.optim.Optimizer]:
    wrapper = runner.optim_wrapper
    if hasattr(wrapper, "optimizer"):
        return [wrapper.optimizer]
    return [part.optimizer for part in wrapper.values()]
