"""The main job on real data: train a recogniser, test it, embed a catalogue, search it, write a report.

    python tools/demo.py [--quick] [--work-dir DIR] [--epochs N] [--seed N] [--int8] [--knn] [--index NAME]
                         [--cfg-options K=V ...]

EmojiProducts, style split: the recogniser is trained on the pictures of two vendors and meets a third one's style for
the first time in the test. Every figure of the report comes from this run, the baselines too. The exit code is 1 where
the recogniser is not as much better than they are as the README says. ``--int8``, or INT8=1 in the environment, trains
the recogniser in INT8 (`alimm.Int8TrainingHook`). ``--knn``, or KNN=1, also teaches it the 1,914 products as classes,
with KNN softmax (`alimm.KNNSoftmaxHead`). ``--index BinaryGraphIndex``, or INDEX=BinaryGraphIndex, searches the
catalogue by binary codes; any other index of ``alimm.registry.INDEXES`` goes too.

A method joins the demo with a function that takes the `Demo`, adds its figures to it and a section to the page, and a
line in ``STEPS``.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from mmengine.config import Config
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parent))
import demo_baselines

from alimm.apis.config import load_config, parse_options
from alimm.apis.inferencers import EmbeddingInferencer
from alimm.apis.test import test
from alimm.apis.train import check_work_dir, train
from alimm.cli import run_guarded
from alimm.datasets.emoji_products import EmojiProducts
from alimm.evaluation.retrieval import RetrievalScores, retrieval_from_features
from alimm.registry import INDEXES
from alimm.report import Page, Raw, curves, escape, picture, table

CONFIG = "alimm::emoji_products/resnet_tiny_style.py"
CLAIM_ACCURACY = 12.0
"""Points of sub-group top-1 above HOG and colour with logistic regression."""
CLAIM_RECALL = 2.0
"""Identity recall@1 as a multiple of that of 8 x 8 colour averages."""
TOPK = (1, 5, 10)


@dataclass
class Side:
    """One side of the split, in memory."""

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    identities: NDArray[np.int64]
    names: list[str]


def read_side(subset: str) -> Side:
    """The pictures, classes, identities and English names of one side of the style split."""
    items = [*EmojiProducts(split="style", subset=subset)]
    return Side(
        images=np.stack([item["img"] for item in items]),
        labels=np.array([item["gt_label"] for item in items]),
        identities=np.array([item["gt_identity"] for item in items]),
        names=[item["names"]["en"] for item in items],
    )


@dataclass
class Demo:
    """What the steps hand on to each other."""

    config: Config
    work_dir: Path
    page: Page
    shop: Side
    queries: Side
    checkpoint: Path = Path()
    index: str = "ExactIndex"
    figures: dict[str, Any] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)


def train_step(demo: Demo) -> None:
    """Train on two vendors and draw the curves."""
    train(demo.config, work_dir=demo.work_dir)
    demo.checkpoint = Path((demo.work_dir / "last_checkpoint").read_text().strip())
    logs = sorted(demo.work_dir.glob("*/vis_data/scalars.json"))[-1]
    rows = [json.loads(line) for line in logs.read_text().splitlines()]
    losses = [row for row in rows if "loss" in row]
    tests = [row for row in rows if "accuracy/top1" in row]
    panels = {
        "training loss": {
            key: ([row["epoch"] for row in losses], [row[key] for row in losses])
            for key in losses[-1]
            if key.endswith("loss")
        },
        "unseen vendor, accuracy in %": {
            label: ([row["step"] for row in tests], [row[key] for row in tests])
            for key, label in (("accuracy/top1", "top-1"), ("accuracy/top5", "top-5"))
        },
    }
    demo.page.section("Training", curves(panels))


def test_step(demo: Demo) -> None:
    """Test the last checkpoint on the vendor that training never saw."""
    demo.figures["recogniser"] = test(demo.config, demo.checkpoint, work_dir=demo.work_dir / "test")


def baseline_step(demo: Demo) -> None:
    """Fit and judge the baselines on the same split."""
    predicted = demo_baselines.hog_color_predictions(demo.shop.images, demo.shop.labels, demo.queries.images)
    demo.figures["hog_color"] = demo_baselines.accuracies(predicted, demo.queries.labels, demo.shop.labels)
    colors = [demo_baselines.color_average(side.images) for side in (demo.queries, demo.shop)]
    demo.figures["color_recall"] = judge(demo, *colors).recall


def judge(demo: Demo, queries: NDArray[np.float32], shop: NDArray[np.float32]) -> RetrievalScores:
    """Retrieval figures of the queries in the shop, by features (Q, D) and (N, D)."""
    return retrieval_from_features(queries, demo.queries.identities, shop, demo.shop.identities, TOPK)


def product(side: Side, row: int, css: str = "") -> Raw:
    """A table cell with a picture and its name."""
    name = side.names[row]
    return Raw(f'<td class="{css}">{picture(side.images[row], name)}<small>{escape(name)}</small></td>')


def search_step(demo: Demo) -> None:
    """Embed the shop's catalogue, search it with the unseen vendor's pictures, show the first hits."""
    embed = EmbeddingInferencer(demo.config, weights=demo.checkpoint)
    shop, queries = embed(list(demo.shop.images)), embed(list(demo.queries.images))
    index = INDEXES.build(dict(type=f"alimm.{demo.index}", dim=shop.shape[1], metric="cosine"))
    index.add(shop)
    index.save(demo.work_dir / "catalogue.index")
    _, hits = index.search(queries, 5)
    demo.figures["recall"] = judge(demo, queries, shop).recall
    right = demo.shop.identities[hits] == demo.queries.identities[:, None]
    chosen = np.random.default_rng(0).choice(len(queries), size=min(24, len(queries)), replace=False)
    rows = []
    for query in chosen:
        cells = [product(demo.queries, query)]
        for hit, good in zip(hits[query], right[query], strict=True):
            cells.append(product(demo.shop, hit, "right" if good else "wrong"))
        rows.append(cells)
    demo.page.section(
        "Search: what the catalogue answers",
        f"Queries are drawn by the vendor that training never saw ({len(queries)} pictures); the catalogue holds the "
        f"two other vendors' {len(shop)} pictures ({demo.index}). "
        f"Here are {len(chosen)} queries, picked by a random draw, with their "
        f"first five hits. A green frame and a tick mark the same product.",
        table(["query", *(f"hit {rank}" for rank in range(1, 6))], rows, css="hits"),
    )


STEPS: list[tuple[str, Callable[[Demo], None]]] = [
    ("train", train_step),
    ("test", test_step),
    ("baselines", baseline_step),
    ("embed and search", search_step),
]


def summary(figures: dict[str, Any]) -> tuple[list[str], list[list[str]], list[tuple[str, bool]]]:
    """Header and rows of the closing table, and each claim with whether it is met."""
    header = ["method", "sub-group top-1", "class mean", "many", "medium", "few", *(f"recall@{k}" for k in TOPK)]
    keys = ("accuracy/top1", "accuracy/mean_class", "shot/many", "shot/medium", "shot/few")
    ours, hog = figures["recogniser"], figures["hog_color"]
    recall, color = figures["recall"], figures["color_recall"]
    rows = [
        ["alimm recogniser", *(f"{ours[key]:.1f}" for key in keys), *(f"{100 * recall[k]:.1f}" for k in TOPK)],
        ["HOG + colour, logistic regression", *(f"{hog[key]:.1f}" for key in keys), *("" for _ in TOPK)],
        ["8 x 8 colour averages", *("" for _ in keys), *(f"{100 * color[k]:.1f}" for k in TOPK)],
    ]
    gain, ratio = ours["accuracy/top1"] - hog["accuracy/top1"], recall[1] / color[1]
    claims = [
        (
            f"top-1 {gain:+.1f} points against HOG + colour (claim: at least +{CLAIM_ACCURACY:g})",
            gain >= CLAIM_ACCURACY,
        ),
        (f"recall@1 x{ratio:.2f} of colour averages (claim: at least x{CLAIM_RECALL:g})", ratio >= CLAIM_RECALL),
    ]
    return header, rows, claims


def finish(demo: Demo, command: str) -> bool:
    """Write the page and print the table; whether every claim is met."""
    header, rows, claims = summary(demo.figures)
    verdicts = "".join(
        f'<li><span class="{"met" if met else "missed"}">{"met" if met else "not met"}</span> {text}</li>'
        for text, met in claims
    )
    overview = (
        "Figures",
        Raw(
            f"<p>In percent, on the unseen vendor. Many, medium and few: classes with over 100, 20 to 100 and under 20 "
            f"training pictures. Recall@k: queries with the same product among their first k hits.</p>"
            f"{table(header, rows, strong=[0])}<ul>{verdicts}</ul>"
        ),
    )
    demo.page.sections.insert(0, overview)
    test_again = shlex.join(["alimm", "test", str(demo.work_dir / Path(CONFIG).name), str(demo.checkpoint)])
    seconds = [[name, f"{value:.0f} s"] for name, value in demo.seconds.items()]
    demo.page.section(
        "How it was made",
        Raw(f"<pre>{escape(command)}\n{escape(test_again)}</pre>"),
        table(["step", "time"], seconds),
    )
    report = demo.work_dir / "report.html"
    demo.page.write(report)
    (demo.work_dir / "figures.json").write_text(json.dumps(demo.figures, indent=2, default=float))
    console = Console()
    shown = Table(title="EmojiProducts, unseen vendor (%)")
    for method in ("", "alimm", "HOG + colour", "8 x 8 colours"):
        shown.add_column(method, justify="right" if method else "left")
    for name, *values in list(zip(header, *rows, strict=True))[1:]:
        shown.add_row(name, *values)
    console.print(shown)
    for text, met in claims:
        console.print(f"{'met    ' if met else 'NOT MET'} {text}")
    console.print(f"report: {report.resolve()}", soft_wrap=True)
    return all(met for _, met in claims)


def demo_config(options: Sequence[str], seed: int, epochs: int | None, int8: bool = False, knn: bool = False) -> Config:
    """The recogniser's config with the changes of the command line."""
    config = load_config(CONFIG, parse_options(options))
    config.randomness.seed = seed
    if epochs is not None:
        config.train_cfg.max_epochs = epochs
    if int8:
        config.custom_hooks = [*config.get("custom_hooks", []), dict(type="alimm.Int8TrainingHook")]
    if knn:
        config.model.head.heads.product = dict(
            type="alimm.KNNSoftmaxHead",
            num_classes=1914,
            in_channels=config.model.head.heads.subgroup.in_channels,
            target="gt_identity",
            active=0.25,
            scale=16.0,
        )
        # AdamW of torch takes no gradients of rows.
        config.optim_wrapper.optimizer.update(type="alimm.RowSparseAdamW", rows="frozen")
        config.custom_hooks = [*config.get("custom_hooks", []), dict(type="alimm.KNNGraphHook", start=100)]
    return config


