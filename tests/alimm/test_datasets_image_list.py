"""ImageList: trees and lists of all three kinds, and every mistake with its place."""

from __future__ import annotations

import json

import numpy as np
import pytest
from mmengine.registry import DATASETS as MMENGINE_DATASETS
from PIL import Image

from alimm.datasets import ImageList, LoadImage, PackInputs


def write_picture(path, value=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((2, 3), value, np.uint8)).save(path)


@pytest.fixture
def root(tmp_path):
    for number, name in enumerate(["b/2.png", "b/1.PNG", "a b/deep/x y.png", "a b/\u6f22.png", "\u5b57/3.png"]):
        write_picture(tmp_path / name, number)
    (tmp_path / "b" / "notes.txt").write_text("no picture")
    write_picture(tmp_path / ".hidden" / "x.png")
    write_picture(tmp_path / "b" / ".cache" / "x.png")
    return tmp_path


def ids(dataset):
    return [dataset.get_data_info(row)["sample_id"] for row in range(len(dataset))]


def labels(dataset):
    return [dataset.get_data_info(row)["gt_label"] for row in range(len(dataset))]


def test_folder_tree(root):
    dataset = ImageList(root, pipeline=[LoadImage(), PackInputs()])
    assert dataset.metainfo["classes"] == ("a b", "b", "\u5b57")
    assert ids(dataset) == ["a b/deep/x y.png", "a b/\u6f22.png", "b/1.PNG", "b/2.png", "\u5b57/3.png"]
    assert labels(dataset) == [0, 0, 1, 1, 2]
    assert dataset.metainfo["class_counts"] == [2, 2, 1]
    packed = dataset[3]
    assert packed["inputs"].unique().tolist() == [0]
    assert packed["data_samples"].gt_label.tolist() == [1]


def test_classes_of_the_train_side_hold_on_the_test_side(root):
    dataset = ImageList(root, classes=["\u5b57", "not here", "b", "a b"])
    assert sorted(set(labels(dataset))) == [0, 2, 3]
    assert dataset.metainfo["class_counts"] == [1, 0, 2, 2]
    (root / "names.txt").write_text("b\n\na b\n\u5b57\n", encoding="utf-8")
    assert ImageList(root, classes=root / "names.txt").metainfo["classes"] == ("b", "a b", "\u5b57")
    assert ImageList(root, metainfo=dict(classes=["b", "a b", "\u5b57"])).metainfo["classes"] == ("b", "a b", "\u5b57")


def test_indices_are_counted_too(root):
    assert ImageList(root, indices=3).metainfo["class_counts"] == [2, 1, 0]


LISTS = {
    "list.txt": "b/2.png 1\n\na b/deep/x y.png   0\r\n\u5b57/3.png\t1\n",
    "list.csv": 'label,img\n1,b/2.png\n\n0,"a b/deep/x y.png"\n1,\u5b57/3.png\n',
    "list.jsonl": "\n".join(
        [
            json.dumps(dict(img="b/2.png", label=1)),
            json.dumps(dict(img="a b/deep/x y.png", label="0")),
            json.dumps(dict(img="\u5b57/3.png", label=1), ensure_ascii=False),
        ]
    ),
}


@pytest.mark.parametrize("bom", [False, True])
@pytest.mark.parametrize("name", LISTS)
def test_lists(root, name, bom):
    (root / name).write_text(LISTS[name], encoding="utf-8-sig" if bom else "utf-8")
    dataset = ImageList(root, ann_file=name)
    assert ids(dataset) == ["b/2.png", "a b/deep/x y.png", "\u5b57/3.png"]
    assert labels(dataset) == [1, 0, 1]
    assert dataset.metainfo["classes"] == ("0", "1")
    lines = [int(dataset.get_data_info(row)["ann_place"].rpartition(":")[2]) for row in range(3)]
    assert lines == ([1, 2, 3] if name == "list.jsonl" else [2, 4, 5] if name == "list.csv" else [1, 3, 4])


def test_names_ids_identities_and_more(root):
    rows = [
        dict(img="b/1.PNG", label="shoe", id="p1", identity=7, price=3.5),
        dict(img="b/2.png", label="bag", id="p2", identity=9, price=None),
    ]
    (root / "x.jsonl").write_text("\n".join(map(json.dumps, rows)))
    dataset = ImageList(root, "x.jsonl")
    assert dataset.metainfo["classes"] == ("bag", "shoe")
    item = dataset.get_data_info(0)
    assert (item["gt_label"], item["gt_identity"], item["sample_id"], item["price"]) == (1, 7, "p1", 3.5)


def test_a_name_wins_over_a_number(root):
    (root / "x.txt").write_text("b/1.PNG 1\nb/2.png 0\n")
    assert labels(ImageList(root, "x.txt", classes=["1", "0"])) == [0, 1]
    (root / "y.txt").write_text("b/1.PNG 1984\nb/2.png dune\n")
    assert ImageList(root, "y.txt").metainfo["classes"] == ("1984", "dune")
    (root / "z.txt").write_text("b/1.PNG\ta b\n")
    assert labels(ImageList(root, "z.txt", classes=["a", "a b"])) == [1]


