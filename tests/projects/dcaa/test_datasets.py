"""Data sets that know conditions, each on a tiny tree like the real one."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("mmseg")

import mmcv
from mmengine import fileio
from mmengine.registry import DefaultScope
from torch.utils.data import DataLoader

from alimm.projects.dcaa.datasets import (
    ACDCConditionDataset,
    BDD100KConditionDataset,
    CityscapesConditionDataset,
    ConcatConditionDataset,
    ConditionSegDataset,
    FoggyCityscapesDataset,
    GTA5ConditionDataset,
    RainCityscapesDataset,
)
from alimm.projects.dcaa.synthetic.dataset import SyntheticWeatherDataset, export_dataset
from alimm.registry import DATASETS

LOAD = [dict(type="mmcv.LoadImageFromFile")]
LABEL = [dict(type="mmseg.LoadAnnotations")]
PACK = [dict(type="alimm.PackConditionInputs")]


@pytest.fixture(autouse=True)
def no_collection(monkeypatch):
    """MMEngine collects garbage after every set; with all of torch in memory that takes longer than the tests."""
    monkeypatch.setattr("gc.collect", lambda *_: 0)


def write(path, pixels=None):
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.zeros((4, 6, 3), np.uint8) if pixels is None else pixels).save(path)


def write_label(path, value=1):
    write(path, np.full((4, 6), value, np.uint8))


def summary(data):
    infos = [data.get_data_info(row) for row in range(len(data))]
    return [(Path(info["img_path"]).name.split("_")[0], info["condition"], info["cond_id"]) for info in infos]


def labels(data):
    return [Path(data.get_data_info(row)["seg_map_path"]) for row in range(len(data))]


@pytest.fixture
def tree(tmp_path):
    for number, condition in enumerate(["fog", "night", "fog", "snow"]):
        write(tmp_path / "img" / condition / f"{number}.jpg")
        write_label(tmp_path / "labels" / condition / f"{number}.png", number)
    return tmp_path


def build(tree, **options):
    options = (
        dict(
            data_root=str(tree),
            data_prefix=dict(img_path="img", seg_map_path="labels"),
            metainfo=dict(classes=("a", "b", "c", "d")),
        )
        | options
    )
    return ConditionSegDataset(**options)


@pytest.mark.parametrize("serialize", [True, False])
def test_conditions_of_a_folder(tree, serialize):
    data = build(tree, serialize_data=serialize)
    assert data.conditions == data.metainfo["conditions"] == ("fog", "night", "snow")
    assert summary(data) == [("0.jpg", "fog", 0), ("2.jpg", "fog", 0), ("1.jpg", "night", 1), ("3.jpg", "snow", 2)]
    ids = data.condition_ids()
    assert (ids.tolist(), ids.dtype) == ([0, 0, 1, 2], np.int64)
    assert data.get_subset([3, 0]).condition_ids().tolist() == [2, 0]
    assert build(tree, serialize_data=serialize, indices=[2, 3]).condition_ids().tolist() == [1, 2]
    assert pickle.loads(pickle.dumps(data)).condition_ids().tolist() == [0, 0, 1, 2]
    assert data.get_data_info(0)["domain"] == "target"
    data.get_subset_(3)
    assert data.condition_ids().tolist() == [0, 0, 1]


def test_given_conditions_set_the_ids(tree):
    data = build(tree, conditions=["snow", "fog", "night"])
    assert data.condition_ids().tolist() == [1, 1, 2, 0]
    rule = dict(type="folder", level=0, unknown="skip")
    data = build(tree, conditions=["night", "fog"], condition_rule=rule)
    assert summary(data) == [("0.jpg", "fog", 1), ("2.jpg", "fog", 1), ("1.jpg", "night", 0)]
    with pytest.raises(ValueError, match="not among fog"):
        build(tree, conditions=["fog"])
    with pytest.raises(ValueError, match=r"none of the 4 pictures.*has one of the conditions rain"):
        build(tree, conditions=["rain"], condition_rule=rule | dict(unused="allow"))


def test_conditions_wait_for_a_lazy_set(tree):
    data = build(tree, lazy_init=True)
    assert not data._fully_initialized
    assert data.conditions == ("fog", "night", "snow")


def test_list_of_names_and_list_of_conditions(tree):
    (tree / "names.txt").write_text("snow/3\n\nfog/0\n")
    (tree / "conditions.json").write_text(json.dumps({"3": "bad", "0": "good"}))
    data = build(tree, ann_file="names.txt", condition_rule=dict(type="list", file="conditions.json"))
    assert summary(data) == [("3.jpg", "bad", 0), ("0.jpg", "good", 1)]
    assert labels(data) == [tree / "labels/snow/3.png", tree / "labels/fog/0.png"]
    (tree / "names.txt").write_text("\n")
    with pytest.raises(ValueError, match="lists no picture"):
        build(tree, ann_file="names.txt")
    with pytest.raises(ValueError, match="there is no list"):
        build(tree, ann_file="none.txt")


def test_items_come_packed(tree):
    data = build(tree, pipeline=[*LOAD, *LABEL, *PACK], domain="source")
    sample = data[3]["data_samples"]
    assert (sample.cond_id, sample.condition, sample.domain) == (2, "snow", "source")
    assert sample.gt_sem_seg.data.unique().tolist() == [3]


def test_what_is_missing_is_told(tree):
    with pytest.raises(ValueError, match="there is no folder"):
        build(tree, data_prefix=dict(img_path="pictures"))
    with pytest.raises(ValueError, match=r"no picture \*\.png below .*img; it holds 4 files, such as fog/0\.jpg"):
        build(tree, img_suffix=".png")
    (tree / "empty").mkdir()
    with pytest.raises(ValueError, match="it holds no file"):
        build(tree, data_prefix=dict(img_path="empty"))
    (tree / "labels/night/1.png").unlink()
    with pytest.raises(ValueError, match=r"1 of 4 labels are missing: .*night/1\.png.*with_labels=False"):
        build(tree)
    assert len(build(tree, with_labels=False)) == 4
    with pytest.raises(ValueError, match="'source' or 'target'"):
        build(tree, domain="both")


def test_training_on_the_target_opens_no_label(tree, monkeypatch):
    opened = []
    get, decode = fileio.get, mmcv.imfrombytes
    monkeypatch.setattr(fileio, "get", lambda path, *a, **k: opened.append(str(path)) or get(path, *a, **k))
    monkeypatch.setattr(mmcv, "imfrombytes", lambda *a, **k: opened.append("decoded") or decode(*a, **k))
    pictures = {str(path) for path in (tree / "img").rglob("*.jpg")}

    labelled = build(tree, pipeline=[*LOAD, *LABEL, *PACK])
    opened.clear()
    labelled[0]
    assert str(tree / "labels/fog/0.png") in opened, "the guard sees labels"

    opened.clear()
    data = build(tree, with_labels=False, pipeline=[*LOAD, *PACK])
    for row in range(len(data)):
        assert "seg_map_path" not in data.get_data_info(row)
        assert "gt_sem_seg" not in data[row]["data_samples"]
    assert set(opened) == pictures | {"decoded"}
    assert opened.count("decoded") == 4

    opened.clear()
    with pytest.raises(ValueError, match=r"with_labels=False: training on the target reads no labels\. Remove"):
        build(tree, with_labels=False, pipeline=[*LOAD, *LABEL, *PACK])[0]
    assert opened.count("decoded") == 1


def test_other_missing_keys_stay_what_they_are(tree):
    def broken(item):
        return item["nothing"]

    with pytest.raises(KeyError, match="nothing"):
        build(tree, with_labels=False, pipeline=[broken])[0]


@pytest.fixture
def acdc(tmp_path):
    for condition in ("fog", "night", "rain", "snow"):
        for split in ("train", "val"):
            name = f"{condition}/{split}/GOPR1/{condition[0]}{split}"
            write(tmp_path / "rgb_anon" / f"{name}_rgb_anon.png")
            write_label(tmp_path / "gt" / f"{name}_gt_labelTrainIds.png")
            write(tmp_path / "rgb_anon" / f"{condition}/{split}_ref/GOPR1/x_rgb_ref_anon.png")
            write(tmp_path / "rgb_anon" / f"{condition}/{split}_ref/GOPR1/x_rgb_anon.png")
    return tmp_path


def test_acdc(acdc):
    data = ACDCConditionDataset(data_root=str(acdc))
    assert summary(data) == [("ftrain", "fog", 0), ("ntrain", "night", 1), ("rtrain", "rain", 2), ("strain", "snow", 3)]
    assert labels(data)[1] == acdc / "gt/night/train/GOPR1/ntrain_gt_labelTrainIds.png"
    assert len(data.metainfo["classes"]) == 19
    data = ACDCConditionDataset(data_root=str(acdc), split=("train", "val"), conditions=("snow", "fog"))
    assert summary(data) == [("ftrain", "fog", 1), ("fval", "fog", 1), ("strain", "snow", 0), ("sval", "snow", 0)]
    with pytest.raises(ValueError, match=r"no picture <condition>/test/.*_rgb_anon\.png below"):
        ACDCConditionDataset(data_root=str(acdc), split="test", with_labels=False)
    with pytest.raises(ValueError, match="ACDC has the conditions fog, night, rain, snow, not dusk"):
        ACDCConditionDataset(data_root=str(acdc), conditions=("dusk",))


@pytest.fixture
def cityscapes(tmp_path):
    for stem in ("train/ulm/u1_0", "train/bonn/b1_0", "val/jena/j1_0"):
        write_label(tmp_path / f"gtFine/{stem}_gtFine_labelTrainIds.png", 13)
        write_label(tmp_path / f"gtFine/{stem}_gtFine_labelIds.png", 26)
        write(tmp_path / f"leftImg8bit/{stem}_leftImg8bit.png")
        for beta in ("0.005", "0.01", "0.02"):
            write(tmp_path / f"leftImg8bit_foggy/{stem}_leftImg8bit_foggy_beta_{beta}.png")
        if "ulm" not in stem:
            for pattern, alpha in ((1, "0.01"), (2, "0.01"), (11, "0.03")):
                tail = f"rain_alpha_{alpha}_beta_0.005_dropsize_0.002_pattern_{pattern}"
                write(tmp_path / f"leftImg8bit_rain/{stem}_leftImg8bit_{tail}.png")
    return tmp_path


def test_cityscapes(cityscapes):
    data = CityscapesConditionDataset(data_root=str(cityscapes), pipeline=[*LOAD, *LABEL, *PACK])
    assert summary(data) == [("b1", "clear", 0), ("u1", "clear", 0)]
    assert data[0]["data_samples"].gt_sem_seg.data.unique().tolist() == [13]
    assert summary(CityscapesConditionDataset(data_root=str(cityscapes), split="val")) == [("j1", "clear", 0)]


def test_foggy_cityscapes(cityscapes):
    root = str(cityscapes)
    data = FoggyCityscapesDataset(data_root=root)
    assert summary(data) == [("b1", "fog", 0), ("u1", "fog", 0)]
    assert data.get_data_info(0)["img_path"].endswith("bonn/b1_0_leftImg8bit_foggy_beta_0.01.png")
    assert labels(data)[1] == cityscapes / "gtFine/train/ulm/u1_0_gtFine_labelTrainIds.png"
    assert len(FoggyCityscapesDataset(data_root=root, beta=None)) == 6
    rule = dict(type="regex", pattern=r"(?P<condition>beta_[0-9.]+)[.]png")
    data = FoggyCityscapesDataset(data_root=root, beta=(0.005, 0.02), condition_rule=rule)
    assert data.conditions == ("beta_0.005", "beta_0.02")
    assert data.condition_ids().tolist() == [0, 1, 0, 1]
    with pytest.raises(ValueError, match=r"with beta in \[0\.5\] below"):
        FoggyCityscapesDataset(data_root=root, beta=0.5)


def test_rain_cityscapes(cityscapes):
    root = str(cityscapes)
    data = RainCityscapesDataset(data_root=root)
    assert summary(data) == [("b1", "rain", 0)] * 3
    assert set(labels(data)) == {cityscapes / "gtFine/train/bonn/b1_0_gtFine_labelTrainIds.png"}
    assert len(RainCityscapesDataset(data_root=root, split=("train", "val"), alpha=0.01)) == 4
    assert len(RainCityscapesDataset(data_root=root, pattern=1)) == 1
    assert len(RainCityscapesDataset(data_root=root, pattern=(1, 11), dropsize=0.002, beta=0.005)) == 2


WEATHER = {"a": ("clear", "daytime"), "b": ("rainy", "night"), "c": ("rainy", "dawn/dusk"), "d": ("undefined", "night")}


@pytest.fixture
def bdd(tmp_path):
    for name in WEATHER:
        write(tmp_path / f"images/10k/train/{name}.jpg")
        write_label(tmp_path / f"labels/sem_seg/masks/train/{name}.png")
    entries = [dict(name=f"{n}.jpg", attributes=dict(weather=w, timeofday=t)) for n, (w, t) in WEATHER.items()]
    (tmp_path / "train.json").write_text(json.dumps(entries))
    return tmp_path


@pytest.mark.parametrize(
    ("scheme", "expected"),
    [
        ("weather", ["clear", "rainy", "rainy"]),
        ("timeofday", ["daytime", "night", "dawn/dusk", "night"]),
        ("both", ["clear", "night", "rainy", "night"]),
    ],
)
def test_bdd100k(bdd, scheme, expected):
    data = BDD100KConditionDataset("train.json", scheme=scheme, unknown="skip", data_root=str(bdd))
    assert [condition for _, condition, _ in summary(data)] == expected
    assert data.conditions == tuple(sorted(set(expected)))
    assert labels(data)[0] == bdd / "labels/sem_seg/masks/train/a.png"


def test_bdd100k_tells_what_it_cannot_use(bdd):
    with pytest.raises(ValueError, match=r"no condition for 1 of 4 pictures: .*d\.jpg.*unknown='skip'"):
        BDD100KConditionDataset("train.json", scheme="weather", data_root=str(bdd))
    with pytest.raises(ValueError, match="there is no label file"):
        BDD100KConditionDataset("none.json", data_root=str(bdd))
    with pytest.raises(ValueError, match="scheme must be one of"):
        BDD100KConditionDataset("train.json", scheme="season", data_root=str(bdd))
    (bdd / "bad.json").write_text("[{}]")
    with pytest.raises(ValueError, match="list of objects with 'name'"):
        BDD100KConditionDataset("bad.json", data_root=str(bdd))


def test_bdd100k_takes_other_names(bdd):
    data = BDD100KConditionDataset(
        ["train.json"], rename={"rainy": "rain"}, conditions=("rain", "clear", "night"), data_root=str(bdd)
    )
    assert data.condition_ids().tolist() == [1, 2, 0, 2]


@pytest.fixture
def gta(tmp_path):
    for name, value in (("1", 26), ("2", 34)):
        palette = Image.fromarray(np.full((4, 6), value, np.uint8)).convert("P")
        palette.putpalette(list(range(256)) * 3)
        (tmp_path / "labels").mkdir(exist_ok=True)
        palette.save(tmp_path / f"labels/{name}.png")
        for folder in ("images", "gta_fog", "gta_rain"):
            write(tmp_path / folder / f"{name}.png")
    return tmp_path


def test_gta5(gta):
    data = GTA5ConditionDataset(data_root=str(gta), pipeline=[*LOAD, *LABEL, *PACK])
    assert summary(data) == [("1.png", "source", 0), ("2.png", "source", 0)]
    values = [data[row]["data_samples"].gt_sem_seg.data.unique().tolist() for row in range(2)]
    assert values == [[13], [255]], "label id 26, a car, has the training id 13; 34 is ignored"
    assert data[0]["data_samples"].domain == "source"


def test_gta5_with_training_ids_and_with_fewer_classes(gta):
    write_label(gta / "labels/1.png", 13)
    data = GTA5ConditionDataset(data_root=str(gta), label_ids="train", pipeline=[*LOAD, *LABEL, *PACK])
    assert data[0]["data_samples"].gt_sem_seg.data.unique().tolist() == [13]
    write_label(gta / "labels/1.png", 26)
    write_label(gta / "labels/2.png", 7)
    data = GTA5ConditionDataset(
        data_root=str(gta), metainfo=dict(classes=("sky", "car")), pipeline=[*LOAD, *LABEL, *PACK]
    )
    values = [data[row]["data_samples"].gt_sem_seg.data.unique().tolist() for row in range(2)]
    assert values == [[1], [255]]
    with pytest.raises(ValueError, match="'gta' or 'train'"):
        GTA5ConditionDataset(data_root=str(gta), label_ids="ids")


def test_gta5_in_styles(gta):
    data = GTA5ConditionDataset(styles={"rain": "gta_rain", "fog": "gta_fog"}, data_root=str(gta))
    assert data.conditions == ("rain", "fog")
    assert [condition for _, condition, _ in summary(data)] == ["rain", "rain", "fog", "fog"]
    assert [Path(data.get_data_info(row)["img_path"]).parent.name for row in (0, 3)] == ["gta_rain", "gta_fog"]
    assert labels(data) == [gta / "labels/1.png", gta / "labels/2.png"] * 2
    styles = {"rain": "gta_rain", "fog": str(gta / "gta_fog")}
    data = GTA5ConditionDataset(styles=styles, conditions=("fog", "rain"), data_root=str(gta))
    assert data.condition_ids().tolist() == [1, 1, 0, 0]
    with pytest.raises(ValueError, match="a folder of its own"):
        GTA5ConditionDataset(styles={"rain": "gta_rain", "fog": "gta_rain"}, data_root=str(gta))
    with pytest.raises(ValueError, match="there is no folder"):
        GTA5ConditionDataset(styles={"snow": "gta_snow"}, data_root=str(gta))


def test_concat_joins_the_conditions(cityscapes):
    root = str(cityscapes)
    parts = [cls(data_root=root) for cls in (CityscapesConditionDataset, RainCityscapesDataset, FoggyCityscapesDataset)]
    data = ConcatConditionDataset(parts)
    assert data.conditions == data.metainfo["conditions"] == ("clear", "rain", "fog")
    assert data.condition_ids().tolist() == [0, 0, 1, 1, 1, 2, 2]
    assert [data.get_data_info(row)["condition"] for row in (0, 4, -1)] == ["clear", "rain", "fog"]
    assert [part.condition_ids().max() for part in parts] == [0, 0, 0], "the parts stay as they were"
    assert ConcatConditionDataset(parts, conditions=("fog", "snow", "rain", "clear")).condition_ids().tolist() == [
        3, 3, 2, 2, 2, 0, 0,
    ]  # fmt: skip
    nested = ConcatConditionDataset([ConcatConditionDataset(parts[1:]), parts[0]])
    assert nested.condition_ids().tolist() == [0, 0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize("serialize", [True, False])
def test_concat_gives_joint_ids_to_the_pipeline_and_the_loader(cityscapes, serialize):
    seen = []

    def spy(item):
        seen.append(item["cond_id"])
        return item

    options = dict(data_root=str(cityscapes), serialize_data=serialize, pipeline=[spy, *LOAD, *PACK])
    parts = [dict(type="CityscapesConditionDataset", **options), dict(type="alimm.FoggyCityscapesDataset", **options)]
    with DefaultScope.overwrite_default_scope("alimm"):
        data = DATASETS.build(dict(type="ConcatConditionDataset", datasets=parts, lazy_init=True))
    data.full_init()
    assert len(data) == 4
    loaded = list(DataLoader(data, batch_size=2, collate_fn=list))
    assert [item["data_samples"].cond_id for batch in loaded for item in batch] == seen == [0, 0, 1, 1]


def test_concat_names_what_does_not_fit(cityscapes, tree):
    clear = CityscapesConditionDataset(data_root=str(cityscapes))
    with pytest.raises(
        ValueError, match=r"data set 1 \(ConditionSegDataset\) has other classes than the first.*differ"
    ):
        ConcatConditionDataset([clear, build(tree)])
    with pytest.raises(ValueError, match="not among fog: clear"):
        ConcatConditionDataset([clear], conditions=("fog",))
    with pytest.raises(ValueError, match="at least one"):
        ConcatConditionDataset([])
    with pytest.raises(ValueError, match="data set 1, a list, does not know conditions"):
        ConcatConditionDataset([clear, []])


def test_exported_weather_is_such_a_folder(tmp_path):
    weather = SyntheticWeatherDataset(domain="target", num=2, conditions=("night", "fog"), size=(16, 32))
    export_dataset(weather, tmp_path)
    data = ConditionSegDataset(
        data_root=str(tmp_path),
        data_prefix=dict(img_path="img", seg_map_path="labels"),
        img_suffix=".png",
        metainfo={key: weather.metainfo[key] for key in ("classes", "palette")},
        conditions=weather.conditions,
        pipeline=[*LOAD, *LABEL],
    )
    item = data[0]
    assert (item["condition"], item["cond_id"]) == ("fog", 1)
    np.testing.assert_array_equal(item["img"], weather.raw_item(2)["img"])
    np.testing.assert_array_equal(item["gt_seg_map"], weather.raw_item(2)["gt_seg_map"])
    both = ConcatConditionDataset([data, weather])
    assert both.conditions == ("night", "fog")
    assert both.condition_ids().tolist() == [1, 1, 0, 0, 0, 0, 1, 1]
    np.testing.assert_array_equal(both[6]["img"], weather.raw_item(2)["img"])
