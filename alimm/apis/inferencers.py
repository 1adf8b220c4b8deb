"""From pictures to labels or embeddings in one call.

MMEngine's ``BaseInferencer`` is not the base here: it takes no generator, returns one dict with everything in it, and
finds models only in packages that it knows by name, so nearly every method would have to be replaced.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from mmengine.config import Config
from mmengine.dataset import Compose, pseudo_collate
from mmengine.registry import DefaultScope
from numpy.typing import NDArray
from torch import nn

from alimm.apis.model import get_model, init_model
from alimm.registry import TRANSFORMS
from alimm.zoo.index import is_model_name

Picture: TypeAlias = str | Path | NDArray[np.uint8]
Inputs: TypeAlias = Picture | Iterable[Picture]

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif"})
"""What counts as a picture when a folder is given."""


class _Inferencer:
    """Loading, preprocessing and batching; a subclass says what is made of a batch."""

    def __init__(
        self,
        model: nn.Module | Config | str | Path,
        weights: str | Path | None = None,
        device: str | torch.device = "cpu",
        *,
        trust: bool = False,
    ) -> None:
        if not isinstance(model, nn.Module):
            if weights is None and isinstance(model, str) and is_model_name(model):
                model = get_model(model, pretrained=True, device=device)
            else:
                model = init_model(model, weights, device, trust=trust)
        elif weights is not None:
            raise ValueError("weights go with a config or a model's name; a model that is built has its own")
        self.model = model.to(device).eval()
        self._load, self._transform = _pipeline(model)
        # A model that swaps the channels by itself has a pipeline that loads BGR, as mmcv's does.
        self._bgr = bool(getattr(getattr(model, "data_preprocessor", None), "to_rgb", False))

    def _batches(self, inputs: Inputs, batch_size: int) -> Iterator[dict[str, Any]]:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        pictures = iter(_track(_each_picture(inputs)))
        while batch := [self._prepare(picture) for picture in islice(pictures, batch_size)]:
            yield pseudo_collate(batch)

    def _prepare(self, picture: Picture) -> Any:
        item = self._read(picture)
        prepared = self._transform(item)
        if prepared is None:
            raise ValueError(f"the test pipeline returned nothing for {item.get('img_path', 'an array')}")
        return prepared

    def _read(self, picture: Picture) -> dict[str, Any]:
        if isinstance(picture, np.ndarray):
            if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3 or 0 in picture.shape:
                raise ValueError(
                    "a picture as an array must be RGB, uint8, shape (height, width, 3), "
                    f"got {picture.dtype} {picture.shape}"
                )
            image = self._flip(picture)
            return {"img": image, "img_shape": image.shape[:2], "ori_shape": image.shape[:2]}
        path = Path(picture)
        if not path.is_file():
            raise ValueError(f"the picture {path} does not exist")
        try:
            item: dict[str, Any] | None = self._load({"img_path": str(path)})
        except Exception as error:
            raise ValueError(f"cannot read the picture {path}: {error}") from error
        if item is None or item.get("img") is None:
            raise ValueError(f"cannot read the picture {path}: no decoder takes it")
        return item

    def _rgb(self, picture: Picture) -> NDArray[np.uint8]:
        return self._flip(self._read(picture)["img"])

    def _flip(self, image: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """From RGB to the order of the pipeline, and back."""
        return np.ascontiguousarray(image[..., ::-1]) if self._bgr else image


class ImageClassificationInferencer(_Inferencer):
    """Classify pictures.

    Args:
        model: a model, a config (path, ``package::path`` or Config), or a name of the zoo, which brings its weights.
        weights: a checkpoint, as in :func:`alimm.init_model`.
        device: where to compute.
        trust: as in :func:`alimm.init_model`.
    """

    def __call__(self, inputs: Inputs, batch_size: int = 32, top_k: int = 5) -> list[dict[str, Any]]:
        """Classify.

        Args:
            inputs: a path, a folder (its pictures, sorted by name), an RGB uint8 array of shape (height, width, 3), or
                a list or generator of those.
            batch_size: pictures in one forward pass.
            top_k: how many classes to name, best first.

        Returns:
            One dict a picture, in order: ``label`` (int), ``class_name`` (str), ``score`` (float), and ``top_k``, a
            list of such dicts.

        Raises:
            ValueError: something is no picture; the message names the file.
        """
        if top_k < 1:
            raise ValueError(f"top_k must be at least 1, got {top_k}")
        results = []
        for batch in self._batches(inputs, batch_size):
            with torch.inference_mode():
                samples = self.model.test_step(batch)  # type: ignore[operator]
            if any("pred_score" not in sample for sample in samples):
                raise ValueError("the model gives no scores: it has no head. EmbeddingInferencer takes such a model")
            results += [self._result(sample.pred_score, top_k) for sample in samples]
        return results

    def visualize(
        self, inputs: Inputs, out_dir: str | Path | None = None, batch_size: int = 32
    ) -> list[NDArray[np.uint8]]:
        """Draw the best class and its score under each picture.

        Args:
            inputs: as in the call.
            out_dir: also write the drawings there as PNG, under the pictures' names (arrays: their position).
            batch_size: pictures in one forward pass.

        Returns:
            RGB uint8 arrays of shape (height, width, 3), at least 224 pixels wide.
        """
        pictures = list(_each_picture(inputs))
        captions = [f"{result['class_name']} {result['score']:.2f}" for result in self(pictures, batch_size)]
        drawn = [
            _with_caption(self._rgb(picture), caption) for picture, caption in zip(pictures, captions, strict=True)
        ]
        _save(pictures, drawn, out_dir)
        return drawn

    def _result(self, scores: torch.Tensor, top_k: int) -> dict[str, Any]:
        classes = (getattr(self.model, "dataset_meta", None) or {}).get("classes") or ()
        values, labels = scores.float().cpu().topk(min(top_k, len(scores)))
        best = [
            {"label": label, "class_name": classes[label] if label < len(classes) else str(label), "score": value}
            for value, label in zip(values.tolist(), labels.tolist(), strict=True)
        ]
        return {**best[0], "top_k": best}


class EmbeddingInferencer(_Inferencer):
    """Embed pictures.

    Args:
        model: a model, a config (path, ``package::path`` or Config), or a name of the zoo, which brings its weights.
        weights: a checkpoint, as in :func:`alimm.init_model`.
        device: where to compute.
        trust: as in :func:`alimm.init_model`.
    """

    def __call__(self, inputs: Inputs, batch_size: int = 32) -> NDArray[np.float32]:
        """Embed.

        Args:
            inputs: a path, a folder (its pictures, sorted by name), an RGB uint8 array of shape (height, width, 3), or
                a list or generator of those.
            batch_size: pictures in one forward pass.

        Returns:
            Shape (number of pictures, dim), in order; (0, 0) for an empty list.

        Raises:
            ValueError: something is no picture (the message names the file), or the model cannot embed.
        """
        if not hasattr(self.model, "embed"):
            raise ValueError(f"{type(self.model).__name__} has no method embed; alimm.ImageClassifier has one")
        rows = []
        for batch in self._batches(inputs, batch_size):
            with torch.inference_mode():
                data = self.model.data_preprocessor(batch, False)  # type: ignore[operator]
                rows.append(self.model.embed(data["inputs"]).float().cpu().numpy())  # type: ignore[operator]
        return np.concatenate(rows) if rows else np.zeros((0, 0), np.float32)

    def visualize(
        self, inputs: Inputs, out_dir: str | Path | None = None, batch_size: int = 32, neighbours: int = 5
    ) -> list[NDArray[np.uint8]]:
        """Put beside each picture the others that lie nearest to it, with their cosine similarity.

        Args:
            inputs: as in the call.
            out_dir: also write the strips there as PNG, under the pictures' names (arrays: their position).
            batch_size: pictures in one forward pass.
            neighbours: how many others to show.

        Returns:
            One RGB uint8 strip a picture, the picture itself at the left.
        """
        pictures = list(_each_picture(inputs))
        features = self(pictures, batch_size)
        features = features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
        similarity = features @ features.T
        np.fill_diagonal(similarity, -np.inf)
        strips = []
        for row, picture in enumerate(pictures):
            nearest = np.argsort(-similarity[row], kind="stable")[: min(neighbours, len(pictures) - 1)]
            tiles = [_with_caption(self._rgb(picture), "query", square=True)]
            tiles += [
                _with_caption(self._rgb(pictures[other]), f"{similarity[row, other]:.3f}", square=True)
                for other in nearest
            ]
            strips.append(np.concatenate(tiles, axis=1))
        _save(pictures, strips, out_dir)
        return strips


def _pipeline(model: nn.Module) -> tuple[Any, Compose]:
    """Split the test pipeline of the model's config into what loads a file and the rest."""
    cfg = getattr(model, "cfg", None) or {}
    dataset = (cfg.get("test_dataloader") or {}).get("dataset") or {}
    while "pipeline" not in dataset and "dataset" in dataset:
        dataset = dataset["dataset"]
    if "pipeline" not in dataset:
        raise ValueError(
            "the model's config has no test_dataloader.dataset.pipeline, which says how a picture is prepared; build "
            "the model with init_model from a config that has one"
        )
    with DefaultScope.overwrite_default_scope(cfg.get("default_scope") or "alimm"):
        transforms = [TRANSFORMS.build(step) if isinstance(step, dict) else step for step in dataset["pipeline"]]
    loader: Any = None
    if transforms and type(transforms[0]).__name__.startswith("LoadImage"):
        loader = transforms.pop(0)
    return loader or TRANSFORMS.build({"type": "alimm.LoadImage"}), Compose(transforms)


