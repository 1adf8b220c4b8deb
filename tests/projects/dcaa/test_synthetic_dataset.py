"""The data set of synthetic streets in several kinds of weather."""

import copy
import pickle
import zlib

import numpy as np
import pytest

pytest.importorskip("mmseg")

from PIL import Image
from torch.utils.data import DataLoader

from alimm.projects.dcaa.synthetic import CLASSES, CONDITIONS, SyntheticWeatherDataset, export_dataset
from alimm.registry import DATASETS

GOLDEN = [1026708706, 3152949769, 643077582, 3214229985, 2309401492, 2641185670]


def target(**kwargs):
    return SyntheticWeatherDataset("target", **{"num": 2, **kwargs})


def crc(array):
    return zlib.crc32(np.ascontiguousarray(array).tobytes())


def as_it_is(items):
    return items


def test_an_item_of_the_source():
    data = DATASETS.build(dict(type="alimm.SyntheticWeatherDataset", domain="source", num=3, size=(65, 131)))
    assert len(data) == 3
    assert data.metainfo["classes"] == CLASSES
    assert len(data.metainfo["palette"]) == len(CLASSES)
    assert data.conditions == data.metainfo["conditions"] == ("source",)
    item = data[1]
    assert item["img"].shape == (65, 131, 3)
    assert item["img"].dtype == item["gt_seg_map"].dtype == np.uint8
    assert item["img"].flags.c_contiguous
    assert item["img_shape"] == item["ori_shape"] == item["gt_seg_map"].shape == (65, 131)
    assert item["seg_fields"] == ["gt_seg_map"]
    assert item["img_path"] == "synthetic/source/train/source/00001.png"
    assert (item["domain"], item["condition"], item["cond_id"]) == ("source", "source", 0)
    assert item["reduce_zero_label"] is False
    # Skies are blue, and the picture is BGR.
    sky = item["img"][item["gt_seg_map"] == 0].mean(0)
    assert sky[0] > sky[1] > sky[2]


def test_conditions_have_their_ids_in_the_given_order():
    data = target(conditions=("snow", "clear", "fog"))
    assert data.conditions == data.metainfo["conditions"] == ("snow", "clear", "fog")
    ids = data.condition_ids()
    assert ids.dtype == np.int64
    assert ids.tolist() == [0, 0, 1, 1, 2, 2]
    assert [data[i]["condition"] for i in range(6)] == ["snow", "snow", "clear", "clear", "fog", "fog"]
    assert [data[i]["cond_id"] for i in range(6)] == ids.tolist()
    assert target(indices=[0, 9]).condition_ids().tolist() == [0, 4]
    assert data.get_subset([5, 0]).condition_ids().tolist() == [2, 0]
    assert target().conditions == CONDITIONS


def test_a_picture_depends_on_its_own_condition_and_number_alone():
    full = target(num=3)
    few = target(num=2, conditions=("night", "fog"))
    for position, place in [(0, 9), (1, 10), (2, 3), (3, 4)]:
        few_item, full_item = few[position], full[place]
        np.testing.assert_array_equal(few_item["img"], full_item["img"])
        np.testing.assert_array_equal(few_item["gt_seg_map"], full_item["gt_seg_map"])


def test_other_seeds_splits_domains_conditions_and_numbers_are_other_streets():
    labels = [target(num=2)[i]["gt_seg_map"] for i in range(10)]
    labels += [target(seed=1)[0]["gt_seg_map"], target(split="val")[0]["gt_seg_map"]]
    labels += [SyntheticWeatherDataset("source", num=1)[0]["gt_seg_map"]]
    assert len({crc(label) for label in labels}) == len(labels)


def test_paired_conditions_show_the_same_street():
    data = target(num=2, paired=True)
    labels = [data[i]["gt_seg_map"] for i in range(10)]
    for number in range(2):
        for condition in range(1, 5):
            np.testing.assert_array_equal(labels[number], labels[2 * condition + number])
    assert (labels[0] != labels[1]).any()
    assert len({crc(data[i]["img"]) for i in range(10)}) == 10
    # Fog on the very same colours: no change where severity is 0.
    still = target(num=1, paired=True, severity=0.0)
    for i in range(1, 5):
        np.testing.assert_array_equal(still[0]["img"], still[i]["img"])


def test_a_side_without_labels_holds_none_and_shows_the_same_pictures():
    blind, seeing = target(with_labels=False), target()
    for i in range(len(blind)):
        item = blind[i]
        assert not [key for key in item if "seg_map" in key or ("label" in key and key != "reduce_zero_label")]
        assert item["seg_fields"] == []
        np.testing.assert_array_equal(item["img"], seeing[i]["img"])
    assert all(label is None for _, label in blind._cache.values())
    assert not any("seg_map" in key for key in blind.get_data_info(0))


