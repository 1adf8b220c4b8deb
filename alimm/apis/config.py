"""Configs by path (``configs/x.py``) or by package (``alimm::x.py``, ``mmdet::retinanet/x.py``)."""

from __future__ import annotations

import difflib
import importlib.util
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmengine.config import Config, DictAction
from mmengine.config.utils import ConfigParsingError
from mmengine.logging import print_log

from alimm.extras import require
from alimm.paths import resource_root

SUFFIXES = (".py", ".json", ".yml", ".yaml")
PACKAGES = ("alimm", "mmdet", "mmseg", "mmaction")
"""Packages with configs that a misspelt name may mean."""


def config_root(package: str, why: str) -> Path:
    """The folder with the configs of an installed package.

    Args:
        package: ``alimm``, or a package that ships ``.mim/configs`` as OpenMMLab's do.
        why: what asks, for the message: ``'the config mmdet::x.py'``.

    Raises:
        ImportError: the package is not installed; the message names the extra that brings it.
        ValueError: it is installed and ships no configs, or its name looks like a misspelt one.
    """
    if package == "alimm":
        return resource_root() / "configs"
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None or spec.origin is None:
        if package not in PACKAGES and (near := difflib.get_close_matches(package, PACKAGES, n=1)):
            raise ValueError(f"{why} names the package {package}, which is not installed. Did you mean {near[0]}?")
        require(package, why)
        raise ValueError(f"{why} names the package {package}, which is a folder without code")
    root = Path(spec.origin).parent
    for folder in (root / ".mim" / "configs", root.parent / "configs"):
        if folder.is_dir():
            return folder
    raise ValueError(f"{why} names the package {package}, which ships no configs (looked in {root / '.mim'})")


def find_config(spec: str | os.PathLike[str]) -> Path:
    """The file that a config spec names.

    Args:
        spec: a path, or ``package::path`` relative to the configs of the package. The suffix ``.py`` may be left out.

    Raises:
        FileNotFoundError: there is none. The message lists configs with names like it.
    """
    text = os.fspath(spec)
    package, separator, inner = text.partition("::")
    if separator:
        root = config_root(package, f"the config {text}")
        path, prefix = root / inner, f"{package}::"
    else:
        path = Path(text).expanduser()
        root, prefix = next((folder for folder in path.parents if folder.is_dir()), Path()), ""
    if not path.name:
        raise FileNotFoundError(f"{text!r} names no config file: give a path or package::path")
    for candidate in (path, path.with_name(path.name + ".py")):
        if candidate.is_file():
            return candidate
    near = _near_configs(path, root, prefix, deep=bool(separator))
    hint = f" Near names: {', '.join(near)}" if near else f" {root.resolve()} holds no config with a name like it."
    raise FileNotFoundError(f"there is no config {text}.{hint}")


def _near_configs(path: Path, root: Path, prefix: str, deep: bool) -> list[str]:
    pattern = "**/*" if deep else "*"
    names = {
        str(file.relative_to(root)): file.stem
        for file in root.glob(pattern)
        if file.suffix in SUFFIXES and "_base_" not in file.parts
    }
    scored = ((difflib.SequenceMatcher(None, path.stem, stem).ratio(), name) for name, stem in names.items())
    best = sorted((pair for pair in scored if pair[0] >= 0.6), key=lambda pair: (-pair[0], pair[1]))[:5]
    return [prefix + name if prefix else str(root / name) for _, name in best]


def load_config(spec: str | os.PathLike[str] | Config, cfg_options: dict[str, Any] | None = None) -> Config:
    """Load a config of either style.

    Args:
        spec: a path, ``package::path`` or a Config, which is copied.
        cfg_options: changes by dotted key, ``{'model.head.num_classes': 10, 'train_pipeline.0.type': 'X'}``.

    Raises:
        FileNotFoundError: no such config. The message lists near names.
        ImportError: the package of ``package::path``, or something that the config imports, is not installed.
        ValueError: the config is not valid, or an option names a place that it has not.
    """
    if isinstance(spec, Config):
        config = spec.copy()
    else:
        path = find_config(spec)
        try:
            config = Config.fromfile(path)
        except (ConfigParsingError, SyntaxError) as error:
            raise ValueError(f"{path} is not a valid config: {error}") from error
    merge_options(config, cfg_options)
    return config


def merge_options(config: Config, options: dict[str, Any] | None) -> None:
    """Change a config in place by dotted keys.

    A key that the config has not is added, as OpenMMLab does; where that looks like a slip, a warning says so.

    Raises:
        ValueError: an option goes through something that has no such part.
    """
    for key, value in (options or {}).items():
        _merge_option(config, key, value)


def _merge_option(config: Config, key: str, value: Any) -> None:
    first = key.partition(".")[0]
    if first not in config and (near := difflib.get_close_matches(first, list(config), n=1, cutoff=0.75)):
        print_log(
            f"--cfg-options {key}: the config has no {first!r}, so it is added and may do nothing. Did you mean "
            f"{near[0]!r}?",
            logger="current",
            level=logging.WARNING,
        )
    try:
        config.merge_from_dict({key: value})
    except (KeyError, TypeError, IndexError) as error:
        raise ValueError(f"the config has no place for --cfg-options {key}={value!r}: {error}") from error


def parse_options(words: Sequence[str]) -> dict[str, Any]:
    """Turn ``['a.b=1', 'c=[x,2]']`` of the command line into ``{'a.b': 1, 'c': ['x', 2]}``.

    Raises:
        ValueError: a word is not ``KEY=VALUE``.
    """
    options = {}
    for word in words:
        key, separator, value = word.partition("=")
        if not separator or not key:
            raise ValueError(f"--cfg-options takes KEY=VALUE, got {word!r}")
        options[key] = DictAction._parse_iterable(value)
    return options
