from __future__ import annotations

import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from mmengine.config import ConfigDict
from mmengine.structures import BaseDataElement, PixelData
from PIL import Image
from torch import nn

from alimm.projects.dcaa.inference import DCAAVisualizationHook, explain
from alimm.projects.dcaa.visualise import (
    ambivalence_png,
    attention_png,
    gallery_png,
    heat_rgb,
    labels_rgb,
    prediction_png,
)

PALETTE = [(200, 10, 20), (0, 150, 30), (5, 25, 250)]
CLASSES = ("road", "tree", "sky")
EDGE, TITLE, GAP = 8, 22, 8


def read(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)))


def contents(png: bytes, count: int, height: int, width: int) -> list[np.ndarray]:
    """The pictures of the first row, without their titles."""
    picture = read(png)
    assert picture.shape[1] >= 2 * EDGE + count * width + (count - 1) * GAP
    lefts = [EDGE + index * (width + GAP) for index in range(count)]
    top = EDGE + TITLE
    return [picture[top : top + height, left : left + width] for left in lefts]


def some_image(height: int = 8, width: int = 16) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_labels_get_their_colours_and_ignored_pixels_are_black() -> None:
    labels = np.array([[0, 1], [2, 255]], np.uint8)
    assert labels_rgb(labels, PALETTE).tolist() == [[[200, 10, 20], [0, 150, 30]], [[5, 25, 250], [0, 0, 0]]]
    assert labels_rgb(np.array([[-1]]), PALETTE, ignore_index=-1).tolist() == [[[0, 0, 0]]]
    assert labels_rgb(np.array([[1]]), PALETTE, ignore_index=1).tolist() == [[[0, 0, 0]]]
    with pytest.raises(ValueError, match=r"3 colours, but the label map holds \[3, 9\]"):
        labels_rgb(np.array([[3, 9]]), PALETTE)
    with pytest.raises(ValueError, match="a label map holds whole numbers"):
        labels_rgb(np.zeros((2, 2)), PALETTE)  # type: ignore[arg-type]


def test_heat_goes_from_violet_to_yellow() -> None:
    low, high, beyond, nothing = heat_rgb(np.array([[0, 1, 7, np.nan]]))[0].astype(int)
    assert low[2] > low[1]
    assert low.sum() < 200
    assert high[0] > 200 < high[1]
    assert high[2] < 80
    assert beyond.tolist() == high.tolist()
    assert nothing.tolist() == low.tolist()


def test_a_label_tile_is_enlarged_by_a_whole_factor_without_new_colours() -> None:
    image = some_image()
    gt = np.random.default_rng(1).integers(0, 3, (8, 16))
    gt[0, 0] = 255
    prediction = (gt + 1) % 3
    prediction[:, 8:] = gt[:, 8:]
    tiles = contents(prediction_png(image, gt, prediction, PALETTE, CLASSES), 4, 8 * 16, 256)
    for tile, small in zip(tiles[:3], (image, labels_rgb(gt, PALETTE), labels_rgb(prediction, PALETTE)), strict=True):
        expected = np.kron(small, np.ones((16, 16, 1), np.uint8))
        np.testing.assert_array_equal(tile, expected)
    red = (tiles[3][8::16, 8::16] == [255, 40, 40]).all(axis=2)
    np.testing.assert_array_equal(red, (gt != prediction) & (gt != 255))


def test_large_pictures_are_reduced_without_mixing_classes() -> None:
    image, prediction = some_image(100, 2000), np.random.default_rng(1).integers(0, 3, (100, 2000))
    picture, labels = contents(prediction_png(image, None, prediction, PALETTE, CLASSES), 2, 33, 666)
    assert {tuple(colour) for colour in labels.reshape(-1, 3).tolist()} == set(PALETTE)
    assert picture.std() < image.std() / 2  # averaged


def test_the_legend_names_the_classes_that_occur() -> None:
    image, prediction = some_image(), np.zeros((8, 16), np.int64)
    bottom = EDGE + TITLE + 128

    def colours(gt: np.ndarray) -> set[tuple[int, ...]]:
        png = prediction_png(image, gt, prediction, PALETTE, CLASSES)
        return {tuple(colour) for colour in read(png)[bottom:].reshape(-1, 3).tolist()}

    assert colours(np.full((8, 16), 2)) & set(PALETTE) == {PALETTE[0], PALETTE[2]}
    few, more = colours(prediction), colours(np.full((8, 16), 1))
    assert PALETTE[1] in more - few


