"""The condition of a picture from its folder, its name or a list; and packing it."""

import json

import numpy as np
import pytest

pytest.importorskip("mmseg")

from alimm.projects.dcaa.conditions import resolve_conditions
from alimm.projects.dcaa.packing import META_KEYS, PackConditionInputs

PATHS = ["/data/fog/train/a.png", "/data/night/train/b.png", "/data/fog/train/c_d.png"]


@pytest.mark.parametrize(
    ("level", "root", "expected"),
    [
        (0, "/data", ["fog", "night", "fog"]),
        (-3, "/data", ["fog", "night", "fog"]),
        (-3, "", ["fog", "night", "fog"]),
        (1, "/data", ["train"] * 3),
        (-2, "/data", ["train"] * 3),
    ],
)
def test_folder(level, root, expected):
    names, conditions = resolve_conditions(PATHS, {"type": "folder", "level": level}, root=root)
    assert names == expected
    assert conditions == tuple(sorted(set(expected)))


def test_folder_ends_at_the_root():
    with pytest.raises(ValueError, match=r"no condition for 3 of 3 pictures: /data/fog/train/a\.png.*Set level"):
        resolve_conditions(PATHS, {"type": "folder", "level": -4}, root="/data")
    with pytest.raises(ValueError, match="no condition"):
        resolve_conditions(["/data/a.png"], {"type": "folder", "level": 0}, root="/data")
    with pytest.raises(ValueError, match="level must be"):
        resolve_conditions(PATHS, {"type": "folder", "level": -1})


def test_regex_sees_only_what_is_below_the_root():
    paths = ["/rain/x_fog_1.png", "/rain/x_night_2.png"]
    rule = {"type": "regex", "pattern": "(?P<condition>fog|night|rain)"}
    assert resolve_conditions(paths, rule, root="/rain") == (["fog", "night"], ("fog", "night"))
    assert resolve_conditions(paths, rule)[0] == ["rain", "rain"]
    with pytest.raises(ValueError, match="group named condition"):
        resolve_conditions(paths, {"type": "regex", "pattern": "(fog)"})
    with pytest.raises(ValueError, match="no regular expression"):
        resolve_conditions(paths, {"type": "regex", "pattern": "(fog"})
    with pytest.raises(ValueError, match=r"1 of 2 pictures: /rain/x_night_2\.png.*Mend the pattern"):
        resolve_conditions(paths, {"type": "regex", "pattern": "(?P<condition>fog)"}, root="/rain")


def test_ids_follow_the_given_names_and_unicode_names_are_names():
    mist, snow = "n\u00e9voa", "\u96ea"
    paths = [f"/d/{mist}/1.png", f"/d/{snow}/2.png"]
    assert resolve_conditions(paths, {"type": "folder"}, [snow, mist]) == ([mist, snow], (snow, mist))


def test_unknown_unused_and_renamed():
    rule = {"type": "folder", "level": 0}
    with pytest.raises(ValueError, match=r"1 of 3 pictures have a condition that is not among fog.*'night'.*rename"):
        resolve_conditions(PATHS, rule, ["fog"], "/data")
    assert resolve_conditions(PATHS, rule | {"unknown": "skip"}, ["fog"], "/data")[0] == ["fog", None, "fog"]
    with pytest.raises(ValueError, match=r"no picture has the condition snow.*unused='allow'"):
        resolve_conditions(PATHS, rule, ["fog", "snow", "night"], "/data")
    names, conditions = resolve_conditions(PATHS, rule | {"unused": "allow"}, ["fog", "snow", "night"], "/data")
    assert (names, conditions) == (["fog", "night", "fog"], ("fog", "snow", "night"))
    renamed = resolve_conditions(PATHS, rule | {"rename": {"fog": "mist"}}, root="/data")
    assert renamed == (["mist", "night", "mist"], ("mist", "night"))


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({"type": "colour"}, "type must be one of"),
        ({"type": "folder", "depth": 1}, "does not know depth"),
        ({"type": "regex"}, "needs 'pattern'"),
        ({"type": "folder", "unknown": "drop"}, "unknown must be one of"),
        ({"type": "list"}, "either file or mapping"),
        ({"type": "list", "file": "/nowhere.csv"}, "there is no file"),
        ({"type": "constant", "condition": ""}, "different names"),
    ],
)
def test_wrong_rules(rule, message):
    with pytest.raises(ValueError, match=message):
        resolve_conditions(PATHS, rule)


