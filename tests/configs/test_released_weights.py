"""The released checkpoint gives the figures that the metafile and the README print."""

import re
from pathlib import Path

import numpy as np
import pytest

from alimm.apis.config import load_config
from alimm.apis.inferencers import EmbeddingInferencer
from alimm.apis.test import test as run_test
from alimm.datasets import EmojiProducts
from alimm.evaluation.retrieval import retrieval_from_features
from alimm.paths import resource_root
from alimm.zoo.index import get_entry

NAME = "resnet_tiny_style"
FOUR_PICTURES = 0.3
"""Of the 1,594, so many may fall the other way on another processor, in percent points and rounded up."""


def printed(dataset):
    return next(result.metrics for result in get_entry(NAME).results if dataset in result.dataset)


def test_accuracy(tmp_path):
    config = load_config("alimm::emoji_products/resnet_tiny_style.py", {"log_level": "WARNING"})
    measured = run_test(config, f"alimm://{NAME}", work_dir=tmp_path, device="cpu")
    for name, value in printed("style split").items():
        # One picture more or less moves the mean over classes by far more than its share, where a class has few.
        assert measured[name] == pytest.approx(value, abs=FOUR_PICTURES if "top" in name else 1.5), name
    for name, floor in config.expected.items():
        assert measured[name] >= floor
    assert f"{printed('style split')['accuracy/top1']} %" in (resource_root() / "README.md").read_text()


def test_retrieval():
    embed = EmbeddingInferencer(NAME)
    sides = []
    for subset in ("test", "train"):
        items = [*EmojiProducts(subset=subset)]
        sides += [embed([item["img"] for item in items], 256), np.array([item["gt_identity"] for item in items])]
    scores = retrieval_from_features(*sides, topk=(1, 5, 10))
    for name, value in printed("identity retrieval").items():
        assert 100 * scores.recall[int(name.partition("@")[2])] == pytest.approx(value, abs=FOUR_PICTURES), name


def test_readme_links_lead_somewhere():
    for page in [resource_root() / "README.md", *resource_root().glob("configs/*/README.md")]:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", page.read_text()):
            assert (Path(page).parent / target).exists(), f"{page}: {target}"