def test_attention_shows_each_weight_on_the_picture() -> None:
    mask = np.zeros((2, 2, 4), np.float32)
    mask[0, :, :2] = 1
    mask[1] = 1 - mask[0]
    first, second = contents(attention_png(some_image(), mask, ["fog", "night"]), 3, 128, 256)[1:]
    low, high = heat_rgb(np.array([[0.0, 1.0]]))[0]
    assert (first[:, :32] == high).all()
    assert (first[:, -32:] == low).all()
    assert (second[:, :32] == low).all()
    with pytest.raises(ValueError, match="one map of weights for each of the conditions fog, got"):
        attention_png(some_image(), mask, ["fog"])


def test_titles_tell_the_conditions_apart() -> None:
    mask = np.full((1, 2, 4), 0.5, np.float32)
    rows = slice(EDGE, EDGE + TITLE)
    fog, snow = (read(attention_png(some_image(), mask, [name])) for name in ("fog", "snow"))
    assert (fog[rows] < 128).any()
    assert (fog[rows] != snow[rows]).any()
    np.testing.assert_array_equal(fog[EDGE + TITLE :], snow[EDGE + TITLE :])
    long = read(attention_png(some_image(), mask, ["a condition with a name that no tile has room for" * 2]))
    assert long.shape == fog.shape


def test_ambivalence_shows_easy_hard_and_pseudo_labels() -> None:
    d = np.array([[0.0, 1.0]], np.float32)
    labels = np.array([[255, 1]])
    png = ambivalence_png(some_image(), d, np.array([[0.0, 1.0]]), np.array([[1.0, 0.0]]), labels, PALETTE)
    _, like, easy, hard, pseudo = contents(png, 5, 128, 256)
    low, high = heat_rgb(np.array([[0.0, 1.0]]))[0]
    for tile, left, right in ((like, low, high), (easy, low, high), (hard, high, low), (pseudo, (0, 0, 0), PALETTE[1])):
        assert (tile[:, :16] == left).all()
        assert (tile[:, -16:] == right).all()


def test_the_gallery_has_a_row_a_condition_and_a_column_a_method() -> None:
    image, labels = some_image(), np.random.default_rng(1).integers(0, 3, (8, 16))
    rows = [("night", [image, labels, labels * 0]), ("fog", [image, labels * 0 + 1, labels])]
    picture = read(gallery_png(rows, ["image", "ground truth", "DCAA"], PALETTE, CLASSES))
    left = picture.shape[1] - EDGE - 3 * 256 - 2 * GAP
    tops = [EDGE + TITLE, EDGE + TITLE + 128 + GAP]
    for top, (_, maps) in zip(tops, rows, strict=True):
        for column, small in enumerate(maps):
            rgb = labels_rgb(small, PALETTE) if small.ndim == 2 else small
            start = left + column * (256 + GAP)
            np.testing.assert_array_equal(picture[top + 8 : top + 128 : 16, start + 8 : start + 256 : 16], rgb)
        assert (picture[top : top + 128, EDGE : left - GAP] < 128).any()  # the name of the condition
    with pytest.raises(ValueError, match="no row"):
        gallery_png([], ["image"], PALETTE, CLASSES)
    with pytest.raises(ValueError, match="row 'night' has 1 maps for the columns image, DCAA"):
        gallery_png([("night", [image])], ["image", "DCAA"], PALETTE, CLASSES)
    with pytest.raises(ValueError, match="'night' differ in size"):
        gallery_png([("night", [image, labels[:4]])], ["image", "DCAA"], PALETTE, CLASSES)


def test_mistakes_in_pictures_are_named() -> None:
    labels = np.zeros((8, 16), np.int64)
    with pytest.raises(ValueError, match="a picture is RGB, uint8"):
        prediction_png(some_image().astype(np.int64), None, labels, PALETTE, CLASSES)
    with pytest.raises(ValueError, match=r"the ground truth is .* they must be of one size"):
        prediction_png(some_image(), labels[:4], labels, PALETTE, CLASSES)


class TinyModel(nn.Module):
    """Two conditions, three classes, on a quarter of the grid; pads the picture to multiples of 8 as a preprocessor.

    The fused head calls the channel that is brightest; the decoder of condition k calls class k everywhere.
    """

    conditions = ("clear", "night")

    def __init__(self, judged: bool = True) -> None:
        super().__init__()
        self.dropout = nn.Dropout()
        self.judged = judged
        self.seen_training: list[bool] = []

    def data_preprocessor(self, data: dict[str, Any], training: bool) -> dict[str, Any]:
        pictures = torch.stack([picture[[2, 1, 0]].float() for picture in data["inputs"]])
        height, width = pictures.shape[2:]
        return {"inputs": nn.functional.pad(pictures, (0, -width % 8, 0, -height % 8), value=255.0)}

    def explain_tensors(self, inputs: torch.Tensor) -> dict[str, Any]:
        self.seen_training.append(self.training)
        small = nn.functional.avg_pool2d(inputs, 4)
        share = small[:, :1] / 255
        cond = [torch.zeros_like(small), torch.zeros_like(small)]
        for k, logits in enumerate(cond):
            logits[:, k] = 9.0
        mask = torch.cat([share, 1 - share], dim=1)
        return {"att": small, "cond": cond, "mask": mask, "ambivalence": share[:, 0] if self.judged else None}


