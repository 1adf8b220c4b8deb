"""Contact sheets: sizes, pages, what is drawn, and mistakes."""

from __future__ import annotations

import re

import numpy as np
import pytest
from PIL import Image

from alimm.analysis.browse_dataset import SIDE, Sample, Viewer, browse, choose_rows, draw_sheet, main
from alimm.apis.config import load_config

CONFIG = """
default_scope = 'alimm'
pipeline = [dict(type='LoadImage'), dict(type='RandomFlip', prob={flip}), dict(type='PackInputs')]
dataset = dict(type='ImageList', data_root={root!r}, pipeline=pipeline)
train_dataloader = dict(batch_size=2, num_workers=0, dataset=dataset)
test_dataloader = dict(batch_size=2, num_workers=0, dataset=dict(
    type='RepeatDataset', times=50, dataset=dataset))
"""


@pytest.fixture
def config(tmp_path):
    """Nine pictures of two classes, left half of one grey and right half white."""
    for number in range(9):
        path = tmp_path / "pictures" / ("cat" if number % 2 else "\u6f22") / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.full((16, 32, 3), 255, np.uint8)
        pixels[:, :16] = number * 20
        Image.fromarray(pixels).save(path)
    path = tmp_path / "config.py"
    path.write_text(CONFIG.format(root=str(tmp_path / "pictures"), flip=1.0))
    return path


def test_what_the_modes_show(config):
    for mode, count in (("original", 1), ("transformed", 1), ("concat", 2)):
        sample = Viewer(load_config(config), "train", mode).sample(0)
        assert len(sample.pictures) == count
        assert (sample.label, sample.name) == ("cat", "cat/1.png")
        stored, flipped = sample.pictures[0], sample.pictures[-1]
        if mode != "transformed":
            assert (stored[:, :16] == 20).all()
            assert (stored[:, 16:] == 255).all()
        if mode != "original":
            assert (flipped[:, 16:] == 20).all()


def test_batch_augmentation_is_shown_in_training_only(config):
    plain, augmented = load_config(config), load_config(config)
    augmented.model = dict(
        data_preprocessor=dict(type="ClsDataPreprocessor", batch_augments=[dict(type="BatchCutout")])
    )

    def pictures(settings, phase):
        viewer = Viewer(settings, phase, "transformed")
        return [viewer.sample(row).pictures[0] for row in range(9)]

    train = pictures(augmented, "train")
    assert not np.array_equal(train, pictures(plain, "train"))
    assert np.array_equal(pictures(augmented, "test"), pictures(plain, "test"))
    # A row looks the same whatever was drawn before it.
    assert np.array_equal(Viewer(augmented, "train", "transformed").sample(8).pictures[0], train[8])


@pytest.mark.parametrize("number", [1, 9])
def test_png_holds_each_picture_where_it_should(config, tmp_path, number):
    [path] = browse(config, tmp_path / "new" / "a.png", mode="original", number=number)
    page = np.asarray(Image.open(path).convert("RGB"))
    rows = choose_rows(9, number, 0)
    shown = {int(value) for value in np.unique(page[..., 0]) if (page[..., 0] == value).sum() >= SIDE // 2 * SIDE // 4}
    expected = [Viewer(load_config(config), "train", "original").sample(row).pictures[0][0, 0, 0] for row in rows]
    assert {int(value) for value in expected} <= shown


def test_many_samples_go_on_pages(config, tmp_path, capsys):
    out = tmp_path / "sheet.png"
    command = [str(config), "-o", str(out), "--phase", "test", "--number", "400", "--mode", "concat"]
    assert main(command) == 0
    paths = capsys.readouterr().out.split()
    assert paths == [str(tmp_path / f"sheet_{page}.png") for page in range(1, 5)]
    sizes = [Image.open(path).size for path in paths]
    assert sizes[0] == sizes[1] == sizes[2]
    assert sizes[3][1] < sizes[0][1]
    assert all(0.5 < width / height < 2 for width, height in sizes)


def test_html_holds_everything(config, tmp_path):
    [path] = browse(config, tmp_path / "a.html", mode="concat", number=99)
    text = path.read_text(encoding="utf-8")
    assert text.count('src="data:image/png;base64,') == 18
    assert not re.search(r'(src|href)="(?!data:)', text)
    assert "\u6f22" in text
    assert "9 of 9 samples" in text


def test_a_sheet_of_odd_shapes_and_long_names():
    shapes = [(1, 200), (300, 2), (7, 7)]
    pictures = [np.full((*shape, 3), 10, np.uint8) for shape in shapes]
    samples = [Sample([picture], "class " * 30, "folder/" * 30 + "end") for picture in pictures]
    page = draw_sheet(samples, "title " * 99)
    assert page.width < 1000
    page = np.asarray(page)
    assert (page[:, -10:] == 255).all()


def test_rows_are_drawn_without_repetition():
    rows = choose_rows(1000, 50, 1)
    assert rows == sorted(set(rows)) == choose_rows(1000, 50, 1)
    assert len(rows) == 50
    assert rows != choose_rows(1000, 50, 2)
    assert choose_rows(3, 9, 0) == [0, 1, 2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--phase", "val"], "no val_dataloader with a dataset; it has train, test"),
        (["-o", "a.jpg"], "must end in .png or .html, got a.jpg"),
        (["--number", "0"], "--number must be at least 1, got 0"),
        (["--cfg-options", "train_dataloader.dataset.type=ImageLst"], "alimm.ImageList"),
        (["--cfg-options", "train_dataloader.dataset.pipeline=[]"], "put dict(type='alimm.PackInputs') at its end"),
    ],
)
def test_mistakes_are_told(config, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert main([str(config), *arguments]) == 1
    assert message in capsys.readouterr().err
    assert not list(tmp_path.glob("*.png"))


def test_a_damaged_picture_is_named(config, tmp_path, capsys):
    (tmp_path / "pictures" / "cat" / "3.png").write_bytes(b"no picture")
    assert main([str(config), "-o", str(tmp_path / "a.png")]) == 1
    assert "3.png cannot be read as a picture" in capsys.readouterr().err
