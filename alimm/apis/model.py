"""Models by name or by config: ``list_models``, ``get_model``, ``init_model``."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.registry import DefaultScope
from mmengine.runner.checkpoint import load_state_dict
from torch import nn

from alimm import compat
from alimm.apis.config import load_config
from alimm.apis.devices import resolve_device
from alimm.apis.errors import explain_build_errors
from alimm.apis.sharded import check_shards, folders_of, load_module, sharded_modules
from alimm.distributed.collectives import rank_and_size
from alimm.heads.sharded_state import shards_left_out
from alimm.registry import DATASETS, MODELS, load_plugins
from alimm.zoo.download import SCHEME, download, fetch, load_weights
from alimm.zoo.index import config_of, get_entry, list_models

__all__ = ["get_model", "init_model", "list_models"]


def init_model(
    config: str | Path | Config,
    checkpoint: str | Path | None = None,
    device: str | torch.device = "cpu",
    cfg_options: dict[str, Any] | None = None,
    *,
    trust: bool = False,
) -> nn.Module:
    """Build the model of a config, in evaluation mode, with weights if a checkpoint is given.

    The model gets two attributes: ``cfg``, the config, and ``dataset_meta``, a dict with ``classes`` where the
    checkpoint or the test data set of the config knows them. Nothing is downloaded but an ``alimm://`` checkpoint.

    Args:
        config: a path, ``package::path``, a Config, or the name of a model of the zoo.
        checkpoint: a file, ``alimm://NAME``, or None for the weights that the constructor draws.
        device: where the model goes.
        cfg_options: changes to the config, ``{'model.head.num_classes': 10}``.
        trust: read a checkpoint that holds other objects than weights and MMEngine's logs. Runs code of the file.

    Raises:
        FileNotFoundError: no such config; the message lists near names.
        ValueError: no such model of the zoo, checkpoint, device or type, or weights that fit the model nowhere; the
            message says how to mend it.
    """
    device = resolve_device(str(device))
    cfg = load_config(config if isinstance(config, Config) else config_of(config), cfg_options)
    if cfg.get("model") is None:
        raise ValueError(f"{_title(cfg, config)} has no 'model'; init_model needs a config that describes one")
    model = _build(cfg)
    model.cfg = cfg
    # torch declares that a module's attributes are tensors or modules; OpenMMLab sets this one all the same.
    model.dataset_meta = _dataset_meta(cfg)  # type: ignore[assignment]
    if checkpoint is not None:
        meta = _load(model, checkpoint, trust)
        if meta:
            model.dataset_meta = meta  # type: ignore[assignment]
    return model.to(device).eval()


def get_model(
    name: str,
    pretrained: bool | str | Path = False,
    device: str | torch.device = "cpu",
    cfg_options: dict[str, Any] | None = None,
) -> nn.Module:
    """Build a model of the zoo.

    Args:
        name: as :func:`list_models` gives it.
        pretrained: True for the zoo's checkpoint (downloaded once, verified), or a file that must be that checkpoint.
        device: where the model goes.
        cfg_options: as in :func:`init_model`.

    Raises:
        ValueError: no such model (the message lists near matches), or no checkpoint of it.
        DownloadError: the checkpoint cannot be had.
    """
    entry = get_entry(name)
    checkpoint = None
    if pretrained:
        checkpoint = fetch(entry, explicit=None if pretrained is True else Path(pretrained))
    return init_model(entry.config_path, checkpoint, device, cfg_options)


def _title(cfg: Config, config: str | Path | Config) -> str:
    return str(cfg.filename or "the config") if isinstance(config, Config) else str(config)


def _build(cfg: Config) -> nn.Module:
    compat.apply_to_imports()
    load_plugins()
    with explain_build_errors(cfg), DefaultScope.overwrite_default_scope(cfg.get("default_scope") or "alimm"):
        model: nn.Module = MODELS.build(cfg.model)
    return model


def _dataset_meta(cfg: Config) -> dict[str, Any]:
    dataset = (cfg.get("test_dataloader") or {}).get("dataset") or {}
    while "metainfo" not in dataset and "dataset" in dataset:
        dataset = dataset["dataset"]
    meta = dict(dataset.get("metainfo") or {})
    if "classes" not in meta:
        kind = dataset.get("type")
        if isinstance(kind, str):
            with DefaultScope.overwrite_default_scope(cfg.get("default_scope") or "alimm"):
                kind = DATASETS.get(kind)
        meta = {**getattr(kind, "METAINFO", {}), **meta}
    return meta


def _load(model: nn.Module, checkpoint: str | Path, trust: bool) -> dict[str, Any]:
    """Load the weights and return the data set's meta information of the checkpoint, empty where it has none."""
    if str(checkpoint).startswith(SCHEME):
        path = download(str(checkpoint))
    else:
        path = Path(checkpoint).expanduser()
        if not path.is_file():
            raise ValueError(
                f"the checkpoint {path} does not exist; give a file, or {SCHEME}NAME for one of the zoo "
                "(`alimm list` shows the names)"
            )
    content = load_weights(path, trust=trust)
    state = content.get("state_dict", content)
    state = {key.removeprefix("module."): value for key, value in state.items()}
    # Of several ranks none has the whole weight of a sharded head; the head itself takes its rows of the file's.
    with shards_left_out() if rank_and_size()[1] > 1 else nullcontext():
        own = model.state_dict()
    if not any(key in own and own[key].shape == getattr(value, "shape", None) for key, value in state.items()):
        raise ValueError(
            f"{path} does not fit the model: none of its {len(state)} weights has the name and shape of one of the "
            f"model's {len(own)}, such as {next(iter(own), None)!r}. Is it the checkpoint of another config?"
        )
    folders = folders_of(content, path)
    check_shards(model, folders)
    load_state_dict(model, state, strict=False)
    for name, folder in folders.items():
        load_module(sharded_modules(model)[name], folder)
    meta = content.get("meta") or {}
    return dict(meta.get("dataset_meta") or {})
