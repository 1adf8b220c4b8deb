"""HanGlyphs and its prepare step, on fonts that the test draws: each character is a known rectangle."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest

from alimm.datasets import HanGlyphs, PackInputs
from alimm.datasets.fetch import DebianPackage, sha256_of
from alimm.datasets.prepare_han_glyphs import (
    FAMILIES,
    Family,
    choose,
    covered,
    is_han,
    main,
    prepare,
    render,
)

ONE, TWO, THREE, FOUR, RARE = 0x4E00, 0x4E8C, 0x4E09, 0x56DB, 0x20000
EM = 1000


def write_font(path, boxes):
    """A TrueType font: code point -> (left, bottom, right, top) in 1000 units an em, None for a blank glyph."""
    from fontTools.fontBuilder import FontBuilder
    from fontTools.pens.ttGlyphPen import TTGlyphPen

    names = {code: f"u{code:04X}" for code in boxes}
    builder = FontBuilder(EM, isTTF=True)
    builder.setupGlyphOrder([".notdef", *names.values()])
    builder.setupCharacterMap(names)
    glyphs = {}
    for name, box in [(".notdef", (100, 0, 900, 800)), *((names[code], box) for code, box in boxes.items())]:
        pen = TTGlyphPen(None)
        if box is not None:
            left, bottom, right, top = box
            pen.moveTo((left, bottom))
            for point in ((left, top), (right, top), (right, bottom)):
                pen.lineTo(point)
            pen.closePath()
        glyphs[name] = pen.glyph()
    builder.setupGlyf(glyphs)
    builder.setupHorizontalMetrics({name: (EM, 0) for name in glyphs})
    builder.setupHorizontalHeader(ascent=880, descent=-120)
    builder.setupOS2(sTypoAscender=880, sTypoDescender=-120)
    builder.setupNameTable({"familyName": path.stem, "styleName": "Regular"})
    builder.setupPost()
    builder.save(path)
    return path


@pytest.fixture(scope="module")
def fonts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fonts")
    return {
        "serif": write_font(
            folder / "serif.ttf",
            {ONE: (0, 380, 1000, 440), TWO: (0, 0, 500, 880), THREE: (500, 0, 1000, 880), 0x41: (0, 0, 500, 500)},
        ),
        "sans": write_font(
            folder / "sans.ttf",
            {ONE: (0, 300, 1000, 500), TWO: (0, -120, 500, 880), FOUR: None, RARE: (0, 0, 300, 300)},
        ),
        "brush": write_font(folder / "brush.ttf", {ONE: (0, 300, 900, 400), THREE: (400, 0, 900, 880)}),
        "twins": write_font(folder / "twins.ttf", {ONE: (0, 0, 500, 500), TWO: (0, 0, 500, 500)}),
    }


@pytest.fixture
def glyphs(fonts, tmp_path):
    prepare(tmp_path / "glyphs", (), {name: fonts[name] for name in ("serif", "sans", "brush")}, size=16)
    return tmp_path / "glyphs"


def test_coverage_leaves_out_notdef_and_other_scripts(fonts, monkeypatch):
    from fontTools.ttLib import TTFont

    assert covered(fonts["serif"]) == {ONE, TWO, THREE}
    assert covered(fonts["sans"]) == {ONE, TWO, FOUR, RARE}
    # fontTools writes no such entry, other makers do.
    monkeypatch.setattr(TTFont, "getBestCmap", lambda font: {ONE: ".notdef", TWO: "u4E8C"})
    assert covered(fonts["serif"]) == {TWO}


def test_blocks_against_the_unicode_database():
    import unicodedata

    for code in range(0x3000, 0x33000):
        name = unicodedata.name(chr(code), "")
        if name.startswith("CJK UNIFIED IDEOGRAPH-") and not 0xF900 <= code <= 0xFAFF:
            assert is_han(code), hex(code)
        elif name:
            assert not is_han(code), hex(code)


def test_place_and_size_follow_the_em_square(fonts):
    # 64 pixels: an em of 60, its baseline 2 + 0.88 * 60 = 54.8 from the top.
    [pixels] = render(fonts["serif"], 64, [TWO])
    rows, columns = np.flatnonzero((pixels < 128).any(1)), np.flatnonzero((pixels < 128).any(0))
    assert abs(columns[0] - 2) <= 1
    assert abs(columns[-1] - 31) <= 1
    assert abs(rows[0] - 2) <= 1
    assert abs(rows[-1] - 54) <= 1
    assert pixels[30, 15] == 0
    assert pixels[0, 40] == 255


def test_what_is_written(glyphs, fonts):
    index = json.loads((glyphs / "index.json").read_text())
    by_name = {family["name"]: family for family in index["families"]}
    assert {name: family["glyphs"] for name, family in by_name.items()} == {"serif": 3, "sans": 3, "brush": 2}
    assert by_name["sans"]["blank"] == 1
    assert index["classes_by_fonts"] == {"1": 4, "2": 3, "3": 1}
    codepoints = np.load(glyphs / "sans.codepoints.npy")
    assert codepoints.tolist() == [ONE, TWO, RARE]
    assert np.array_equal(np.load(glyphs / "sans.pixels.npy"), render(fonts["sans"], 16, codepoints.tolist()))
    assert "licence" in (glyphs / "README.md").read_text()


def test_the_same_bytes_in_one_process_and_in_two(fonts, tmp_path, monkeypatch):
    monkeypatch.setattr("alimm.datasets.prepare_han_glyphs.CHUNK", 1)
    for workers in (1, 2):
        prepare(tmp_path / str(workers), (), {"serif": fonts["serif"], "sans": fonts["sans"]}, size=16, workers=workers)
    for path in sorted((tmp_path / "1").iterdir()):
        assert path.read_bytes() == (tmp_path / "2" / path.name).read_bytes()


def test_same_drawings_are_counted(fonts, tmp_path):
    index = prepare(tmp_path / "twins", (), {"twins": fonts["twins"]}, size=16)
    assert index["families"][0]["same_as_another"] == 1


def test_choice():
    coverage = {"a": {1, 2, 3}, "b": {2, 3}, "c": {3, 9}}
    assert choose(coverage, 1, None) == [1, 2, 3, 9]
    assert choose(coverage, 2, None) == [2, 3]
    assert choose(coverage, 1, 3) == [1, 2, 3]
    assert choose(coverage, 1, 1) == [3]
    with pytest.raises(ValueError, match=r"no Han character is in 4 of the families a, b, c; lower --min-fonts"):
        choose(coverage, 4, None)


def test_a_family_of_two_files_takes_the_first_that_has_the_character(fonts, tmp_path):
    files = [fonts["sans"], fonts["serif"]]
    promised = {f"usr/share/fonts/{path.name}": sha256_of(path.read_bytes()) for path in files}
    family = Family("both", DebianPackage("fonts-both", "1", "0" * 64, promised), "free")
    prepare(tmp_path / "out", [family], source=fonts["serif"].parent, size=16)
    codepoints = np.load(tmp_path / "out" / "both.codepoints.npy").tolist()
    assert codepoints == [ONE, THREE, TWO, RARE]
    pixels = np.load(tmp_path / "out" / "both.pixels.npy")
    for code, name in ((ONE, "sans"), (THREE, "serif"), (TWO, "sans"), (RARE, "sans")):
        assert np.array_equal(pixels[codepoints.index(code)], render(fonts[name], 16, [code])[0])


def items(dataset):
    return [dataset.get_data_info(row) for row in range(len(dataset))]


def test_split_by_family(glyphs):
    options = dict(data_root=glyphs, test_family="brush")
    train, test = HanGlyphs("train", **options), HanGlyphs("test", **options)
    assert train.metainfo["classes"] == test.metainfo["classes"] == (chr(ONE), chr(THREE))
    assert train.metainfo["class_counts"] == test.metainfo["class_counts"] == [2, 1]
    assert [item["sample_id"] for item in items(train)] == ["serif/U+4E00", "serif/U+4E09", "sans/U+4E00"]
    assert [(item["family"], item["gt_label"], item["gt_identity"]) for item in items(test)] == [
        ("brush", 0, ONE),
        ("brush", 1, THREE),
    ]
    for dataset in (train, test):
        for row, item in enumerate(items(dataset)):
            stored = dataset.store.pixels[item["family"]][
                dataset.store.codepoints[item["family"]].tolist().index(item["gt_identity"])
            ]
            assert np.array_equal(item["img"], np.repeat(stored[..., None], 3, axis=2))
            assert dataset.get_cat_ids(row) == [item["gt_label"]]
            assert chr(item["gt_identity"]) == dataset.metainfo["classes"][item["gt_label"]]


def test_class_sets(glyphs):
    options = dict(data_root=glyphs, test_family="brush")
    assert HanGlyphs(class_set="train", **options).metainfo["classes"] == tuple(map(chr, (ONE, THREE, TWO, RARE)))
    assert [item["gt_label"] for item in items(HanGlyphs("test", class_set="train", **options))] == [0, 1]
    assert HanGlyphs(class_set="train", min_fonts=2, **options).metainfo["classes"] == (chr(ONE), chr(TWO))
    assert HanGlyphs(class_set="train", num_classes=3, **options).metainfo["class_counts"] == [2, 1, 2]
    assert len(HanGlyphs(train_families=["serif"], **options)) == 2


def test_copies_do_not_carry_the_pixels(glyphs):
    dataset = HanGlyphs(data_root=glyphs, test_family="brush", channels=1, pipeline=[PackInputs()])
    again = pickle.loads(pickle.dumps(dataset))
    assert isinstance(again.store.pixels["serif"], np.memmap)
    assert again[0]["inputs"].shape == (1, 16, 16)


def test_missing_data_gives_the_exact_command(tmp_path, monkeypatch):
    monkeypatch.setenv("ALIMM_DATA", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"with: python \S*/tools/data/prepare_han_glyphs\.py$"):
        HanGlyphs()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(subset="val"), "subset must be train or test, got 'val'"),
        (dict(class_set="all"), "class_set must be shared or train"),
        (dict(channels=2), "channels must be 1 or 3, got 2"),
        (dict(num_classes=0), "num_classes must be at least 1"),
        (dict(test_family="gothic"), "no family 'gothic' in .*; it has serif, sans, brush"),
        (dict(train_families=["brush"]), "must be families other than brush"),
        (dict(min_fonts=3), "no character is in 3 of the families serif, sans and in brush"),
    ],
)
def test_mistakes_are_named(glyphs, options, message):
    with pytest.raises(ValueError, match=message):
        HanGlyphs(**{**dict(data_root=glyphs, test_family="brush"), **options})


@pytest.mark.parametrize("damage", ["cut", "gone", "other", "index", "format"])
def test_damaged_files_are_named(glyphs, damage):
    path = glyphs / "sans.pixels.npy"
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-300])
    elif damage == "gone":
        path.unlink()
    elif damage == "other":
        shutil.copy(glyphs / "brush.pixels.npy", path)
    elif damage == "index":
        (glyphs / "index.json").write_text('{"format": 1')
    else:
        (glyphs / "index.json").write_text('{"format": 7}')
    with pytest.raises(ValueError, match=r"glyphs does not hold glyphs .* prepare it again"):
        HanGlyphs(data_root=glyphs, test_family="brush")


def test_command_line(fonts, tmp_path, capsys):
    out = tmp_path / "out"
    own = [f"--font={name}={fonts[name]}" for name in ("serif", "brush")]
    assert main(["--out", str(out), "--no-fetch", *own, "--size", "16", "--limit", "2", "--workers", "1"]) == 0
    assert "4 glyphs of 2 characters" in capsys.readouterr().out
    assert main(["--out", str(out), "--no-fetch", "--font", f"x={tmp_path / 'gone.ttf'}"]) == 1
    assert "there is no font file" in capsys.readouterr().err
    assert main(["--out", str(out), "--no-fetch"]) == 1
    assert "--no-fetch" in capsys.readouterr().err
    assert main(["--out", str(out), "--from", str(tmp_path)]) == 1
    assert "neither a package" in capsys.readouterr().err
    # The folder of the first call is still whole.
    assert len(HanGlyphs(data_root=out, test_family="brush")) == 2


def test_the_declared_families_are_well_formed():
    assert len({family.name for family in FAMILIES}) == len(FAMILIES) == 6
    for family in FAMILIES:
        assert all(len(digest) == 64 for digest in (family.package.sha256, *family.package.files.values()))
        assert all(Path(name).suffix in (".ttf", ".ttc") for name in family.package.files)
