"""Which classes a model takes for which: a picture of the matrix, and a list for any number of classes."""

from __future__ import annotations

import argparse
import io
import json
import pickle
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from alimm.evaluation.confusion import Confusion, confusion_matrix, top_confusions

PREDICTION_SUFFIXES = (".npz", ".json", ".pkl", ".pickle")
PICTURE_LIMIT = 1000
"""More classes than pixels make no picture."""
NAME_LIMIT = 130
"""Up to so many classes their names are on the axes, and readable."""
VALUE_LIMIT = 60


class _PlainUnpickler(pickle.Unpickler):
    """Reads tensors, arrays and containers, and refuses whatever else a pickle can name: it could run any code."""

    def __init__(self, file: io.BufferedReader, path: Path) -> None:
        super().__init__(file)
        self.path = path

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch.storage", "_load_from_bytes"):
            return _load_storage
        plain = module == "torch" and name.endswith("Storage")
        plain |= (module, name) in {
            ("collections", "OrderedDict"),
            ("torch._utils", "_rebuild_tensor_v2"),
            ("_codecs", "encode"),
            ("numpy", "dtype"),
            ("numpy", "ndarray"),
            *((f"numpy.{core}.multiarray", part) for core in ("core", "_core") for part in ("_reconstruct", "scalar")),
        }
        if not plain:
            raise ValueError(
                f"{self.path} holds a {module}.{name}, which could run code when it is read. If you trust the file, "
                "read it with --trust; better, write the predictions as .npz"
            )
        return super().find_class(module, name)


def _load_storage(data: bytes) -> Any:
    import torch

    return torch.load(io.BytesIO(data), weights_only=True)


