"""Composite set: masks, conditions, the split and the prepare tool, on packages made here; the real ones are slow."""

from __future__ import annotations

import hashlib
import io
import json
import re
import subprocess
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from alimm.datasets.fetch import DebianPackage, FetchError
from alimm.projects.dcaa import composites, composites_packages, composites_sources
from alimm.projects.dcaa.composites import CLASSES, METAINFO, PALETTE, main, prepare
from alimm.projects.dcaa.composites_packages import class_of, fetch_tree, listing_of
from alimm.projects.dcaa.composites_render import (
    CONDITIONS,
    compose_scene,
    composite_condition,
    drawn_ground,
    photo_ground,
)
from alimm.projects.dcaa.composites_sources import (
    CutOut,
    decode_cut_out,
    merge_alike,
    read_cut_outs,
    split_groups,
    split_material,
)

FOLDER = {
    "source": {"animal": "animals", "food": "food", "household": "tools", "plant": "plants"},
    "target": {"animal": "animals/birds", "food": "food/fruit", "household": "household", "plant": "plants"},
}
SMALL = dict(source_count=3, target_count=2, val_count=2, height=32, width=40)


def png(colour: tuple[int, ...], size: tuple[int, int] = (40, 48), box: tuple[int, ...] = (4, 6, 33, 41)) -> bytes:
    """A filled ellipse on a transparent ground."""
    image = Image.new("RGBA", size, (9, 9, 9, 0))
    ImageDraw.Draw(image).ellipse(box, fill=(*colour, 255))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def pictures(domain: str, count: int = 4) -> dict[str, bytes]:
    """``count`` cut-outs of each class, of colours that tell them apart, and some that must be left out."""
    files = {}
    for row, folder in enumerate(FOLDER[domain].values()):
        for number in range(count):
            name = f"{folder}/{'abcdefgh'[number]}_shape.png"
            files[name] = png((60 * row + 20, 28 * number + 20, 100 if domain == "source" else 200))
    return files


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder as two unpacked packages would leave it, with the digests that belong to it."""
    root = tmp_path / "packages"
    bundles = {}
    for domain, bundle in composites_packages.PACKAGES.items():
        files = pictures(domain)
        for name, data in files.items():
            path = root / bundle.folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        bundles[domain] = replace(bundle, listing=listing_of(files))
    photographs = {}
    for number in range(4):
        buffer = io.BytesIO()
        Image.new("RGB", (90, 60), (50 * number, 90, 10)).save(buffer, "PNG")
        name = f"usr/share/tuxpaint/templates/{number}.jpg"
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(buffer.getvalue())
        photographs[name] = hashlib.sha256(buffer.getvalue()).hexdigest()
    templates = DebianPackage("tuxpaint-data", "1", "0", photographs)
    for module in (composites, composites_packages, composites_sources):
        monkeypatch.setattr(module, "PACKAGES", bundles)
    monkeypatch.setattr(composites_sources, "TEMPLATES", templates)
    monkeypatch.setattr(composites_sources, "skimage_photographs", list)
    monkeypatch.setattr(composites, "LEAST", 2)
    return root


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --- scenes


class Fixed:
    """Stands in for a generator: gives out the numbers it was made with."""

    def __init__(self, *numbers: float) -> None:
        self.numbers = list(numbers)

    def _next(self, *_: object) -> float:
        return self.numbers.pop(0)

    uniform = integers = random = _next


def test_the_scene_equals_one_made_pixel_by_pixel() -> None:
    generator = np.random.default_rng(3)
    ground = generator.uniform(0, 255, (12, 16, 3)).astype(np.float32)
    drawings = []
    for label in (3, 1, 2):
        alpha = generator.integers(0, 256, (6, 4)).astype(np.uint8)
        colour = (generator.integers(0, 256, (6, 4, 3)) * (alpha[..., None] / 255)).astype(np.uint8)
        drawings.append((np.dstack([colour, alpha]), label))
    # Scale 1 (six of twelve pixels), mirrored or not, the middle's row and column: two hang over the rim.
    places = [(0.5, 0.9, 1, 2), (0.5, 0.1, 11, 15), (0.5, 0.9, 3, 3)]
    picture, labels = compose_scene(ground, drawings, Fixed(*sum(places, ())), (0.5, 0.5))  # type: ignore[arg-type]
    expected, owner = ground.astype(np.float64), np.zeros((12, 16), int)
    for (drawing, label), (_, mirror, row, column) in zip(drawings, places, strict=True):
        for i in range(6):
            for j in range(4):
                y, x = row - 3 + i, column - 2 + j
                if 0 <= y < 12 and 0 <= x < 16:
                    *colour, alpha = drawing[i, 3 - j if mirror < 0.5 else j].tolist()
                    expected[y, x] = expected[y, x] * (1 - alpha / 255) + np.array(colour)
                    if alpha > 127:
                        owner[y, x] = label
    assert set(np.unique(owner)) == {0, 1, 2, 3}
    np.testing.assert_array_equal(labels, owner)
    np.testing.assert_allclose(picture, np.clip(expected, 0, 255), atol=0.51)


def test_later_cut_outs_hide_earlier_ones() -> None:
    ground = np.zeros((20, 20, 3), np.float32)
    full = [(np.full((8, 8, 4), 255, np.uint8), label) for label in (1, 2)]
    numbers = (0.4, 0.9, 10, 10) * 2
    _, labels = compose_scene(ground, full, Fixed(*numbers), (0.4, 0.4))  # type: ignore[arg-type]
    assert np.unique(labels).tolist() == [0, 2]
    assert np.count_nonzero(labels) == 64


def test_a_scene_keeps_its_ground_and_follows_its_seed() -> None:
    ground = np.full((24, 30, 3), 7, np.float32)
    drawing = decode_cut_out(png((250, 0, 0)), "a.png", 20)
    assert drawing is not None
    scenes = [compose_scene(ground, [(drawing.drawing, 4)], np.random.default_rng(seed)) for seed in (1, 1, 2)]
    assert (ground == 7).all()
    np.testing.assert_array_equal(scenes[0][0], scenes[1][0])
    assert (scenes[0][0] != scenes[2][0]).any()


@pytest.mark.parametrize("seed", range(12))
def test_grounds_have_the_shape_and_range(seed: int) -> None:
    generator = np.random.default_rng(seed)
    photograph = generator.integers(0, 256, (31, 50, 3)).astype(np.uint8)
    for ground in (drawn_ground(generator, 12, 20), photo_ground(photograph, generator, 12, 20)):
        assert ground.shape == (12, 20, 3)
        assert ground.dtype == np.float32
        assert ground.min() >= 0
        assert ground.max() <= 255


# --- conditions


def test_each_condition_does_what_its_name_says() -> None:
    picture = np.random.default_rng(0).integers(30, 220, (60, 80, 3)).astype(np.uint8)

    def shown(condition: str, seed: int = 0) -> np.ndarray:
        return composite_condition(picture, condition, np.random.default_rng(seed))

    def detail(x: np.ndarray) -> float:
        return float(np.abs(np.diff(x.astype(float), axis=1)).mean())

    np.testing.assert_array_equal(shown("plain"), picture)
    for seed in range(5):
        dark, haze, rain = (shown(condition, seed) for condition in ("dark", "haze", "rain"))
        assert dark.mean() < 0.6 * picture.mean()
        assert haze.mean() > picture.mean() + 20
        assert detail(haze[:15]) < 0.7 * detail(haze[-15:]), "the haze is denser at the top"
        assert detail(rain) < 0.6 * detail(picture)
        for result in (dark, haze, rain):
            assert result.shape == picture.shape
            assert result.dtype == np.uint8
    assert (shown("rain", 0) != shown("rain", 1)).any()


def test_haze_is_a_mixture_with_one_airlight_a_row() -> None:
    rows = [np.full((10, 6, 3), value, np.uint8) for value in (0, 200)]
    black, grey = (composite_condition(row, "haze", np.random.default_rng(4)).astype(float) for row in rows)
    share = 1 - (grey - black) / 200
    assert np.ptp(share, axis=(1, 2)).max() < 0.011, "the same for all columns and colours, up to rounding"
    np.testing.assert_allclose(np.diff(share.mean((1, 2)), 2), 0, atol=0.02)
    assert 0.64 < share[0].mean() < 0.86
    assert 0.29 < share[-1].mean() < 0.51


def test_rain_shows_bright_streaks() -> None:
    black = np.zeros((60, 80, 3), np.uint8)
    rain = composite_condition(black, "rain", np.random.default_rng(0))
    assert 0.02 < (rain > 25).mean() < 0.5
    assert rain.max() < 216


def test_an_unknown_condition_is_named() -> None:
    with pytest.raises(ValueError, match="plain, dark, haze, rain, got 'snow'"):
        composite_condition(np.zeros((4, 4, 3), np.uint8), "snow", np.random.default_rng(0))


# --- packages and cut-outs


@pytest.mark.parametrize(
    ("domain", "name", "label"),
    [
        ("target", "animals/birds/owl.png", "animal"),
        ("target", "animals/birds/cartoon/owl.png", None),
        ("target", "vehicles/construction/dumper_mirror.png", None),
        ("target", "vehicles/construction/dumper.png", "vehicle"),
        ("target", "symbols/math/1.png", None),
        ("target", "animals/birds/owl.txt", None),
        ("target", "animalsx/owl.png", None),
        ("source", "buildings/furniture/table.png", "household"),
        ("source", "buildings/church.png", "building"),
        ("source", "tools/weapons/gun.png", None),
        ("source", "recreation/music/harp.png", "household"),
        ("source", "recreation/music/treble_clef.png", None),
    ],
)
def test_folders_map_to_classes(domain: str, name: str, label: str | None) -> None:
    assert class_of(domain, name) == label


def test_constants_fit_together() -> None:
    assert len(CLASSES) == len(PALETTE) == len(METAINFO["palette"])
    assert METAINFO["classes"] == CLASSES
    assert set(CLASSES[1:]) <= set(composites_packages.FOLDERS)
    assert len(CONDITIONS) == 4


def test_a_cut_out_loses_its_margin_and_unseen_colours() -> None:
    cut_out = decode_cut_out(png((200, 100, 50)), "animals/owl-2.png", 36)
    assert cut_out is not None
    assert cut_out.drawing.shape == (36, 30, 4)
    assert cut_out.group == "animals/owl"
    assert cut_out.drawing[18, 15].tolist() == [200, 100, 50, 255]
    assert cut_out.drawing[0, 0].tolist() == [0, 0, 0, 0]
    halved = decode_cut_out(png((200, 100, 50)), "a.png", 18)
    assert halved is not None
    assert halved.drawing.shape == (18, 15, 4)


def _flat(alpha: int, size: tuple[int, int] = (40, 40)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGBA", size, (1, 2, 3, alpha)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(_flat(255), id="a whole rectangle"),
        pytest.param(_flat(0), id="nothing"),
        pytest.param(png((1, 2, 3), box=(0, 0, 20, 20)), id="tiny"),
        pytest.param(b"no picture", id="no picture"),
        pytest.param(png((1, 2, 3))[:100], id="cut off"),
    ],
)
def test_files_that_make_no_cut_out(data: bytes) -> None:
    assert decode_cut_out(data, "a.png", 36) is None


def test_a_huge_picture_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(composites_sources, "MAX_PIXELS", 40 * 48 - 1)
    assert decode_cut_out(png((1, 2, 3)), "a.png", 36) is None


def test_equal_pictures_count_once(packages: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = composites_packages.PACKAGES["target"]
    extra = packages / bundle.folder / "animals/birds/z_copy.png"
    extra.write_bytes(png((20, 20, 200)))
    files = {**pictures("target"), "animals/birds/z_copy.png": extra.read_bytes()}
    monkeypatch.setitem(composites_packages.PACKAGES, "target", replace(bundle, listing=listing_of(files)))
    found = read_cut_outs("target", 24, packages)
    assert [len(found[label]) for label in CLASSES[1:]] == [4, 4, 4, 4]
    assert all(re.match(r"animals/birds/[a-d]_", cut_out.name) for cut_out in found["animal"])


def test_changed_files_are_refused(packages: Path) -> None:
    bundle = composites_packages.PACKAGES["source"]
    (packages / bundle.folder / "animals/a_shape.png").write_bytes(png((1, 1, 1)))
    with pytest.raises(ValueError, match=r"does not hold the pictures of openclipart-png.*expected the digest.*--from"):
        fetch_tree(bundle, lambda name: True, packages)


def test_an_empty_folder_and_a_missing_one_are_named(tmp_path: Path) -> None:
    bundle = composites_packages.PACKAGES["source"]
    with pytest.raises(FetchError, match=r"holds neither a package openclipart-png_\*\.deb nor a folder usr/share"):
        fetch_tree(bundle, lambda name: True, tmp_path)
    with pytest.raises(FetchError, match="there is no such file or folder"):
        fetch_tree(bundle, lambda name: True, tmp_path / "none")


def _deb(path: Path, folder: str, files: dict[str, bytes]) -> None:
    body = io.BytesIO()
    with tarfile.open(fileobj=body, mode="w:xz") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(f"./{folder}/{name}")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    data = body.getvalue()
    header = f"{'data.tar.xz':<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{len(data):<10}`\n".encode()
    path.write_bytes(b"!<arch>\n" + header + data)


def test_a_package_file_gives_the_same_as_its_folder(packages: Path, tmp_path: Path) -> None:
    bundle = composites_packages.PACKAGES["target"]
    deb = tmp_path / "tuxpaint-stamps-default_1_all.deb"
    _deb(deb, bundle.folder, {**pictures("target"), "animals/birds/sound.ogg": b"-", "symbols/x.png": b"-"})

    def chosen(name: str) -> bool:
        return class_of("target", name) is not None

    assert fetch_tree(bundle, chosen, deb) == fetch_tree(bundle, chosen, packages) == pictures("target")
    deb.write_bytes(deb.read_bytes()[:-300])
    with pytest.raises(ValueError, match=r"cannot be read as a Debian package: it is cut off\. Fetch it again"):
        fetch_tree(bundle, chosen, tmp_path)


# --- the split


def _cut_out(group: str, value: int) -> CutOut:
    return CutOut(np.full((20, 16, 4), value, np.uint8), group, group)


def test_groups_stay_together_and_a_quarter_goes_to_val() -> None:
    groups = [f"g{number // 3}" for number in range(60)]
    is_val = split_groups(groups, 0, "x")
    assert 12 <= is_val.sum() <= 15
    for group in set(groups):
        assert len({bool(val) for name, val in zip(groups, is_val, strict=True) if name == group}) == 1
    np.testing.assert_array_equal(is_val, split_groups(groups, 0, "x"))
    assert (is_val != split_groups(groups, 1, "x")).any()


def test_pictures_that_look_alike_share_a_group() -> None:
    slope = np.linspace(0, 255, 16).astype(np.uint8)
    drawing = np.broadcast_to(slope[None, :, None], (20, 16, 4)).copy()
    members = [
        CutOut(drawing, "a", "a"),
        CutOut(drawing[:, ::-1], "mirrored", "mirrored"),
        CutOut(np.minimum(drawing, 253), "close", "close"),
        CutOut(drawing.transpose(1, 0, 2), "turned", "turned"),
        _cut_out("flat", 128),
    ]
    groups = merge_alike(members)
    assert groups[0] == groups[1] == groups[2]
    assert len({groups[0], groups[3], groups[4]}) == 3


def test_nothing_is_on_both_sides() -> None:
    cut_outs = {"animal": [_cut_out(f"g{number // 2}", 10 * number) for number in range(20)]}
    photographs = [np.full((4, 4, 3), number, np.uint8) for number in range(8)]
    sides = split_material("target", cut_outs, photographs, ["animal"], 0)
    train, val = ({member.group for member in sides[split].cut_outs["animal"]} for split in ("train", "val"))
    assert train
    assert val
    assert not train & val
    shown = [{int(picture[0, 0, 0]) for picture in sides[split].photographs} for split in ("train", "val")]
    assert not shown[0] & shown[1]
    assert shown[0] | shown[1] == set(range(8))
    assert len(shown[1]) == 2


# --- the tool


def test_the_tree_is_whole_and_follows_the_seed(packages: Path, tmp_path: Path) -> None:
    outs = [tmp_path / name for name in ("a", "b", "c")]
    for out, seed in zip(outs, (0, 0, 1), strict=True):
        assert prepare(out, **SMALL, seed=seed, packages=packages)  # type: ignore[arg-type]
    first, second, third = map(contents, outs)
    assert first == second
    assert first["source/train/img/00000.png"] != third["source/train/img/00000.png"]
    expected = {"README.md", "recipe.json"}
    for kind in ("img", "labels"):
        expected |= {f"source/train/{kind}/{i:05d}.png" for i in range(3)}
        expected |= {f"source/val/{kind}/{i:05d}.png" for i in range(2)}
        expected |= {
            f"target/{s}/{kind}/{c}/{i:05d}.png" for s in ("train", "val") for c in CONDITIONS for i in range(2)
        }
    assert set(first) == expected
    for name, data in first.items():
        if name.endswith(".png"):
            pixels = np.asarray(Image.open(io.BytesIO(data)))
            assert pixels.shape == ((32, 40) if "labels" in name else (32, 40, 3))
            assert "labels" not in name or pixels.max() < len(CLASSES)
    card = first["README.md"].decode()
    assert "| animal | 4 | 4 | 3 / 1 | 3 / 1 |" in card
    assert "| vehicle | 0 | 0 | left out | left out |" in card
    assert "public domain" in card
    assert "GPL-2" in card
    assert json.loads(first["recipe.json"])["seed"] == 0


def test_val_scenes_are_equal_in_all_conditions_and_train_scenes_are_not(packages: Path, tmp_path: Path) -> None:
    prepare(tmp_path / "a", **SMALL, packages=packages)  # type: ignore[arg-type]
    files = contents(tmp_path / "a")
    for split, distinct in (("val", 1), ("train", 4)):
        assert len({files[f"target/{split}/labels/{c}/00000.png"] for c in CONDITIONS}) == distinct
        assert len({files[f"target/{split}/img/{c}/00000.png"] for c in CONDITIONS}) == 4


def test_pictures_show_the_colours_of_their_classes_and_split(packages: Path, tmp_path: Path) -> None:
    """Red tells the class and green the cut-out, so the picture itself shows whether labels and split are right."""
    prepare(tmp_path / "a", **{**SMALL, "source_count": 12, "val_count": 12}, packages=packages)  # type: ignore[arg-type]
    shown: dict[str, set[tuple[int, int]]] = {}
    for split in ("train", "val"):
        shown[split] = set()
        for path in (tmp_path / "a/source" / split / "img").iterdir():
            picture = np.asarray(Image.open(path)).astype(int)
            labels = np.asarray(Image.open(path.parent.parent / "labels" / path.name))
            for row, label in enumerate(FOLDER["source"]):
                for number in range(4):
                    is_this = (picture == [60 * row + 20, 28 * number + 20, 100]).all(2)
                    if is_this.sum() > 8:
                        shown[split].add((row, number))
                        assert (labels[is_this] == CLASSES.index(label)).all()
    assert len(shown["val"]) == 4
    assert len(shown["train"]) >= 8
    assert not shown["train"] & shown["val"]


def test_an_existing_set_is_kept_or_replaced_on_demand(packages: Path, tmp_path: Path) -> None:
    out = tmp_path / "set"

    def make(**changes: object) -> bool:
        return prepare(out, **{**SMALL, **changes}, packages=packages)  # type: ignore[arg-type]

    assert make()
    before = contents(out)
    assert not make()
    with pytest.raises(ValueError, match=r"holds files already: give --overwrite"):
        make(seed=5)
    assert contents(out) == before
    assert make(seed=5, overwrite=True)
    assert contents(out) != before


def test_a_killed_run_leaves_nothing_and_the_next_one_is_whole(
    packages: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def breaking(limit: int) -> Callable[..., None]:
        write, calls = composites._write, iter(range(1000))

        def stop(*arguments: object) -> None:
            if next(calls) == limit:
                raise KeyboardInterrupt
            write(*arguments)  # type: ignore[arg-type]

        return stop

    with monkeypatch.context() as patch:
        patch.setattr(composites, "_write", breaking(9))
        with pytest.raises(KeyboardInterrupt):
            prepare(tmp_path / "a", **SMALL, packages=packages)  # type: ignore[arg-type]
    assert not (tmp_path / "a").exists()
    assert prepare(tmp_path / "a", **SMALL, packages=packages)  # type: ignore[arg-type]
    prepare(tmp_path / "b", **SMALL, packages=packages)  # type: ignore[arg-type]
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_too_few_cut_outs_are_refused(packages: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(composites, "LEAST", 5)
    with pytest.raises(ValueError, match=r"source: each class needs 5 cut-outs, got \{'animal': 4.*openclipart-png"):
        prepare(tmp_path / "a", **SMALL, packages=packages)  # type: ignore[arg-type]


def test_the_command_line(packages: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = (
        f"--out {tmp_path}/a --from {packages} --source-count 1 --target-count 1 --val-count 1 --height 32 --width 32"
    )
    assert main(words.split()) == 0
    assert "made; 1 source, 1 target pictures a condition" in capsys.readouterr().out
    assert main(words.split()) == 0
    assert "there already" in capsys.readouterr().out
    assert main([*words.split(), "--height", "8"]) == 1
    assert "height must be 32 to 1024, got 8" in capsys.readouterr().err
    assert main([*words.split(), "--seed", "2", "--from", str(tmp_path / "none"), "--overwrite"]) == 1
    assert "there is no such file" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_real_packages(tmp_path: Path) -> None:
    pytest.importorskip("skimage")
    try:
        prepare(tmp_path / "a", 8, 2, 2)
    except (FetchError, subprocess.SubprocessError) as error:
        pytest.skip(f"the packages cannot be fetched here: {error}")
    card = (tmp_path / "a/README.md").read_text(encoding="utf-8")
    counts = {row[0]: [int(cell) for cell in row[1:3]] for row in re.findall(r"\| (\w+) \| (\d+) \| (\d+) \|", card)}
    for label, pair in counts.items():
        assert (min(pair) >= composites.LEAST) == (label in CLASSES), f"{label}: {pair}"
