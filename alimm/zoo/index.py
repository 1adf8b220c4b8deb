"""The model index: ``model-index.yml`` imports one ``metafile.yml`` per project, each lists its models.

The keys are OpenMMLab's (``Collections``, ``Models``, ``Name``, ``In Collection``, ``Config``, ``Weights``,
``Results``), so MIM and MMEngine's inferencers read the same files; ``Weights SHA256`` and ``Weights Size`` are ours.
``License``, ``Training Data`` and ``Command`` may stand in a model, in its ``Metadata``, or in its collection::

    Collections:
      - Name: Example
        README: projects/example/README.md
        License: Apache-2.0
    Models:
      - Name: example_r18
        In Collection: Example
        Config: configs/example/example_r18.py
        Weights: [projects/example/checkpoints/example_r18_20260101-0a1b2c3d.pth]
        Weights SHA256: 0a1b2c3d...   # all 64 digits
        Weights Size: 123456
        Training Data: EmojiProducts
        Command: python tools/train.py configs/example/example_r18.py --seed 0
        Results:
          - Task: Image Classification
            Dataset: EmojiProducts (style)
            Metrics: {top1: 52.5}
            Device: 2 CPU cores
            Date: 2026-01-01
            Seed: 0

Only PyYAML is needed here: ``alimm list`` has to answer at once.
"""

from __future__ import annotations

import difflib
import fnmatch
import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from alimm.paths import resource_root

WEIGHTS_NAME = re.compile(r"-(?P<digits>[0-9a-f]{8})\.pth$")
"""How a weights file is named: ``<stem>-<first eight hex digits of its sha256>.pth``."""


@dataclass(frozen=True)
class Result:
    """Figures of one model on one task, as measured."""

    task: str
    dataset: str
    metrics: dict[str, float]
    device: str
    date: str
    seed: int | None


@dataclass(frozen=True)
class ModelEntry:
    """One model of the zoo. Paths are relative to the resource root; what the metafile leaves out is empty."""

    name: str
    collection: str
    config: str
    readme: str
    weights: tuple[str, ...]
    sha256: str
    size: int | None
    license: str
    training_data: str
    command: str
    results: tuple[Result, ...]
    metafile: str
    root: Path

    @property
    def weights_name(self) -> str:
        """The file name of the checkpoint, empty where the model has none."""
        return self.weights[0].rsplit("/", 1)[-1] if self.weights else ""

    @property
    def config_path(self) -> Path:
        """Where the config lies on this machine."""
        return self.root / self.config


def is_url(location: str) -> bool:
    """Whether a weights entry has a scheme; one without is a path relative to the resource root."""
    return "://" in location