def read_predictions(path: Path, trust: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Read what ``alimm test --out FILE`` wrote: ``gt_label``, and ``pred_label`` or ``pred_score``, of each sample.

    Args:
        path: ``.npz`` (arrays), ``.json`` or ``.pkl`` (a list of dicts).
        trust: read a pickle with everything it names. That can run any code; without it only tensors, arrays and plain
            containers are read.

    Returns:
        True and predicted classes, int64 (N,).

    Raises:
        ValueError: the file is missing, damaged, of another kind, or lacks a field. The message names it.
    """
    try:
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as arrays:
                columns: Mapping[str, Any] = {
                    key: arrays[key] for key in ("gt_label", "pred_label", "pred_score") if key in arrays
                }
        elif path.suffix == ".json":
            columns = _columns(json.loads(path.read_text(encoding="utf-8")))
        else:
            with path.open("rb") as file:
                columns = _columns(pickle.load(file) if trust else _PlainUnpickler(file, path).load())
        if "gt_label" not in columns or not {"pred_label", "pred_score"} & set(columns):
            raise ValueError(f"expected gt_label and pred_label or pred_score, found {sorted(columns) or 'neither'}")
        labels = np.asarray(columns["gt_label"])
        if "pred_label" in columns:
            predictions = np.asarray(columns["pred_label"])
        else:
            predictions = np.asarray(columns["pred_score"]).argmax(axis=-1)
        labels, predictions = _flat("gt_label", labels), _flat("pred_label", predictions)
        if len(labels) != len(predictions) or len(labels) == 0:
            raise ValueError(f"expected one prediction a label, got {len(predictions)} for {len(labels)}")
        return labels, predictions
    except Exception as error:  # a damaged pickle or archive can fail with nearly anything
        text = str(error)
        raise ValueError(text if str(path) in text else f"{path} cannot be read as predictions: {error!r}") from error


def _columns(samples: Any) -> dict[str, Any]:
    if not isinstance(samples, list) or not samples or not all(isinstance(sample, dict) for sample in samples):
        raise ValueError("expected a list of dicts, one a sample")
    keys = [key for key in ("gt_label", "pred_label", "pred_score") if all(key in sample for sample in samples)]
    # A sample keeps its label as a tensor of one element, its scores as a tensor of one dimension.
    return {key: np.stack([np.asarray(sample[key]) for sample in samples]) for key in keys}


def _flat(name: str, values: np.ndarray) -> np.ndarray:
    if values.ndim == 2 and values.shape[1] == 1:
        values = values[:, 0]
    if values.ndim != 1 or values.dtype.kind not in "iu":
        raise ValueError(f"expected one whole number a sample in {name}, got {values.dtype} of shape {values.shape}")
    return values.astype(np.int64)


def class_names(config: Any) -> list[str] | None:
    """The classes of a config's test set, from its ``metainfo``, its type, or the set itself; None if it has none."""
    from mmengine.dataset import BaseDataset
    from mmengine.registry import DefaultScope

    from alimm.registry import DATASETS

    dataset = (config.get("test_dataloader") or {}).get("dataset") or {}
    while "dataset" in dataset and "classes" not in (dataset.get("metainfo") or {}):
        dataset = dataset["dataset"]
    classes = (dataset.get("metainfo") or {}).get("classes")
    kind = dataset.get("type")
    if classes is None and kind is not None:
        with DefaultScope.overwrite_default_scope(config.get("default_scope") or "alimm"):
            kind = DATASETS.get(kind) if isinstance(kind, str) else kind
            classes = getattr(kind, "METAINFO", {}).get("classes")
            if classes is None and isinstance(kind, type) and issubclass(kind, BaseDataset):
                built = DATASETS.build({**dataset, "pipeline": [], "lazy_init": True})
                classes = built.metainfo.get("classes")
    return None if classes is None else [str(name) for name in classes]


def draw(matrix_CC: np.ndarray, names: Sequence[str], out: Path, include_values: bool = False, title: str = "") -> None:
    """Draw a confusion matrix. The colour is the root of the share of the row: rare classes and rare mistakes show.

    Args:
        matrix_CC: counts, row = true class.
        names: of the classes.
        out: the picture; its suffix chooses the format.
        include_values: write each count that is not 0 into its cell.
        title: above the picture.
    """
    from matplotlib.colors import PowerNorm
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    count = len(matrix_CC)
    share = matrix_CC / np.maximum(matrix_CC.sum(axis=1, keepdims=True), 1)
    named = count <= NAME_LIMIT
    cell = 0.32 if include_values else 0.17 if named else 1000 / 150 / count
    side = max(3.0, cell * count)
    longest = max(map(len, names)) if named else 0
    margin = 0.9 + 0.07 * longest
    figure = Figure(figsize=(side + margin + 0.9, side + margin), layout="constrained")
    panel = figure.subplots()
    image = panel.imshow(share, cmap="Blues", norm=PowerNorm(0.5, 0.0, 1.0), interpolation="nearest")
    panel.set_xlabel("predicted class")
    panel.set_ylabel("true class")
    if named:
        size = 7 if count > 20 else 9
        panel.set_xticks(range(count), names, rotation=90, fontsize=size)
        panel.set_yticks(range(count), names, fontsize=size)
        panel.tick_params(length=0)
        panel.set_xticks(np.arange(count + 1) - 0.5, minor=True)
        panel.set_yticks(np.arange(count + 1) - 0.5, minor=True)
        panel.grid(which="minor", color="#EDEDED", linewidth=0.5)
        panel.tick_params(which="minor", length=0)
    panel.spines[:].set_visible(False)
    if title:
        panel.set_title(title, loc="left", fontsize=11)
    bar = figure.colorbar(image, ax=panel, shrink=0.5, aspect=30, pad=0.02, format=PercentFormatter(1.0, decimals=0))
    bar.set_label("share of the true class")
    bar.outline.set_visible(False)
    if include_values:
        for row, column in zip(*np.nonzero(matrix_CC), strict=True):
            colour = "white" if share[row, column] > 0.3 else "#202020"
            panel.text(column, row, matrix_CC[row, column], ha="center", va="center", color=colour, fontsize=7)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=150)