def test_the_cache_changes_nothing_and_items_are_their_own():
    cached, fresh = target(), target(cache=False)
    first = cached[4]
    np.testing.assert_array_equal(first["img"], fresh[4]["img"])
    first["img"][:], first["gt_seg_map"][:] = 0, 0
    first["seg_fields"].append("more")
    for data in (cached, fresh):
        np.testing.assert_array_equal(cached[4]["img"], data[4]["img"])
        np.testing.assert_array_equal(cached[4]["gt_seg_map"], data[4]["gt_seg_map"])
        assert data[4]["seg_fields"] == ["gt_seg_map"]
    assert len(cached._cache) == 1
    assert cached[4]["img"].any()
    assert fresh._cache is None


def test_copies_and_workers_render_the_same():
    data = target(size=(32, 64))
    wanted = [crc(data[i]["img"]) for i in range(len(data))]
    light = pickle.dumps(data)
    assert len(light) < len(pickle.dumps({k: v for k, v in data.__dict__.items() if k != "pipeline"}))
    for other in (pickle.loads(light), copy.deepcopy(data)):
        assert not other._cache
        assert [crc(other[i]["img"]) for i in range(len(other))] == wanted
    loaded = DataLoader(data, batch_size=5, num_workers=1, collate_fn=as_it_is)
    assert [crc(item["img"]) for batch in loaded for item in batch] == wanted


def test_lazy_init_and_the_pipeline_of_mmsegmentation():
    from alimm.projects.dcaa.packing import PackConditionInputs

    assert PackConditionInputs
    pipeline = [dict(type="mmseg.RandomFlip", prob=1.0), dict(type="alimm.PackConditionInputs")]
    for with_labels in (True, False):
        data = target(lazy_init=True, pipeline=pipeline, with_labels=with_labels)
        assert not data._fully_initialized
        packed = data[7]
        raw = target()[7]
        np.testing.assert_array_equal(packed["inputs"].numpy().transpose(1, 2, 0), raw["img"][:, ::-1])
        sample = packed["data_samples"]
        assert (sample.domain, sample.condition, sample.cond_id) == ("target", "night", 3)
        assert sample.img_shape == (64, 128)
        assert ("gt_sem_seg" in sample) == with_labels
        if with_labels:
            np.testing.assert_array_equal(sample.gt_sem_seg.data[0].numpy(), raw["gt_seg_map"][:, ::-1])


def test_the_pictures_stay_as_they_are():
    """The arithmetic is in float64 and rounded at the end; a change of these numbers is a change of the data set."""
    data = target(num=1, size=(32, 64))
    pictures = [crc(data[i]["img"]) for i in range(5)] + [
        crc(SyntheticWeatherDataset("source", num=1, size=(32, 64))[0]["img"])
    ]
    assert pictures == GOLDEN


def test_a_tree_of_files(tmp_path):
    data = target(num=2, conditions=("clear", "rain"), size=(32, 64))
    assert export_dataset(data, tmp_path / "tree") == 4
    files = sorted(str(path.relative_to(tmp_path / "tree")) for path in (tmp_path / "tree").rglob("*.png"))
    names = ["clear/00000.png", "clear/00001.png", "rain/00000.png", "rain/00001.png"]
    assert files == [f"{kind}/{name}" for kind in ("img", "labels") for name in names]
    for index, name in enumerate(names):
        item = data[index]
        with Image.open(tmp_path / "tree" / "img" / name) as picture:
            np.testing.assert_array_equal(np.asarray(picture)[..., ::-1], item["img"])
        with Image.open(tmp_path / "tree" / "labels" / name) as label:
            assert label.mode == "L"
            np.testing.assert_array_equal(np.asarray(label), item["gt_seg_map"])
    export_dataset(target(num=1, conditions=("fog",), with_labels=False), tmp_path / "blind")
    assert [path.name for path in (tmp_path / "blind").iterdir()] == ["img"]


@pytest.mark.parametrize(
    "wrong",
    [
        dict(domain="goal"),
        dict(split="test"),
        dict(num=0),
        dict(num=True),
        dict(alpha=1.5),
        dict(severity=-0.1),
        dict(size=(8, 64)),
        dict(size=(64,)),
        dict(conditions=("fog", "hail")),
        dict(conditions=("fog", "fog")),
        dict(conditions=()),
        dict(conditions="fog"),
    ],
)
def test_wrong_arguments_are_named(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        SyntheticWeatherDataset(**{"domain": "target", **wrong})
