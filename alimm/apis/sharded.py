"""Models with sharded heads and the folders of row blocks beside their checkpoints.

A sharded head is a module with ``alimm_sharded = True``, ``sharding``, ``weight`` (own rows, D), ``permutation``,
``shard_arrays()``, ``shard_scalars()`` and ``load_shard(arrays, scalars)``. Its rows, the arrays beside them and the
optimizer's state of each row go into a folder beside the ``.pth``, whose ``meta['alimm_shards']`` names the folder by
the path of the module in the model.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from alimm.apis.checkpoints import PATH_KEY, SHARDS_KEY
from alimm.distributed.block_writer import communication_device, gather_objects, write_blocks
from alimm.distributed.blocks import BLOCK_ROWS, DTYPES, BlockIndex, dtype_name, read_index, read_rows, verify
from alimm.distributed.collectives import raise_together
from alimm.optim.row_state import flush_rows, load_row_arrays, row_arrays, row_scalars

OPTIMIZER_PREFIX = "optimizer."


def sharded_modules(model: nn.Module) -> dict[str, Any]:
    """The sharded heads of a model by their path in it (``''`` is the model itself)."""
    return {path: module for path, module in model.named_modules() if getattr(module, "alimm_sharded", False)}


def folder_names(stem: str, paths: Iterable[str], again: bool = False) -> dict[str, str]:
    """The folder of each sharded module of the checkpoint ``<stem>.pth``.

    Args:
        stem: the name of the checkpoint without its suffix.
        paths: of the modules.
        again: the other name, for a checkpoint that is written over an older one of the same name: the older folder
            must stay until the new ``.pth`` is there.
    """
    found = list(paths)
    suffix = ".again.shards" if again else ".shards"
    # One head is the usual case, and its folder has the checkpoint's own name.
    return {path: f"{stem}{suffix}" if len(found) == 1 else f"{stem}.{path or 'model'}{suffix}" for path in found}


def optimizer_of(parameter: nn.Parameter, optimizers: Iterable[torch.optim.Optimizer]) -> torch.optim.Optimizer | None:
    """The optimizer that has a parameter, or None."""
    for optimizer in optimizers:
        if any(parameter is other for group in optimizer.param_groups for other in group["params"]):
            return optimizer
    return None


def _same_on_all_ranks(arrays: dict[str, torch.Tensor], module: Any) -> dict[str, torch.Tensor]:
    """Add zeros for state that other ranks have and this one does not, as with no gradient yet or no rows."""
    own = {name: (dtype_name(array.dtype), tuple(array.shape[1:])) for name, array in arrays.items()}
    for known in gather_objects(own, module.sharding.group):
        for name, (dtype, shape) in known.items():
            if name not in arrays:
                arrays[name] = torch.zeros((module.sharding.size, *shape), dtype=DTYPES[dtype])
    return arrays


def save_module(
    module: Any,
    folder: str | os.PathLike[str],
    optimizers: Iterable[torch.optim.Optimizer] = (),
    block_rows: int = BLOCK_ROWS,
) -> BlockIndex:
    """Write the blocks of a sharded head; every rank must call.

    Args:
        module: the head.
        folder: must not exist, see ``write_blocks``.
        optimizers: the one that has the head's weight saves its state of each row too.
        block_rows: rows of a block.
    """
    flush_rows(module.weight)
    arrays = {"weight": module.weight.detach(), **module.shard_arrays()}
    scalars: dict[str, Any] = dict(
        head=module.shard_scalars(), permutation=dict(kind=module.permutation.kind, seed=module.permutation.seed)
    )
    optimizer = optimizer_of(module.weight, optimizers)
    if optimizer is not None:
        rows = _same_on_all_ranks(row_arrays(optimizer, module.weight), module)
        arrays.update({f"{OPTIMIZER_PREFIX}{name}": array for name, array in rows.items()})
        # For the record: the optimizer's own state dict has it.
        scalars["optimizer"] = row_scalars(optimizer, module.weight)
    return write_blocks(folder, arrays, module.sharding, scalars, block_rows)


def folders_of(checkpoint: Mapping[str, Any], path: str | os.PathLike[str] | None = None) -> dict[str, Path]:
    """The folders that a checkpoint names, by module; empty where it has no shards.

    Args:
        checkpoint: as it was loaded.
        path: its file; by default what the loader noted in it.

    Raises:
        ValueError: its meta is wrong, or nobody knows where the file lies.
    """
    meta = checkpoint.get("meta")
    names = meta.get(SHARDS_KEY) if isinstance(meta, Mapping) else None
    if not names:
        return {}
    path = meta.get(PATH_KEY) if path is None and meta is not None else path
    if path is None:
        raise ValueError(
            "this checkpoint has its classes in a folder of shards beside it, and it is not known where the file was. "
            "Load it by its path on the local disk, or make one file of both with `alimm merge-shards`"
        )
    if not isinstance(names, Mapping):
        raise ValueError(f"{path}: meta[{SHARDS_KEY!r}] must be a dict, got {type(names).__name__}")
    for module, name in names.items():
        if not isinstance(module, str) or not isinstance(name, str) or Path(name).name != name or name in ("", ".."):
            raise ValueError(f"{path}: a folder of shards must be a name beside the checkpoint, got {name!r}")
    return {module: Path(path).parent / name for module, name in names.items()}


def check_fits(module: Any, folder: Path, index: BlockIndex, title: str) -> None:
    """Refuse blocks of another classifier.

    Raises:
        ValueError: number of classes, width, or order of the rows differ.
    """
    shape, rows = tuple(module.weight.shape[1:]), module.sharding.shards.num_rows
    weight = index.arrays.get("weight")
    if weight is None:
        raise ValueError(f"{folder} holds no 'weight': it is not the folder of a sharded head")
    if index.num_rows != rows:
        raise ValueError(
            f"{folder} holds {index.num_rows} classes and {title} has {rows}: set num_classes={index.num_rows}. For "
            "other classes, take the weights alone with `alimm merge-shards` and copy those that stay"
        )
    if weight.row_shape != shape:
        raise ValueError(f"{folder} has rows of the shape {weight.row_shape} and {title} has {shape}: change its width")
    saved = index.scalars.get("permutation")
    own = dict(kind=module.permutation.kind, seed=module.permutation.seed)
    if saved != own:
        raise ValueError(
            f"{folder} has its rows in the order of the permutation {saved} and {title} has {own}: give the head "
            "that kind and seed, or load the file that `alimm merge-shards` makes, which is in the order of the classes"
        )


def check_shards(model: nn.Module, folders: Mapping[str, Path], full: bool = True) -> None:
    """Check the folders of a checkpoint against a model before anything is copied; every rank must call.

    Args:
        model: with its sharded heads.
        folders: of ``folders_of``.
        full: also compare every digest; the ranks share the reading.

    Raises:
        ValueError: on every rank: a folder is missing, damaged or of another classifier.
    """
    modules = sharded_modules(model)
    if not modules and not folders:
        return
    reason = None
    if missing := [path for path in folders if path not in modules]:
        reason = (
            f"the checkpoint has shards of {', '.join(map(repr, missing))}, the model has sharded heads at "
            f"{', '.join(map(repr, modules)) or 'no place'}. Is it the checkpoint of another config?"
        )
    group = next(iter(modules.values())).sharding.group if modules else None
    device = communication_device(group)
    raise_together(reason, group, device)
    for path, folder in folders.items():
        module = modules[path]
        verify(folder, full, module.sharding.group, device)
        try:
            reason = None
            check_fits(module, folder, read_index(folder), f"the model's {path or 'head'}")
        except ValueError as error:
            reason = str(error)
        raise_together(reason, module.sharding.group, device)


def load_module(module: Any, folder: Path) -> None:
    """Load a sharded head from its folder, which ``check_shards`` has passed; every rank must call.

    The weight's rows are read straight into the parameter.
    """
    index, sharding = read_index(folder), module.sharding
    # What a lazy optimizer still owes belongs to the rows that go.
    flush_rows(module.weight)
    arrays = {"weight": module.weight.detach()}
    for name in sorted(index.arrays):
        if not name.startswith(OPTIMIZER_PREFIX):
            arrays[name] = read_rows(folder, name, sharding.start, sharding.stop, arrays.get(name), index)
    module.load_shard(arrays, dict(index.scalars.get("head", {})))


def load_module_optimizer(module: Any, folder: Path, optimizers: Iterable[torch.optim.Optimizer]) -> None:
    """Load the optimizer's state of a head's rows, after the optimizer has loaded its own state dict."""
    optimizer = optimizer_of(module.weight, optimizers)
    index, sharding = read_index(folder), module.sharding
    names = [name for name in sorted(index.arrays) if name.startswith(OPTIMIZER_PREFIX)]
    if optimizer is None or not names:
        return
    arrays = {}
    for name in names:
        rows = read_rows(folder, name, sharding.start, sharding.stop, index=index)
        arrays[name.removeprefix(OPTIMIZER_PREFIX)] = rows
    load_row_arrays(optimizer, module.weight, arrays)


def load_shards(model: nn.Module, folders: Mapping[str, Path]) -> None:
    """Load all sharded heads of a model from their folders, checked first; every rank must call.

    Raises:
        ValueError: on every rank, see ``check_shards``; the heads are as they were.
    """
    check_shards(model, folders)
    modules = sharded_modules(model)
    for path, folder in folders.items():
        load_module(modules[path], folder)