def _each_picture(inputs: Inputs) -> Iterator[Picture]:
    if isinstance(inputs, np.ndarray):
        yield inputs
    elif isinstance(inputs, str | Path):
        if not Path(inputs).is_dir():
            yield inputs
            return
        found = sorted(path for path in Path(inputs).iterdir() if path.suffix.lower() in SUFFIXES)
        if not found:
            raise ValueError(f"the folder {inputs} holds no picture ({', '.join(sorted(SUFFIXES))})")
        yield from found
    elif not isinstance(inputs, Iterable):
        raise ValueError(f"a picture is a path or an RGB array, got {type(inputs).__name__}")
    else:
        for item in inputs:
            yield from _each_picture(item)


def _track(pictures: Iterator[Picture]) -> Iterable[Picture]:
    if not sys.stderr.isatty():
        return pictures
    from rich.console import Console
    from rich.progress import track

    return track(pictures, description="Pictures", console=Console(stderr=True), transient=True)


def _with_caption(image: NDArray[np.uint8], caption: str, square: bool = False) -> NDArray[np.uint8]:
    """The picture, enlarged to 224 pixels of width if smaller, over a white band with the caption."""
    from PIL import Image, ImageDraw, ImageFont

    height, width = image.shape[:2]
    factor = 224 / max(height, width) if square else max(1.0, 224 / width)
    size = max(1, round(width * factor)), max(1, round(height * factor))
    picture = Image.fromarray(image).resize(size, Image.Resampling.BILINEAR)
    band = 28
    canvas = Image.new("RGB", (224, 224 + band) if square else (size[0], size[1] + band), "white")
    canvas.paste(picture, ((canvas.width - size[0]) // 2, 0))
    font = ImageFont.load_default(16)
    ImageDraw.Draw(canvas).text((6, canvas.height - band + 4), caption, fill="black", font=font)
    return np.asarray(canvas)


def _save(pictures: list[Picture], drawn: list[NDArray[np.uint8]], out_dir: str | Path | None) -> None:
    if out_dir is None:
        return
    from PIL import Image

    folder = Path(out_dir)
    folder.mkdir(parents=True, exist_ok=True)
    taken: set[str] = set()
    for position, (picture, image) in enumerate(zip(pictures, drawn, strict=True)):
        stem = f"{position:06d}" if isinstance(picture, np.ndarray) else Path(picture).stem
        # Pictures of two folders may share a name; neither drawing may replace the other.
        name = f"{stem}_{position:06d}" if stem in taken else stem
        taken.add(name)
        Image.fromarray(image).save(folder / f"{name}.png")