def listing(confusions: Sequence[Confusion], name: Callable[[int], str]) -> str:
    """The confusions as lines of text, with the share of the true class."""
    rows = [("samples", "of class", "true", "predicted")]
    rows += [
        (str(one.samples), f"{100 * one.samples / one.total:.0f} %", name(one.true), name(one.predicted))
        for one in confusions
    ]
    width = max(len(row[2]) for row in rows)
    return "\n".join(f"{row[0]:>7}  {row[1]:>8}  {row[2]:<{width}}  {row[3]}" for row in rows)


def _predict(config: Any, checkpoint: str) -> tuple[np.ndarray, np.ndarray]:
    from alimm.apis import test

    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "predictions.npz"
        test.test(config, None if checkpoint == "none" else checkpoint, out=out)
        return read_predictions(out)


def _run(args: argparse.Namespace) -> None:
    from alimm.apis.config import load_config

    if args.show_path is not None and args.show_path.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise ValueError(f"--show-path must end in .png, .svg or .pdf, got {args.show_path}")
    config = load_config(args.config, args.cfg_options)
    source = Path(args.source)
    if source.suffix in PREDICTION_SUFFIXES:
        labels, predictions = read_predictions(source, args.trust)
    else:
        labels, predictions = _predict(config, args.source)
    names = class_names(config)
    seen = int(max(labels.max(), predictions.max())) + 1
    if names is not None and len(names) < seen:
        raise ValueError(f"{args.source} has the class {seen - 1}, {args.config} names {len(names)} classes")
    right = int((labels == predictions).sum())
    print(f"{len(labels)} samples, {right} right ({100 * right / len(labels):.2f} %)")
    if args.show_path is not None:
        count = seen if names is None else len(names)
        if count > PICTURE_LIMIT:
            raise ValueError(f"{count} classes make no readable picture; list the worst with --top-confusions 50")
        if args.include_values and count > VALUE_LIMIT:
            raise ValueError(f"--include-values is for at most {VALUE_LIMIT} classes, these are {count}")
        shown = names if names is not None else [str(index) for index in range(count)]
        title = f"{len(labels)} samples, {100 * right / len(labels):.1f} % right"
        draw(confusion_matrix(labels, predictions, count), shown, args.show_path, args.include_values, title)
        print(f"wrote {args.show_path}")
    rows = args.top_confusions if args.top_confusions is not None else 0 if args.show_path is not None else 10
    if rows:
        print(listing(top_confusions(labels, predictions, rows), lambda i: str(i) if names is None else names[i]))


def main(argv: list[str] | None = None) -> int:
    """Command line of ``tools/confusion_matrix.py``."""
    from mmengine.config import DictAction

    parser = argparse.ArgumentParser(prog="confusion_matrix.py", description="Show which classes are taken for which.")
    parser.add_argument("config", metavar="CONFIG", help="path or package::path; its test set names the classes")
    parser.add_argument(
        "source",
        metavar="CHECKPOINT|PREDICTIONS",
        help="weights to test (or `none`), or what `alimm test --out` wrote (.npz, .pkl)",
    )
    parser.add_argument("--show-path", type=Path, metavar="OUT", help="draw the matrix: .png, .svg or .pdf")
    parser.add_argument("--include-values", action="store_true", help="write the counts into the cells")
    parser.add_argument("--top-confusions", type=int, metavar="K", help="list the K most frequent wrong pairs")
    parser.add_argument("--trust", action="store_true", help="read a .pkl whatever it holds; that can run any code")
    parser.add_argument("--cfg-options", nargs="+", action=DictAction, help="changes to CONFIG, key=value")
    args = parser.parse_args(argv)
    if args.top_confusions is not None and args.top_confusions < 1:
        parser.error(f"--top-confusions takes a number of at least 1, got {args.top_confusions}")
    try:
        _run(args)
    except (ValueError, OSError, ImportError) as error:
        print(f"confusion_matrix.py: {error}", file=sys.stderr)
        return 1
    return 0
