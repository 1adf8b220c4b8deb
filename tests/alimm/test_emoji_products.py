"""The embedded catalogue: what the data card says, and what a damaged file is told."""

import hashlib

import numpy as np
import pytest

from alimm.datasets import EmojiProducts
from alimm.datasets.emoji_products import (
    ASSET,
    VENDORS,
    EmojiCatalogue,
    concept_test_identities,
    load_catalogue,
)


def column(dataset, key):
    return np.array([dataset.get_data_info(index)[key] for index in range(len(dataset))])


def test_counts_of_the_data_card():
    catalogue = load_catalogue()
    assert catalogue.pixels.shape == (5160, 64, 64, 4)
    assert len(catalogue.identities) == 1914
    assert np.bincount(catalogue.vendor).tolist() == [1652, 1914, 1594]
    in_all = np.bincount(catalogue.identity) == 3
    assert in_all.sum() == 1594
    assert len(catalogue.subgroups) == 98
    assert len(catalogue.groups) == 9
    assert len(catalogue.languages) >= 8


def test_pixels_are_the_released_ones():
    digest = hashlib.sha256(load_catalogue().pixels.tobytes()).hexdigest()
    assert digest == "cb7ff4cc60acfa3ccae0c87abd42be02915bfe984648b1cace5dc6b6daf86693"


def test_texts_are_there_in_every_language():
    catalogue = load_catalogue()
    cat = next(identity for identity in catalogue.identities if identity["names"]["en"] == "cat face")
    assert cat["subgroup"] == "animal-mammal"
    assert set(cat["names"]) == set(catalogue.languages)
    assert cat["names"]["de"] == "Katzengesicht"
    assert "pet" in cat["tags"]["en"]
    for language in catalogue.languages:
        named = sum(bool(identity["names"].get(language)) for identity in catalogue.identities)
        assert named >= 1900


@pytest.mark.parametrize("vendor", VENDORS)
def test_style_split_tests_one_vendor_only(vendor):
    train, test = (EmojiProducts(subset=subset, test_vendor=vendor) for subset in ("train", "test"))
    assert len(train) + len(test) == 5160
    assert set(column(test, "vendor")) == {vendor}
    assert vendor not in set(column(train, "vendor"))
    assert train.metainfo["class_counts"] == np.bincount(column(train, "gt_label"), minlength=98).tolist()
    assert test.metainfo["class_counts"] == train.metainfo["class_counts"]


def test_queries_of_the_identity_retrieval_are_in_the_gallery():
    gallery, queries = EmojiProducts(subset="train"), EmojiProducts(subset="test")
    assert set(column(queries, "gt_identity")) <= set(column(gallery, "gt_identity"))
    gallery, queries = (EmojiProducts(subset=side, test_vendor="twemoji") for side in ("train", "test"))
    assert len(set(column(queries, "gt_identity")) - set(column(gallery, "gt_identity"))) == 262


def test_concept_split_shares_no_identity_and_nearly_every_class():
    train, test = (EmojiProducts(split="concept", subset=subset) for subset in ("train", "test"))
    assert not set(column(train, "gt_identity")) & set(column(test, "gt_identity"))
    assert len(train) + len(test) == 5160
    assert len(set(column(test, "gt_label"))) >= 97
    assert set(column(test, "gt_label")) <= set(column(train, "gt_label"))
    again = concept_test_identities(load_catalogue(), 0, 0.3)
    assert np.array_equal(again, concept_test_identities(load_catalogue(), 0, 0.3))
    assert not np.array_equal(again, concept_test_identities(load_catalogue(), 1, 0.3))


@pytest.mark.parametrize(("target", "classes"), [("subgroup", 98), ("group", 9), ("identity", 1914)])
def test_targets(target, classes):
    dataset = EmojiProducts(target=target, split="all")
    assert len(dataset.metainfo["classes"]) == classes
    assert column(dataset, "gt_label").max() == classes - 1
    item = dataset.get_data_info(100)
    name = item["names"]["en"] if target == "identity" else dataset.catalogue.identities[item["gt_identity"]][target]
    assert dataset.metainfo["classes"][item["gt_label"]] == name
    assert dataset.get_cat_ids(100) == [item["gt_label"]]


def test_transparency_is_laid_over_the_background():
    white, red = EmojiProducts()[0]["img"], EmojiProducts(background=(255, 0, 0))[0]["img"]
    assert white[0, 0].tolist() == [255, 255, 255]
    assert red[0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(split="Style"), "split must be one of style, concept, all, got 'Style'"),
        (dict(subset="val"), "subset must be one of train, test"),
        (dict(test_vendor="apple"), "test_vendor must be one of noto, twemoji, fluent"),
        (dict(target="name"), "target must be one of"),
        (dict(test_ratio=1.0), "between 0 and 1"),
        (dict(background=(0, 0, 300)), "0 to 255"),
    ],
)
def test_wrong_options_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        EmojiProducts(**changes)


def test_a_damaged_or_missing_file_is_named(tmp_path):
    path = tmp_path / "emoji.npz"
    with pytest.raises(FileNotFoundError, match=r"emoji.npz is missing.*build_emoji_products.py"):
        EmojiCatalogue(path)
    content = bytearray(ASSET.read_bytes())
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"emoji.npz .* damaged"):
        EmojiCatalogue(path)
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"emoji.npz"):
        EmojiCatalogue(path)
