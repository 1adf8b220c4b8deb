from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pytest

from alimm.apis.config import load_config
from alimm.datasets.emoji_scenes import CLASSES, SPLIT_VENDORS, bounding_box, paste
from alimm.datasets.prepare_emoji_coco import draw_scene, main, prepare
from alimm.paths import resource_root


def content_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("coco") / "set"
    assert prepare(folder, count=6, size=96, seed=3)
    return folder


def slow_box(mask: np.ndarray) -> list[int]:
    """Pixel by pixel: [left, top, width, height]."""
    inside = [(x, y) for y in range(mask.shape[0]) for x in range(mask.shape[1]) if mask[y, x]]
    xs, ys = [x for x, _ in inside], [y for _, y in inside]
    return [min(xs), min(ys), max(xs) - min(xs) + 1, max(ys) - min(ys) + 1]


@pytest.mark.parametrize("split", ["train", "val"])
def test_boxes_are_tight_around_what_can_be_seen(made: Path, split: str) -> None:
    content = json.loads((made / f"{split}.json").read_text())
    assert [category["name"] for category in content["categories"]] == list(CLASSES)
    assert len({entry["id"] for entry in content["annotations"]}) == len(content["annotations"])
    for image in content["images"]:
        scene = draw_scene(split, image["id"], 96, 3)
        stored = cv2.imread(str(made / split / image["file_name"]))[..., ::-1]
        assert np.abs(stored - np.clip(scene.picture, 0, 255)).max() <= 0.5
        boxes = [entry for entry in content["annotations"] if entry["image_id"] == image["id"]]
        assert [entry["category_id"] - 1 for entry in boxes] == scene.labels
        for product, entry in enumerate(boxes):
            assert entry["bbox"] == slow_box(scene.owner == product)
            assert entry["area"] == (scene.owner == product).sum()


def test_the_configs_name_the_classes_of_the_set() -> None:
    # CocoDataset leaves out categories that the config does not name, without a word.
    assert load_config("alimm::int8_training/retinanet_r18_emoji_coco.py").classes == CLASSES


def test_the_mask_is_where_the_picture_changed() -> None:
    drawing = np.zeros((3, 4, 4), np.float32)
    drawing[1, 1:3] = (200, 100, 0, 255)
    drawing[0, 0] = (20, 20, 20, 127)  # less than half opaque
    picture = np.full((10, 12, 3), 50, np.float32)
    mask = paste(picture, drawing, top=5, left=7)
    assert bounding_box(mask) == (8, 6, 2, 1)
    np.testing.assert_array_equal(picture[mask], [[200, 100, 0]] * 2)
    np.testing.assert_allclose(picture[5, 7], 50 * (1 - 127 / 255) + 20, rtol=1e-6)
    assert (picture != 50).any(2).sum() == 3


def test_products_stay_visible_and_the_splits_share_no_drawing() -> None:
    train, val = ([draw_scene(split, index) for index in range(24)] for split in SPLIT_VENDORS)
    assert len({tuple(scene.rows) for scene in train}) > 20
    assert {label for scene in train for label in scene.labels} == set(range(len(CLASSES)))
    assert not {row for scene in train for row in scene.rows} & {row for scene in val for row in scene.rows}
    shares = []
    for scene in train + val:
        assert 1 <= len(scene.labels) <= 5
        for product, whole in enumerate(scene.whole):
            shares.append((scene.owner == product).sum() / whole)
    assert min(shares) >= 0.75
    assert max(shares) == 1
    assert any(share < 1 for share in shares), "products do overlap"


def test_same_seed_same_bytes(made: Path, tmp_path: Path) -> None:
    prepare(tmp_path / "again", 6, 96, 3)
    assert content_of(tmp_path / "again") == content_of(made)
    prepare(tmp_path / "other", 6, 96, 4)
    assert (tmp_path / "other" / "train.json").read_bytes() != (made / "train.json").read_bytes()


def test_second_run_does_nothing_and_other_options_replace(tmp_path: Path) -> None:
    out = tmp_path / "set"
    assert prepare(out, 2, 64)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert not prepare(out, 2, 64)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    assert prepare(out, 1, 64)
    assert sorted(path.name for path in out.rglob("*.png")) == ["00000.png"] * 2


def test_a_run_that_fails_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "set"
    prepare(out, 1, 64)
    before = content_of(out)

    def full(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("alimm.datasets.prepare_emoji_coco.write_picture", full)
    with pytest.raises(OSError, match="no space"):
        prepare(out, 2, 64)
    assert content_of(tmp_path) == {f"set/{name}": data for name, data in before.items()}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--count", "0"], "count must be 1 to 100000, got 0: give such a number with --count"),
        (["--size", "8"], "size must be 64 to 1024, got 8: give such a number with --size"),
        (["--seed", "-1"], "seed must be 0 to 2147483647, got -1: give such a number with --seed"),
    ],
)
def test_bad_options(tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str) -> None:
    assert main(["--out", str(tmp_path / "set"), *options]) == 1
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_folder_with_other_files_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(ValueError, match=r"holds other files.*--out"):
        prepare(tmp_path, 1, 64)
    assert (tmp_path / "mine.txt").read_text() == "precious"


def test_default_folder_and_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALIMM_DATA", str(tmp_path))
    assert main(["--count", "1", "--size", "64"]) == 0
    assert (tmp_path / "emoji_coco" / "train" / "00000.png").is_file()
    script = resource_root() / "tools" / "data" / "prepare_emoji_coco.py"
    assert "prepare_emoji_coco import main" in script.read_text()