@pytest.mark.parametrize("conditions", ["fog", [], ["fog", "fog"], ["fog", ""]])
def test_wrong_names(conditions):
    with pytest.raises(ValueError, match="conditions must be"):
        resolve_conditions(PATHS, {"type": "constant", "condition": "fog"}, conditions)


TABLE = {"fog/train/a.png": "fog", "b": "night", "c_d.png": "white snow"}


@pytest.mark.parametrize("suffix", ["csv", "json", "txt"])
def test_list_by_path_name_or_stem(tmp_path, suffix):
    table = {key: name.split()[-1] for key, name in TABLE.items()} if suffix == "txt" else TABLE
    text = {
        "csv": "path,condition\n" + "".join(f"{key},{name}\n" for key, name in table.items()),
        "json": json.dumps(table),
        "txt": "".join(f"{key} {name}\n" for key, name in table.items()) + "\n",
    }[suffix]
    file = tmp_path / f"list.{suffix}"
    file.write_text(text)
    names, _ = resolve_conditions(PATHS, {"type": "list", "file": str(file)}, root="/data")
    assert names == list(table.values())


def test_a_full_path_beats_a_stem():
    mapping = {"a": "fog", "night/a": "night"}
    rule = {"type": "list", "mapping": mapping}
    assert resolve_conditions(["/r/fog/a.png", "/r/night/a.png"], rule, root="/r")[0] == ["fog", "night"]


def test_wrong_lists(tmp_path):
    file = tmp_path / "list.csv"
    file.write_text("a,fog\nb,night\na,rain\n")
    with pytest.raises(ValueError, match="gives a two conditions: 'fog' and 'rain'"):
        resolve_conditions(PATHS, {"type": "list", "file": str(file)})
    file.write_text("a,fog\nb\n")
    with pytest.raises(ValueError, match="line 2: expected path and condition"):
        resolve_conditions(PATHS, {"type": "list", "file": str(file)})
    rule = {"type": "list", "mapping": {"a": "fog", "b": "undefined"}}
    with pytest.raises(ValueError, match=r"2 of 3 pictures: /data/night/train/b\.png.*Add them to the list"):
        resolve_conditions(PATHS, rule)
    assert resolve_conditions(PATHS, rule | {"unknown": "skip"}) == (["fog", None, None], ("fog",))


def test_packing_keeps_the_condition():
    image = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
    item = {"img": image, "cond_id": 2, "condition": "fog", "domain": "target", "img_path": "a.png", "other": 1}
    packed = PackConditionInputs()(item)
    assert packed["inputs"].shape == (3, 2, 4)
    assert packed["inputs"][1, 1, 3] == image[1, 3, 1]
    meta = packed["data_samples"].metainfo
    assert meta == {"cond_id": 2, "condition": "fog", "domain": "target", "img_path": "a.png"}
    assert "gt_sem_seg" not in packed["data_samples"]


def test_packing_packs_what_mmseg_packs():
    import inspect

    from mmseg.datasets.transforms import PackSegInputs

    theirs = inspect.signature(PackSegInputs.__init__).parameters["meta_keys"].default
    assert (*theirs, "domain", "condition", "cond_id") == META_KEYS


def test_packing_asks_for_a_condition():
    with pytest.raises(ValueError, match=r"no 'cond_id' in the item of a\.png: use a data set that knows conditions"):
        PackConditionInputs()({"img": np.zeros((2, 2, 3), np.uint8), "img_path": "a.png"})
    with pytest.raises(ValueError, match="must contain 'cond_id'"):
        PackConditionInputs(meta_keys=("img_path",))
    with pytest.raises(ValueError, match="list of names"):
        PackConditionInputs(meta_keys="cond_id")