def _asked(variable: str) -> bool:
    return os.environ.get(variable, "0") not in ("", "0")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the steps; 0 if every claim is met."""
    parser = argparse.ArgumentParser(description="Train, test, embed and search on EmojiProducts, and write a report.")
    parser.add_argument("--work-dir", type=Path, default=Path("work_dirs/demo"))
    parser.add_argument("--epochs", type=int, help="train for so many epochs; by default as the config says")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="one epoch, to try the machinery; claims are not judged")
    parser.add_argument("--cfg-options", nargs="+", default=[], metavar="K=V", help="changes to the config")
    parser.add_argument("--int8", action="store_true", default=_asked("INT8"), help="train in INT8; so does INT8=1")
    parser.add_argument("--knn", action="store_true", default=_asked("KNN"), help="products as classes; so does KNN=1")
    index = os.environ.get("INDEX") or "ExactIndex"
    parser.add_argument("--index", default=index, metavar="NAME", help="what searches; so does INDEX=NAME")
    arguments = parser.parse_args(argv)
    if INDEXES.get(f"alimm.{arguments.index}") is None:
        raise ValueError(
            f"there is no index {arguments.index!r}; ExactIndex and BinaryGraphIndex are two that there are"
        )
    epochs = 1 if arguments.quick else arguments.epochs
    config = demo_config(arguments.cfg_options, arguments.seed, epochs, arguments.int8, arguments.knn)
    check_work_dir(str(arguments.work_dir))
    page = Page(
        "alimm: recognise and search products across styles",
        "A small network learns 98 kinds of products from the drawings of two vendors and meets those of a third.",
    )
    demo = Demo(config, arguments.work_dir, page, read_side("train"), read_side("test"), index=arguments.index)
    for name, step in STEPS:
        start = time.perf_counter()
        step(demo)
        demo.seconds[name] = time.perf_counter() - start
    met = finish(demo, shlex.join(["python", *sys.argv]))
    return 0 if met or arguments.quick else 1


if __name__ == "__main__":
    sys.exit(run_guarded("__main__", "main", None))
