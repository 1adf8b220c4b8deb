"""Inferencers on a model whose answers are known by hand."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

import alimm
from alimm.apis import inferencers
from tests.alimm.toy_classifier import CONFIG, ToyClassifier

COLOURS = {"red": (200, 10, 20), "green": (5, 180, 30), "blue": (15, 25, 160)}


def picture(colour, size=(6, 9)):
    return np.full((*size, 3), colour, np.uint8)


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "toy.py"
    path.write_text(CONFIG)
    return path


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name, colour in COLOURS.items():
        Image.fromarray(picture(colour)).save(folder / f"{name}.png")
    (folder / "notes.txt").write_text("not a picture")
    return folder


def test_classifies_a_folder_in_the_order_of_names(config, folder):
    results = alimm.ImageClassificationInferencer(config)(folder)
    assert [result["class_name"] for result in results] == ["blue", "green", "red"]
    assert [result["label"] for result in results] == [2, 1, 0]
    logits = 0.1 * np.array(COLOURS["blue"])
    expected = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
    assert results[0]["score"] == pytest.approx(expected.max(), rel=1e-5)
    assert [item["class_name"] for item in results[0]["top_k"]] == ["blue", "green", "red"]
    assert [item["score"] for item in results[0]["top_k"]] == pytest.approx(sorted(expected)[::-1], rel=1e-4)


@pytest.mark.parametrize(("top_k", "count"), [(1, 1), (2, 2), (9, 3)])
def test_top_k_is_bounded_by_the_classes(config, top_k, count):
    result = alimm.ImageClassificationInferencer(config)(picture(COLOURS["red"]), top_k=top_k)[0]
    assert len(result["top_k"]) == count
    assert result["label"] == 0


def test_top_k_must_be_positive(config):
    with pytest.raises(ValueError, match="top_k must be at least 1, got 0"):
        alimm.ImageClassificationInferencer(config)(picture(COLOURS["red"]), top_k=0)


def test_paths_arrays_and_generators_give_the_same_in_order(config, folder):
    infer = alimm.EmbeddingInferencer(config)
    names = ["red", "blue", "green", "red", "blue"]
    expected = np.array([COLOURS[name] for name in names], np.float32) * np.float32(0.1)
    by_path = infer([str(folder / f"{name}.png") for name in names], batch_size=2)
    by_array = infer((picture(COLOURS[name]) for name in names), batch_size=3)
    mixed = infer([folder / "red.png", picture(COLOURS["blue"]), *(folder / f"{n}.png" for n in names[2:])])
    for features in (by_path, by_array, mixed):
        assert features.dtype == np.float32
        np.testing.assert_allclose(features, expected, rtol=1e-5)
    assert infer([]).shape == (0, 0)


def test_batches_have_the_size_asked_for_and_generators_are_read_as_needed(config):
    infer = alimm.EmbeddingInferencer(config)
    seen = []

    def source():
        for number in range(7):
            seen.append((number, list(infer.model.batch_sizes)))
            yield picture((number, number, number))

    infer(source(), batch_size=3)
    assert infer.model.batch_sizes == [3, 3, 1]
    # The fourth picture was drawn after the first batch had gone through the model.
    assert seen[3] == (3, [3])


def test_a_built_model_and_weights(config):
    model = alimm.init_model(config, cfg_options={"model.scale": 0.5})
    features = alimm.EmbeddingInferencer(model)(picture((10, 20, 30)))
    np.testing.assert_allclose(features, [[5, 10, 15]], rtol=1e-5)
    with pytest.raises(ValueError, match="weights go with a config"):
        alimm.EmbeddingInferencer(model, weights="a.pth")
    with pytest.raises(ValueError, match="no test_dataloader"):
        alimm.EmbeddingInferencer(ToyClassifier())


def test_a_broken_picture_is_named(config, folder):
    infer = alimm.ImageClassificationInferencer(config)
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(buffer, "PNG")
    (folder / "half.png").write_bytes(buffer.getvalue()[:3000])
    (folder / "empty.png").write_bytes(b"")
    for name in ("half", "empty"):
        with pytest.raises(ValueError, match=rf"cannot read the picture .*{name}\.png"):
            infer([folder / "red.png", folder / f"{name}.png"])
    with pytest.raises(ValueError, match=r"gone\.png does not exist"):
        infer(folder / "gone.png")


@pytest.mark.parametrize(
    "array",
    [np.zeros((4, 4), np.uint8), np.zeros((4, 4, 4), np.uint8), np.zeros((4, 4, 3)), np.zeros((0, 4, 3), np.uint8)],
)
def test_a_wrong_array_is_refused(config, array):
    with pytest.raises(ValueError, match="RGB, uint8, shape"):
        alimm.ImageClassificationInferencer(config)(array)


def test_other_mistakes(config, tmp_path):
    infer = alimm.ImageClassificationInferencer(config)
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match="holds no picture"):
        infer(tmp_path / "none")
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        infer(picture(COLOURS["red"]), batch_size=0)
    with pytest.raises(ValueError, match="a picture is a path or an RGB array, got int"):
        infer([3])


def test_visualize_draws_below_the_picture_and_writes_files(config, folder, tmp_path):
    infer = alimm.ImageClassificationInferencer(config)
    drawn = infer.visualize([folder / "red.png", picture(COLOURS["blue"])], out_dir=tmp_path / "out")
    assert [path.name for path in sorted((tmp_path / "out").iterdir())] == ["000001.png", "red.png"]
    for image, colour in zip(drawn, (COLOURS["red"], COLOURS["blue"]), strict=True):
        assert image.dtype == np.uint8
        height = round(6 * 224 / 9)
        assert image.shape == (height + 28, 224, 3)
        assert (image[:height] == colour).all()
        band = image[height:]
        assert (band == 255).any()
        assert (band == 0).any()
    with Image.open(tmp_path / "out" / "red.png") as saved:
        np.testing.assert_array_equal(np.asarray(saved), drawn[0])


def test_pictures_of_one_name_do_not_overwrite_each_other(config, folder, tmp_path):
    other = tmp_path / "more"
    other.mkdir()
    Image.fromarray(picture(COLOURS["blue"])).save(other / "red.png")
    inputs = [folder / "red.png", other / "red.png"]
    alimm.ImageClassificationInferencer(config).visualize(inputs, out_dir=tmp_path / "out")
    assert len(list((tmp_path / "out").iterdir())) == 2


def test_embedding_visualize_puts_the_nearest_beside(config):
    near, far, query = picture((190, 20, 20)), picture((10, 20, 200)), picture((200, 10, 20))
    strips = alimm.EmbeddingInferencer(config).visualize([query, far, near], neighbours=2)
    assert strips[0].shape == (252, 3 * 224, 3)
    centre = [tuple(int(value) for value in strips[0][60, 112 + 224 * tile]) for tile in range(3)]
    assert centre == [(200, 10, 20), (190, 20, 20), (10, 20, 200)]


def test_progress_is_shown_on_a_terminal_only(config, monkeypatch, capsys):
    infer = alimm.EmbeddingInferencer(config)
    infer([picture((1, 2, 3))] * 3)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(inferencers.sys.stderr, "isatty", lambda: True, raising=False)
    assert infer([picture((1, 2, 3))] * 3).shape == (3, 3)
    assert "Pictures" in capsys.readouterr().err


REAL = """
default_scope = 'alimm'
model = dict(
    type='ImageClassifier', backbone=dict(type='ResNetTiny', width=4, depths=(1, 1)),
    neck=dict(type='GlobalPoolNeck'), head=dict(type='LinearHead', num_classes=4, in_channels=8),
    data_preprocessor=dict(type='ClsDataPreprocessor', mean=(10, 20, 30), std=(2, 4, 8)))
