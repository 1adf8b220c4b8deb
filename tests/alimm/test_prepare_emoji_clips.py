from __future__ import annotations

from collections import Counter
from itertools import product
from pathlib import Path

import cv2
import numpy as np
import pytest

from alimm.datasets.emoji_scenes import CLASSES
from alimm.datasets.prepare_emoji_clips import MOTIONS, draw_clip, labels_of, main, path_of, prepare
from alimm.paths import resource_root


def content_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clips") / "set"
    assert prepare(folder, count=6, frames=4, size=48, seed=3)
    return folder


def changed(first: np.ndarray, second: np.ndarray) -> tuple[np.ndarray, float]:
    """Centre (x, y) and spread of the pixels in which two frames differ: where the product is in either."""
    ys, xs = np.nonzero(np.abs(first - second).max(2) > 8)
    return np.array([xs.mean(), ys.mean()]), float(np.hypot(xs.std(), ys.std()))


def test_the_product_moves_as_the_label_says() -> None:
    for index in range(36):
        frames = draw_clip("train", index, frames=8, size=64)
        (start, small), (end, large) = changed(*frames[:2]), changed(*frames[-2:])
        x, y = end - start
        name = MOTIONS[labels_of(index)[0]]
        if name in ("left", "right"):
            assert x * (1 if name == "right" else -1) > 10 > abs(y), (index, name)
        elif name in ("up", "down"):
            assert y * (1 if name == "down" else -1) > 10 > abs(x), (index, name)
        else:
            assert np.hypot(x, y) < 10, (index, name)
            ratio = large / small
            assert (ratio if name == "grow" else 1 / ratio) > 1.3, (index, name)


def test_a_motion_played_backwards_is_the_other_of_its_pair() -> None:
    for one, other in ((0, 1), (2, 3), (4, 5)):
        paths = [path_of(motion, np.random.default_rng(5), 8) for motion in (one, other)]
        np.testing.assert_array_equal(paths[0], paths[1][::-1])
        assert np.ptp(paths[0], axis=0).max() > 0.3
    sides = {MOTIONS[motion]: path_of(motion, np.random.default_rng(5), 8)[:, 2] for motion in range(6)}
    assert (np.diff(sides["grow"]) > 0).all()
    assert (np.diff(sides["shrink"]) < 0).all()
    assert np.ptp(sides["left"]) == 0


def test_motion_and_product_are_crossed() -> None:
    pairs = Counter(labels_of(index) for index in range(36))
    assert pairs == Counter(product(range(6), repeat=2))
    assert len(MOTIONS) == len(CLASSES) == 6


def test_lists_name_the_frames(made: Path) -> None:
    for split in ("train", "val"):
        for number, kind in enumerate(("motion", "product")):
            lines = [line.split() for line in (made / f"{split}_{kind}.txt").read_text().splitlines()]
            assert [int(label) for _, _, label in lines] == [labels_of(index)[number] for index in range(6)]
            for folder, frames, _ in lines:
                names = sorted(path.name for path in (made / folder).iterdir())
                assert names == [f"img_{frame:05d}.jpg" for frame in range(1, int(frames) + 1)]
    first = {split: [draw_clip(split, index, 2, 48, 3)[0] for index in (0, 36)] for split in ("train", "val")}
    assert len({frame.tobytes() for frames in first.values() for frame in frames}) == 4, "each clip is drawn anew"
    stored = cv2.imread(str(made / "val" / "00002" / "img_00003.jpg"))[..., ::-1].astype(float)
    assert stored.shape == (48, 48, 3)
    drawn = np.clip(draw_clip("val", 2, 4, 48, 3)[2], 0, 255)
    assert np.abs(stored - drawn).mean() < 8, "JPEG changes pixels a little"


def test_same_seed_same_bytes_and_a_second_run_does_nothing(made: Path, tmp_path: Path) -> None:
    out = tmp_path / "set"
    assert prepare(out, 6, 4, 48, 3)
    assert content_of(out) == content_of(made)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert not prepare(out, 6, 4, 48, 3)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    assert prepare(out, 6, 4, 48, 4)
    assert content_of(out) != content_of(made)


def test_a_run_that_fails_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "set"
    prepare(out, 1, 2, 32)
    before = content_of(out)

    def full(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("alimm.datasets.prepare_emoji_clips.write_picture", full)
    with pytest.raises(OSError, match="no space"):
        prepare(out, 2, 2, 32)
    assert content_of(tmp_path) == {f"set/{name}": data for name, data in before.items()}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--count", "0"], "count must be 1 to 100000, got 0: give such a number with --count"),
        (["--frames", "1"], "frames must be 2 to 1000, got 1: give such a number with --frames"),
        (["--size", "8"], "size must be 32 to 512, got 8: give such a number with --size"),
        (["--seed", "-1"], "seed must be 0 to 2147483647, got -1: give such a number with --seed"),
    ],
)
def test_bad_options(tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str) -> None:
    assert main(["--out", str(tmp_path / "set"), *options]) == 1
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_default_folder_and_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALIMM_DATA", str(tmp_path))
    assert main(["--count", "1", "--frames", "2", "--size", "32"]) == 0
    assert (tmp_path / "emoji_clips" / "train" / "00000" / "img_00002.jpg").is_file()
    script = resource_root() / "tools" / "data" / "prepare_emoji_clips.py"
    assert "prepare_emoji_clips import main" in script.read_text()