def test_prefix_and_absolute_paths(root):
    (root / "x.txt").write_text(f"1.PNG 0\n{root / 'a b' / 'deep' / 'x y.png'} 1\n")
    dataset = ImageList(root, "x.txt", data_prefix=dict(img_path="b"))
    assert dataset.get_data_info(0)["img_path"] == str(root / "b" / "1.PNG")
    assert dataset.get_data_info(1)["img_path"] == str(root / "a b" / "deep" / "x y.png")


def test_from_config(root):
    assert len(MMENGINE_DATASETS.build(dict(type="alimm.ImageList", data_root=str(root)))) == 5


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("x.txt", "b/1.PNG 0\nb/2.png\n", r"x\.txt:2: expected a path and a label"),
        ("x.txt", "b/1.PNG 0\nb/9.png 1\n", r"x\.txt:2: there is no picture .*9\.png"),
        ("x.txt", "b/1.PNG 0\n\nb/1.PNG 0\n", r"x\.txt:3: the id 'b/1.PNG' is there already, at .*x\.txt:1"),
        ("x.txt", "b/1.PNG -1\n", r"x\.txt:1: the label '-1' is neither"),
        ("x.txt", "\n", r"x\.txt lists no picture"),
        ("x.txt", b"b/1.PNG 0\nb/\xff.png 0\n", r"x\.txt:2: the line is not UTF-8"),
        ("x.csv", "img,class\nb/1.PNG,0\n", r"x\.csv:1: the first line must name the columns"),
        ("x.csv", "img,label\nb/1.PNG,0,5\n", r"x\.csv:2: expected 2 fields \(img, label\), got 3"),
        ("x.csv", "img,label\nb/1.PNG,\n", r"x\.csv:2: the line has no usable 'label', got ''"),
        ("x.csv", 'img,label\n"b/1.PNG,0\n', r"x\.csv:2: the line is not CSV"),
        ("x.jsonl", '{"img": "b/1.PNG", "label": 0}\n{"img": "b/2.png"', r"x\.jsonl:2: the line is not JSON"),
        ("x.jsonl", "[1, 2]", r"x\.jsonl:1: expected an object"),
        ("x.jsonl", '{"img": "b/1.PNG"}', r"x\.jsonl:1: the line has no usable 'label', got None"),
        ("x.jsonl", '{"img": "b/1.PNG", "label": 0.5}', r"x\.jsonl:1: the line has no usable 'label', got 0.5"),
        ("x.jsonl", '{"img": 3, "label": 0}', r"x\.jsonl:1: 'img' must be a path, got 3"),
        ("x.jsonl", '{"img": "b/1.PNG", "label": 0, "gt_label": 4}', r"x\.jsonl:1: the key 'gt_label' is reserved"),
        ("x.jsonl", '{"img": "b/1.PNG", "label": 0, "identity": "q"}', r"x\.jsonl:1: the identity must be a whole"),
    ],
)
def test_bad_lines_are_named(root, name, text, message):
    (root / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=message):
        ImageList(root, name)


def test_labels_out_of_range_name_the_classes(root):
    (root / "x.txt").write_text("b/1.PNG 0\nb/2.png 2\n")
    with pytest.raises(ValueError, match=r"x\.txt:2: the label '2' is neither .* \(cat, dog\) nor a number of 0 to 1"):
        ImageList(root, "x.txt", classes=["cat", "dog"])
    with pytest.raises(ValueError, match="the label 'a b' is neither"):
        ImageList(root, classes=["b", "\u5b57"])


def test_bad_folders(tmp_path):
    with pytest.raises(ValueError, match="holds no folders"):
        ImageList(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"class folder .*empty holds no picture"):
        ImageList(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no folder .*gone"):
        ImageList(tmp_path / "gone")
    with pytest.raises(FileNotFoundError, match=r"no annotation file .*gone\.txt"):
        ImageList(tmp_path, "gone.txt")
    with pytest.raises(ValueError, match="data_root"):
        ImageList()
    with pytest.raises(ValueError, match="names a class twice: a"):
        ImageList(tmp_path, classes=["a", "b", "a"])


def test_a_damaged_picture_is_named_with_its_line(root):
    (root / "x.txt").write_text("b/1.PNG 0\nb/2.png 0\n")
    (root / "b" / "2.png").write_bytes(b"not a picture")
    dataset = ImageList(root, "x.txt", pipeline=[LoadImage()])
    with pytest.raises(ValueError, match=r"2\.png cannot be read.*x\.txt:2"):
        dataset[1]
    with pytest.raises(ValueError, match="there is no picture"):
        ImageList(root, "x.txt", data_prefix=dict(img_path="b"))
    assert len(ImageList(root, "x.txt", data_prefix=dict(img_path="b"), check_files=False)) == 2