def red_and_blue(height: int, width: int) -> np.ndarray:
    image = np.zeros((height, width, 3), np.uint8)
    image[:, : width // 2, 0] = 255
    image[:, width // 2 :, 2] = 255
    return image


def test_explain_gives_maps_of_the_picture_whatever_was_padded() -> None:
    model = TinyModel().train()
    found = explain(model, red_and_blue(12, 24))
    assert model.seen_training == [False]
    assert model.training
    assert model.dropout.training
    assert found.prediction.shape == (12, 24)
    assert found.attention.shape == found.branches.shape == (2, 12, 24)
    assert (found.prediction[:, :10] == 0).all()  # red is channel 0: RGB reached the model as RGB
    assert (found.prediction[:, 14:] == 2).all()
    np.testing.assert_allclose(found.attention.sum(axis=0), 1, atol=1e-6)
    np.testing.assert_allclose(found.attention[0, :, :8], 1)
    assert (found.branches[0] == 0).all()
    assert (found.branches[1] == 1).all()
    assert (explain(model, red_and_blue(12, 24), cond_id=1).prediction == 1).all()
    assert not explain(model.eval(), red_and_blue(8, 8)).prediction[:, :4].any()
    assert not model.training


def test_explain_tells_easy_from_hard() -> None:
    found = explain(TinyModel(), red_and_blue(12, 24))
    assert found.ambivalence is not None
    assert found.easy is not None
    assert found.hard is not None
    # On the left both the fused head and the weighted decoder 0 say 0; on the right the one says 2, the other 1.
    assert (found.pseudo_labels[:, :12] == 0).all()
    assert (found.pseudo_labels[:, 12:] == 255).all()
    np.testing.assert_allclose(found.ambivalence[:, :8], 1)
    np.testing.assert_array_equal(found.easy, np.repeat([[1.0] * 12 + [0.0] * 12], 12, axis=0))
    np.testing.assert_array_equal(found.hard, 1 - found.easy)
    bare = explain(TinyModel(judged=False), red_and_blue(12, 24))
    assert bare.ambivalence is bare.easy is bare.hard is None


def test_explain_names_mistakes() -> None:
    with pytest.raises(ValueError, match="Linear has no explain_tensors"):
        explain(nn.Linear(1, 1), red_and_blue(8, 8))
    with pytest.raises(ValueError, match="expected RGB, uint8"):
        explain(TinyModel(), red_and_blue(8, 8).astype(np.float32))
    with pytest.raises(ValueError, match="cond_id is one of 0 to 1"):
        explain(TinyModel(), red_and_blue(8, 8), cond_id=2)


def make_runner(model: nn.Module, folder: Path, **metainfo: Any) -> Any:
    dataset = SimpleNamespace(metainfo={"classes": CLASSES, "palette": PALETTE, **metainfo})
    return SimpleNamespace(model=model, work_dir=str(folder), iter=40, val_dataloader=SimpleNamespace(dataset=dataset))


def validation_batch(*conditions: str) -> tuple[dict[str, Any], list[Any]]:
    """Pictures as MMSegmentation loads them (BGR, here at half the size of the label maps), and predictions."""
    image = torch.from_numpy(red_and_blue(8, 16)[:, :, ::-1].transpose(2, 0, 1).copy())
    samples = []
    for condition in conditions:
        sample = BaseDataElement(metainfo={"condition": condition})
        sample.pred_sem_seg = PixelData(data=torch.zeros(1, 16, 32, dtype=torch.int64))
        sample.gt_sem_seg = PixelData(data=torch.zeros(1, 16, 32, dtype=torch.int64))
        samples.append(sample)
    return {"inputs": [image] * len(conditions)}, samples


def validate(hook: DCAAVisualizationHook, runner: Any, *batches: tuple[str, ...]) -> set[str]:
    hook.before_val_epoch(runner)
    for index, conditions in enumerate(batches):
        data, outputs = validation_batch(*conditions)
        hook.after_val_iter(runner, index, data, outputs)
    return {str(path.relative_to(runner.work_dir)) for path in Path(runner.work_dir).rglob("*.png")}


def test_the_hook_draws_the_first_pictures_of_each_condition(tmp_path: Path) -> None:
    hook, runner = DCAAVisualizationHook(interval=2, num=2), make_runner(TinyModel().eval(), tmp_path)
    written = validate(hook, runner, ("night", "night"), ("night", "clear"))
    stems = [f"vis_dcaa/iter_40/{name}" for name in ("night_0", "night_1", "clear_0")]
    kinds = ("attention", "ambivalence", "prediction")
    assert written == {f"{stem}_{kind}.png" for stem in stems for kind in kinds}
    image = contents((tmp_path / f"{stems[0]}_prediction.png").read_bytes(), 4, 128, 256)[0]
    assert image[64, 16].tolist() == [255, 0, 0]  # RGB in the file
    runner.iter = 80
    assert validate(hook, runner, ("night",)) == written  # every second validation
    runner.iter = 120
    again = validate(hook, runner, ("night", "a/b"))
    assert "vis_dcaa/iter_120/night_0_prediction.png" in again - written
    assert "vis_dcaa/iter_120/a_b_0_prediction.png" in again


def test_a_model_that_cannot_explain_is_drawn_all_the_same(tmp_path: Path) -> None:
    written = validate(DCAAVisualizationHook(), make_runner(nn.Linear(1, 1), tmp_path / "plain"), ("night",))
    assert written == {"vis_dcaa/iter_40/night_0_prediction.png"}
    written = validate(DCAAVisualizationHook(), make_runner(TinyModel(judged=False), tmp_path / "bare"), ("night",))
    assert {name.rpartition("_")[2] for name in written} == {"attention.png", "prediction.png"}


def test_the_hook_names_mistakes(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least 1, got 0 and 1"):
        DCAAVisualizationHook(interval=0)
    with pytest.raises(ValueError, match="needs the names and colours of the classes"):
        validate(DCAAVisualizationHook(), make_runner(TinyModel(), tmp_path, palette=None), ("night",))


def test_the_real_segmentor_can_be_explained() -> None:
    pytest.importorskip("mmseg", exc_type=ImportError)
    from alimm.registry import MODELS

    torch.manual_seed(0)
    norm = dict(type="BN")
    model = MODELS.build(
        ConfigDict(
            type="alimm.DCAASegmentor",
            conditions=["clear", "night", "fog"],
            data_preprocessor=dict(
                type="mmseg.SegDataPreProcessor",
                mean=[0.0] * 3,
                std=[255.0] * 3,
                bgr_to_rgb=True,
                test_cfg=dict(size_divisor=32),
            ),
            backbone=dict(
                type="mmseg.ResNetV1c", depth=18, base_channels=8, stem_channels=8, norm_cfg=norm, style="pytorch"
            ),
            decode_head=dict(
                type="mmseg.FCNHead",
                in_channels=8,
                in_index=0,
                channels=8,
                num_convs=1,
                num_classes=3,
                align_corners=True,
                norm_cfg=norm,
                loss_decode=dict(type="mmseg.CrossEntropyLoss"),
            ),
            discriminator=dict(channels=(4, 4)),
            self_training=dict(threshold=0.3),
            test_cfg=dict(mode="whole"),
        )
    )
    nn.init.normal_(model.decode_head.conv_seg.weight)
    image = np.kron(some_image(5, 9), np.ones((8, 8, 1), np.uint8))[:, :70]
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    # Statistics of this picture, else one class wins everywhere.
    model.train().decode_head(model.extract_feat(torch.from_numpy(image.transpose(2, 0, 1)[None] / np.float32(255))))
    first, second = explain(model, image), explain(model, image)
    assert model.training
    np.testing.assert_array_equal(first.attention, second.attention)  # no dropout, no batch statistics
    assert first.attention.shape == first.branches.shape == (3, 40, 70)
    np.testing.assert_allclose(first.attention.sum(axis=0), 1, atol=1e-5)
    assert first.ambivalence is not None
    assert 0 < first.ambivalence.min() <= first.ambivalence.max() < 1
    data = {"inputs": [torch.from_numpy(image[:, :, ::-1].transpose(2, 0, 1).copy())]}
    data["data_samples"] = [BaseDataElement(metainfo={"ori_shape": (40, 70), "img_shape": (40, 70)})]
    predicted = model.eval().val_step(data)[0].pred_sem_seg.data[0].numpy()
    assert len(np.unique(predicted)) > 1
    assert (predicted == first.prediction).mean() > 0.99  # the same but for pixels on the edge of two classes