def sha256_of(path: Path) -> str:
    """The sha256 of a file, 64 hex digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def load_index(root: Path | None = None) -> dict[str, ModelEntry]:
    """Read ``model-index.yml`` and the metafiles it imports.

    Args:
        root: the folder of ``model-index.yml``; the resource root of alimm if None.

    Returns:
        name -> entry, in the order of the files.

    Raises:
        ValueError: a file is missing or malformed, a model lacks ``Name`` or ``Config``, or a name comes twice.
    """
    root = resource_root() if root is None else root
    index_file = root / "model-index.yml"
    imports = _read(index_file).get("Import")
    if not isinstance(imports, list):
        raise ValueError(f"{index_file}: expected a list of metafiles under 'Import', got {imports!r}")
    entries: dict[str, ModelEntry] = {}
    for relative in imports:
        for entry in _read_metafile(root, str(relative)):
            if entry.name in entries:
                raise ValueError(
                    f"{root / str(relative)}: the model {entry.name!r} is in {entries[entry.name].metafile} already; "
                    "rename one of the two"
                )
            entries[entry.name] = entry
    return entries


def list_models(pattern: str = "*", pretrained: bool = False, root: Path | None = None) -> list[str]:
    """Names of the models that match, sorted.

    Args:
        pattern: a shell glob (``'*resnet*'``) or a full name.
        pretrained: only models that have a checkpoint.
        root: as in :func:`load_index`.

    Raises:
        ValueError: the pattern is a plain name and no model has it; the message lists near matches.
    """
    entries = load_index(root)
    if pattern not in entries and not re.search(r"[*?\[]", pattern):
        raise _unknown(pattern, entries)
    return sorted(
        name
        for name, entry in entries.items()
        if (name == pattern or fnmatch.fnmatchcase(name, pattern)) and (entry.weights or not pretrained)
    )


def get_entry(name: str, root: Path | None = None) -> ModelEntry:
    """The entry of one model.

    Raises:
        ValueError: no model has this name; the message lists near matches.
    """
    entries = load_index(root)
    if name not in entries:
        raise _unknown(name, entries)
    return entries[name]


def is_model_name(spec: str | Path) -> bool:
    """Whether ``spec`` can only be a name of the zoo: no path, no ``package::path``, no file of that name."""
    text = str(spec)
    return not any(mark in text for mark in ("/", "\\", "::")) and not Path(text).suffix and not Path(text).exists()


def config_of(spec: str | Path) -> str | Path:
    """The config of the model that ``spec`` names; ``spec`` itself where it is a path or ``package::path``.

    Raises:
        ValueError: ``spec`` is no path and no model has this name; the message lists near matches.
    """
    return get_entry(str(spec)).config_path if is_model_name(spec) else spec


def validate_index(root: Path | None = None) -> list[str]:
    """Look for what a user would stumble over: missing files, wrong digests, figures without a device.

    Args:
        root: as in :func:`load_index`.

    Returns:
        One sentence a fault, empty when all is well.

    Raises:
        ValueError: the index cannot be read at all, as in :func:`load_index`.
    """
    root = resource_root() if root is None else root
    imported = {str(relative) for relative in _read(root / "model-index.yml").get("Import") or []}
    present = {
        path.relative_to(root).as_posix()
        for folder in ("projects", "configs")
        for path in (root / folder).rglob("metafile.yml")
    }
    problems = [f"{path}: not imported by model-index.yml" for path in sorted(present - imported)]
    for entry in load_index(root).values():
        problems += [f"{entry.metafile}: {entry.name}: {fault}" for fault in _faults(entry)]
    return problems


def _faults(entry: ModelEntry) -> Iterable[str]:
    if not entry.config_path.is_file():
        yield f"the config {entry.config} does not exist"
    if Path(entry.config).stem != entry.name:
        yield f"the name differs from the stem of its config, {Path(entry.config).stem}"
    if not entry.readme:
        yield "its collection is not declared, or has no README"
    elif not (entry.root / entry.readme).is_file():
        yield f"the README {entry.readme} does not exist"
    for result in entry.results:
        if not result.metrics or not (result.device and result.date) or result.seed is None:
            yield f"the result on {result.dataset!r} needs Metrics, Device, Date and Seed"
    if not entry.weights:
        return
    for key, value in (
        ("Weights Size", entry.size),
        ("License", entry.license),
        ("Training Data", entry.training_data),
        ("Command", entry.command),
        ("Results", entry.results),
    ):
        if not value:
            yield f"has weights but no {key}"
    if not re.fullmatch(r"[0-9a-f]{64}", entry.sha256):
        yield f"Weights SHA256 must be 64 lower-case hex digits, got {entry.sha256!r}"
    for location in entry.weights:
        match = WEIGHTS_NAME.search(location)
        if match is None:
            yield f"the weights name {location} does not end in -<eight hex digits>.pth"
        elif not entry.sha256.startswith(match["digits"]):
            yield f"the digits in {location} are not the first eight of Weights SHA256 {entry.sha256[:8]}"
        if location.rsplit("/", 1)[-1] != entry.weights_name:
            yield f"every mirror must carry the file name {entry.weights_name}, got {location}"
        if not is_url(location):
            yield from _local_faults(entry, location)


def _local_faults(entry: ModelEntry, location: str) -> Iterable[str]:
    path = entry.root / location
    if not path.is_file():
        yield f"the weights {location} do not exist"
        return
    if (size := path.stat().st_size) != entry.size:
        yield f"{location} has {size} bytes, Weights Size says {entry.size}"
    if (digest := sha256_of(path)) != entry.sha256:
        yield f"{location} has the sha256 {digest}, Weights SHA256 says {entry.sha256}"


def _unknown(name: str, names: Iterable[str]) -> ValueError:
    names = sorted(names)
    lowered = {candidate.lower(): candidate for candidate in names}
    near = [lowered[match] for match in difflib.get_close_matches(name.lower(), lowered, n=5, cutoff=0.5)]
    near += [candidate for candidate in names if name.lower() in candidate.lower() and candidate not in near]
    if near:
        hint = f"Did you mean {', '.join(near[:5])}?"
    else:
        hint = "`alimm list` shows all names." if names else "The index lists no model."
    return ValueError(f"there is no model named {name!r} in the zoo. {hint}")


def _read(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"the model index needs {path}, which does not exist") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a mapping at the top, got {type(content).__name__}")
    return content


def _read_metafile(root: Path, relative: str) -> Iterable[ModelEntry]:
    path = root / relative
    content = _read(path)
    collections = {item.get("Name"): item for item in _mappings(path, content, "Collections")}
    for model in _mappings(path, content, "Models"):
        missing = [key for key in ("Name", "Config") if not model.get(key)]
        if missing:
            raise ValueError(f"{path}: a model lacks {' and '.join(missing)}: {model}")
        collection = collections.get(model.get("In Collection"), {})
        yield _entry(root, relative, model, collection)


def _mappings(path: Path, content: Mapping[str, Any], key: str) -> list[dict[str, Any]]:
    items = content.get(key) or []
    if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
        raise ValueError(f"{path}: expected a list of mappings under {key!r}, got {items!r}")
    return items


def _entry(root: Path, relative: str, model: dict[str, Any], collection: dict[str, Any]) -> ModelEntry:
    layers = [model, model.get("Metadata") or {}, collection, collection.get("Metadata") or {}]

    def text(key: str) -> str:
        value = next((layer[key] for layer in layers if layer.get(key)), "")
        return ", ".join(map(str, value)) if isinstance(value, list) else str(value)

    weights = model.get("Weights") or []
    weights = [weights] if isinstance(weights, str) else weights
    size = model.get("Weights Size")
    if size is not None and not isinstance(size, int):
        raise ValueError(f"{root / relative}: {model['Name']}: Weights Size must be a number of bytes, got {size!r}")
    return ModelEntry(
        name=str(model["Name"]),
        collection=str(model.get("In Collection", "")),
        config=str(model["Config"]),
        readme=text("README"),
        weights=tuple(str(location) for location in weights),
        sha256=str(model.get("Weights SHA256", "")),
        size=size,
        license=text("License"),
        training_data=text("Training Data"),
        command=text("Command"),
        results=tuple(_result(item) for item in _mappings(root / relative, model, "Results")),
        metafile=relative,
        root=root,
    )


def _result(item: dict[str, Any]) -> Result:
    metrics = item.get("Metrics") or {}
    seed = item.get("Seed")
    return Result(
        task=str(item.get("Task", "")),
        dataset=str(item.get("Dataset", "")),
        metrics={str(key): float(value) for key, value in metrics.items()},
        device=str(item.get("Device", "")),
        date=str(item.get("Date", "")),
        seed=None if seed is None else int(seed),
    )