pipeline = [dict(type='LoadImageToy'), dict(type='PackToy')]
test_dataloader = dict(dataset=dict(type='Toy', pipeline=pipeline))
"""


@pytest.fixture
def real(tmp_path):
    path = tmp_path / "real.py"
    path.write_text(REAL)
    torch.manual_seed(0)
    return path


def random_pictures(count):
    return list(np.random.default_rng(0).integers(0, 256, (count, 4, 4, 3), np.uint8))


def test_a_real_classifier_gives_what_it_computes_by_itself(real):
    model = alimm.init_model(real)
    pictures = random_pictures(5)
    batch = torch.from_numpy(np.stack(pictures).transpose(0, 3, 1, 2)).float()
    batch = (batch - torch.tensor([10.0, 20, 30]).view(3, 1, 1)) / torch.tensor([2.0, 4, 8]).view(3, 1, 1)
    with torch.no_grad():
        scores = model(batch).softmax(1).numpy()
        features = model.extract_feat(batch).numpy()
    results = alimm.ImageClassificationInferencer(model)(pictures, batch_size=2, top_k=4)
    for result, row in zip(results, scores, strict=True):
        order = np.argsort(-row, kind="stable")
        assert [item["label"] for item in result["top_k"]] == order.tolist()
        np.testing.assert_allclose([item["score"] for item in result["top_k"]], row[order], rtol=1e-4)
        # The data set of the config names three classes, the model has four.
        assert result["class_name"] == ["r", "g", "b", "3"][order[0]]
    embedded = alimm.EmbeddingInferencer(model)(pictures, batch_size=3)
    np.testing.assert_allclose(embedded, features / np.linalg.norm(features, axis=1, keepdims=True), rtol=1e-4)


def test_a_pipeline_that_loads_bgr_sees_arrays_as_it_sees_files(real, tmp_path):
    options = {"model.data_preprocessor.to_rgb": True, "pipeline.0.type": "LoadImageBGRToy"}
    options["test_dataloader.dataset.pipeline.0.type"] = "LoadImageBGRToy"
    image = random_pictures(1)[0]
    Image.fromarray(image).save(tmp_path / "a.png")
    infer = alimm.EmbeddingInferencer(alimm.init_model(real, cfg_options=options))
    np.testing.assert_array_equal(infer(tmp_path / "a.png"), infer(image))
    solid = picture(COLOURS["red"])
    assert tuple(infer.visualize(solid)[0][60, 60]) == COLOURS["red"]


def test_a_model_without_a_head_cannot_classify(real):
    model = alimm.init_model(real, cfg_options={"model.head": None})
    assert alimm.EmbeddingInferencer(model)(random_pictures(2)).shape == (2, 8)
    with pytest.raises(ValueError, match="it has no head"):
        alimm.ImageClassificationInferencer(model)(random_pictures(2))


def test_a_model_without_embed_is_named(real):
    model = alimm.init_model(real)
    other = torch.nn.Identity()
    other.cfg = model.cfg
    with pytest.raises(ValueError, match="Identity has no method embed"):
        alimm.EmbeddingInferencer(other)(random_pictures(1))
