from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mmengine.dataset import BaseDataset, ConcatDataset, RepeatDataset
from PIL import Image

from alimm.projects.dcaa.style_bank import StyleBank, load_image, raw_results
from alimm.projects.dcaa.styles import StyledDataset, StyliseSource
from alimm.projects.dcaa.stylise import colour_statistics, fda, match_colour
from alimm.registry import DATASETS

CONDITIONS = ("fog", "night", "\u96ea")
BRIGHTNESS = {"fog": 180, "night": 20, "\u96ea": 230}


class Read:
    """A loading transform as MMSegmentation's: blue, green, red."""

    def __call__(self, results: dict[str, Any]) -> dict[str, Any]:
        results["img"] = np.asarray(Image.open(results["img_path"]))[..., ::-1].copy()
        return results


class Files(BaseDataset):
    """Pictures in files; ``items`` are (path, condition, id)."""

    def __init__(self, items: list[tuple[str, str, int]], conditions: tuple[str, ...], **kwargs: Any) -> None:
        self.items, self.conditions = items, conditions
        kwargs.setdefault("serialize_data", False)  # which collects garbage each time
        super().__init__(metainfo={"classes": ("a", "b"), "conditions": conditions}, **kwargs)

    def load_data_list(self) -> list[dict[str, Any]]:
        return [
            {"img_path": path, "seg_map_path": "none", "condition": name, "cond_id": number, "domain": "source"}
            for path, name, number in self.items
        ]

    def condition_ids(self) -> np.ndarray:
        return np.array([number for _, _, number in self.items], np.int64)


class Rendered(Files):
    """Pictures made in ``prepare_data``."""

    def prepare_data(self, idx: int) -> Any:
        info = self.get_data_info(idx)
        info["img"] = np.full((6, 8, 3), (idx, 10, 200), np.uint8)
        return self.pipeline(info)


class WithRawItem(Files):
    """Pictures asked for by ``raw_item``; ``prepare_data`` must not be needed."""

    def raw_item(self, idx: int) -> dict[str, Any]:
        return self.get_data_info(idx) | {"img": np.full((6, 8, 3), (idx, 10, 200), np.uint8)}

    def prepare_data(self, idx: int) -> Any:
        raise AssertionError("rendered twice")


def write(folder: Path, name: str, brightness: int, seed: int, size: tuple[int, int] = (10, 14)) -> str:
    pixels = np.random.default_rng(seed).integers(-15, 16, (*size, 3)) + brightness + np.array([0, 5, 10])
    path = folder / f"{name}.png"
    Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(path)
    return str(path)


@pytest.fixture
def target(tmp_path: Path) -> Files:
    items = [
        (write(tmp_path, f"{name}{number}", BRIGHTNESS[name], number, (10 + number, 14)), name, cond_id)
        for cond_id, name in enumerate(CONDITIONS)
        for number in range(4)
    ]
    return Files(items, CONDITIONS)


@pytest.fixture
def source_items(tmp_path: Path) -> list[tuple[str, str, int]]:
    return [(write(tmp_path, f"source{number}", 100, 50 + number), "source", 7) for number in range(3)]


def source(items: list[tuple[str, str, int]], *transforms: Any, **kwargs: Any) -> Files:
    return Files(items, ("source",), pipeline=[Read(), *(transforms or (StyliseSource(),))], **kwargs)


def test_bank_keeps_pictures_and_statistics_of_each_condition(target: Files) -> None:
    bank = StyleBank(target, per_condition=3, seed=1)
    assert bank.conditions == CONDITIONS
    for name in CONDITIONS:
        files = [np.asarray(Image.open(path)) for path, condition, _ in target.items if condition == name]
        kept = bank.references[name]
        assert len(kept) == 3
        for reference in kept:
            assert reference.condition == name
            assert any(np.array_equal(reference.image, one) for one in files)
            assert reference.stats == colour_statistics(reference.image)
        pooled = colour_statistics([reference.image for reference in kept])
        np.testing.assert_allclose(bank.stats(name).mean, pooled.mean)
        np.testing.assert_allclose(bank.stats(name).std, pooled.std)
        assert bank.draw(name).pooled == bank.stats(name)
    everything = colour_statistics([one.image for some in bank.references.values() for one in some])
    np.testing.assert_allclose(bank.stats("pooled").std, everything.std)


def kept_paths(bank: StyleBank) -> list[bytes]:
    return [one.image.tobytes() for some in bank.references.values() for one in some]


def test_choice_depends_on_the_seed_alone(target: Files) -> None:
    np.random.seed(0)
    first = kept_paths(StyleBank(target, 2, seed=3))
    np.random.seed(1)
    assert kept_paths(StyleBank(target, 2, seed=3)) == first
    assert any(kept_paths(StyleBank(target, 2, seed=seed)) != first for seed in range(4, 8))
    assert len(StyleBank(target, 99).references["fog"]) == 4


def test_large_pictures_are_kept_small_with_the_statistics_of_the_full_size(target: Files) -> None:
    bank, full = StyleBank(target, 2, max_side=7), StyleBank(target, 2)
    for small, large in zip(bank.references["night"], full.references["night"], strict=True):
        assert max(small.image.shape) == 7
        assert small.stats == large.stats


def test_bank_survives_its_file(target: Files, tmp_path: Path) -> None:
    bank = StyleBank(target, 3)
    bank.save(tmp_path / "bank.npz")
    again = StyleBank.load(tmp_path / "bank.npz")
    assert again.conditions == CONDITIONS
    assert kept_paths(again) == kept_paths(bank)
    for name in (*CONDITIONS, "pooled"):
        assert again.stats(name) == bank.stats(name)
    with pytest.raises(ValueError, match="there is no bank of styles"):
        StyleBank.load(tmp_path / "other.npz")
    data = (tmp_path / "bank.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(data[: len(data) // 2])
    (tmp_path / "empty.npz").write_bytes(b"")
    np.savez(tmp_path / "foreign.npz", x=np.zeros(2))
    for name in ("cut", "empty", "foreign"):
        with pytest.raises(ValueError, match=rf"{name}\.npz is no bank of styles, or is damaged"):
            StyleBank.load(tmp_path / f"{name}.npz")


def test_bank_refuses_targets_that_do_not_fit(target: Files) -> None:
    lacking = Files([item for item in target.items if item[1] != "night"], CONDITIONS)
    with pytest.raises(ValueError, match="condition 'night' has no picture among the 8"):
        StyleBank(lacking)
    with pytest.raises(ValueError, match="BaseDataset knows no conditions"):
        StyleBank(BaseDataset(lazy_init=True))
    with pytest.raises(ValueError, match="at least 1, got 0"):
        StyleBank(target, 0)
    with pytest.raises(ValueError, match="no condition 'rain', only fog, night"):
        StyleBank(target).draw("rain")


def test_images_are_rgb_wherever_they_come_from(target: Files) -> None:
    path = target.items[0][0]
    np.testing.assert_array_equal(load_image(target, 0), np.asarray(Image.open(path)))
    for dataset in (Rendered(target.items, CONDITIONS), WithRawItem(target.items, CONDITIONS)):
        assert load_image(dataset, 3)[0, 0].tolist() == [200, 10, 3]
    assert load_image(RepeatDataset(Rendered(target.items, CONDITIONS), 2), 15)[0, 0].tolist() == [200, 10, 3]

    class Own(Rendered):
        def load_image(self, index: int) -> np.ndarray:
            return np.full((2, 2), index, np.uint8)

    assert load_image(Own(target.items, CONDITIONS), 5).tolist() == [[[5] * 3] * 2] * 2
    target.data_list = [{"other": 1}]
    with pytest.raises(ValueError, match="item 0 of Files has neither img nor img_path, but other"):
        load_image(target, 0)


def test_each_source_picture_comes_once_in_each_style(target: Files, source_items: list) -> None:
    dataset = StyledDataset(source(source_items), target)
    assert len(dataset) == 9
    assert dataset.conditions == CONDITIONS
    assert dataset.condition_ids().dtype == np.int64
    assert dataset.condition_ids().tolist() == [0, 1, 2] * 3
    assert dataset.metainfo == {"classes": ("a", "b"), "conditions": CONDITIONS}
    for index in range(9):
        item = dataset[index]
        assert item["img_path"] == source_items[index // 3][0]
        assert (item["cond_id"], item["condition"]) == (index % 3, CONDITIONS[index % 3])
        assert item["domain"] == "source"
        assert item["seg_map_path"] == "none"
        assert "style_reference" not in item
        info = dataset.get_data_info(index)
        assert (info["cond_id"], info["img_path"]) == (item["cond_id"], item["img_path"])
        assert abs(item["img"].mean() - BRIGHTNESS[CONDITIONS[index % 3]]) < 12
    assert dataset.get_data_info(-1) == dataset.get_data_info(8)
    with pytest.raises(IndexError, match="has 9 items, there is no item 9"):
        dataset[9]


def test_restyled_picture_is_that_of_the_drawn_reference(target: Files, source_items: list) -> None:
    dataset = StyledDataset(source(source_items, StyliseSource("colour+fda", (0.3, 0.8), (0.1, 0.3))), target)
    np.random.seed(5)
    item = dataset[4]
    np.random.seed(5)
    reference = dataset.bank.draw("night")
    strength, beta = np.random.uniform(0.3, 0.8), np.random.uniform(0.1, 0.3)
    rgb = np.asarray(Image.open(source_items[1][0]))
    expected = fda(match_colour(rgb, reference.stats, strength=strength), reference.image, beta)
    np.testing.assert_array_equal(item["img"][..., ::-1], expected)
    assert item["img"].flags.c_contiguous
    np.random.seed(6)
    assert not np.array_equal(dataset[4]["img"], item["img"])


@pytest.mark.parametrize("method", ["colour", "fda", "colour+fda", "none"])
@pytest.mark.parametrize("per_image", [True, False])
@pytest.mark.parametrize("order", ["bgr", "rgb"])
def test_methods(target: Files, method: str, per_image: bool, order: str) -> None:
    reference = StyleBank(target).draw("fog")
    rgb = np.random.default_rng(0).integers(40, 90, (10, 14, 3)).astype(np.uint8)
    expected = rgb
    if "colour" in method:
        expected = match_colour(expected, reference.stats if per_image else reference.pooled)
    if "fda" in method:
        expected = fda(expected, reference.image, 0.2)
    given = rgb if order == "rgb" else rgb[..., ::-1].copy()
    label = np.arange(140).reshape(10, 14)
    results = {"img": given.copy(), "style_reference": reference, "gt_seg_map": label.copy()}
    results = StyliseSource(method, (1, 1), (0.2, 0.2), per_image, order)(results)
    found = results["img"] if order == "rgb" else results["img"][..., ::-1]
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(results["gt_seg_map"], label)
    assert set(results) == {"img", "gt_seg_map"}


def test_sources_that_render(target: Files, source_items: list) -> None:
    for kind in (Rendered, WithRawItem):
        styled = StyledDataset(kind(source_items, ("source",), pipeline=[StyliseSource("none")]), target)
        item = styled[7]
        assert item["img"][0, 0].tolist() == [2, 10, 200]
        assert (item["cond_id"], item["condition"]) == (1, "night")


def test_joined_sources_are_looked_through(target: Files, source_items: list) -> None:
    parts = [source(source_items[:1]), source(source_items[1:])]
    dataset = StyledDataset(ConcatDataset(parts), target)
    assert [dataset[index]["img_path"] for index in range(9)] == [item[0] for item in source_items for _ in range(3)]
    results, pipeline = raw_results(ConcatDataset(parts), 2)
    assert results["img_path"] == source_items[2][0]
    assert "img" not in results
    assert pipeline is parts[1].pipeline
    with pytest.raises(ValueError, match="no transform of the source uses the style"):
        StyledDataset(ConcatDataset([parts[0], source(source_items, Read())]), target)


def test_identity_conditions_stay_as_they_are(target: Files, source_items: list) -> None:
    names = ("clear", "night")
    dataset = StyledDataset(source(source_items), target, conditions=names, identity_conditions=["clear"])
    assert dataset.conditions == names
    clear, night = dataset[0], dataset[1]
    np.testing.assert_array_equal(clear["img"][..., ::-1], np.asarray(Image.open(source_items[0][0])))
    assert (clear["cond_id"], night["cond_id"]) == (0, 1)
    assert night["img"].mean() < 40


def test_one_style_for_all(target: Files, source_items: list) -> None:
    dataset = StyledDataset(source(source_items), target, pooled=True)
    assert len(dataset) == 3
    assert dataset.conditions == ("pooled",)
    assert dataset.condition_ids().tolist() == [0, 0, 0]
    np.random.seed(0)
    means = [dataset[index % 3]["img"].mean() for index in range(30)]
    for brightness in BRIGHTNESS.values():
        assert min(abs(mean - brightness) for mean in means) < 12
    assert dataset.bank.draw("pooled").pooled == dataset.bank.stats("pooled")
    named = StyledDataset(source(source_items), target, conditions=["target"], pooled=True)
    assert (named[0]["condition"], named[0]["cond_id"]) == ("target", 0)


def test_styles_from_a_bank_a_file_and_a_config(target: Files, source_items: list, tmp_path: Path) -> None:
    bank = StyleBank(target)
    bank.save(tmp_path / "bank.npz")
    DATASETS.register_module(name="FilesOfTheStyleTest", module=Files, force=True)
    config = {"type": "FilesOfTheStyleTest", "items": target.items, "conditions": CONDITIONS}
    for styles in (bank, tmp_path / "bank.npz", str(tmp_path / "bank.npz"), config):
        dataset = StyledDataset(source(source_items), styles)
        assert kept_paths(dataset.bank) == kept_paths(bank)


def test_bank_of_a_target_opens_no_label(target: Files, source_items: list, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = []
    really = Image.open
    monkeypatch.setattr(Image, "open", lambda path, *rest: opened.append(str(path)) or really(path, *rest))
    StyleBank(target)
    assert sorted(opened) == sorted(path for path, _, _ in target.items)


def test_none_of_a_pipeline_is_answered_with_another_picture_in_that_style(target: Files, source_items: list) -> None:
    def refuse(results: dict[str, Any]) -> dict[str, Any] | None:
        return None if results["img_path"] == source_items[0][0] else results

    dataset = StyledDataset(source(source_items, StyliseSource("none"), refuse), target)
    for index in (0, 1, 2):
        item = dataset[index]
        assert item["img_path"] != source_items[0][0]
        assert item["cond_id"] == index
    hopeless = StyledDataset(source(source_items[:1], StyliseSource("none"), refuse, max_refetch=3), target)
    with pytest.raises(ValueError, match="gives None for every picture"):
        hopeless[0]


def test_data_workers_get_a_copy_that_draws_alike(target: Files, source_items: list) -> None:
    dataset = StyledDataset(source(source_items, serialize_data=True), target)
    copied = pickle.loads(pickle.dumps(dataset))
    for index in range(9):
        np.random.seed(index)
        first = dataset[index]["img"]
        np.random.seed(index)
        np.testing.assert_array_equal(copied[index]["img"], first)


def test_lazy_init_reads_when_it_is_needed(target: Files, source_items: list) -> None:
    dataset = StyledDataset(source(source_items, lazy_init=True), target, lazy_init=True)
    assert not hasattr(dataset, "bank")
    assert len(dataset) == 9
    assert hasattr(dataset, "bank")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"conditions": ["fog", "rain"]}, "no condition rain, only fog, night"),
        ({"conditions": ["fog", "fog"]}, "conditions must be a list of different names"),
        ({"conditions": "fog"}, "conditions must be a list of different names"),
        ({"conditions": []}, "conditions must be a list of different names"),
        ({"identity_conditions": ["rain"]}, "identity_conditions names rain, but the conditions are fog"),
        ({"pooled": True, "conditions": ["a", "b"]}, "pooled=True is one style for all"),
        ({"pooled": True, "identity_conditions": ["fog"]}, "pooled=True is one style for all"),
    ],
)
def test_wrong_arguments(target: Files, source_items: list, arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StyledDataset(source(source_items), target, **arguments)


def test_wrong_sources(target: Files, source_items: list) -> None:
    with pytest.raises(ValueError, match="the source has no pictures"):
        StyledDataset(Files([], ("source",), pipeline=[StyliseSource()]), target)
    with pytest.raises(ValueError, match="no transform of the source uses the style"):
        StyledDataset(source(source_items, Read()), target)


def test_wrong_items_and_options(target: Files) -> None:
    reference = StyleBank(target).draw("fog")
    with pytest.raises(ValueError, match="wrap the source in StyledDataset"):
        StyliseSource()({"img": np.zeros((4, 4, 3), np.uint8)})
    with pytest.raises(ValueError, match="put the transform that loads it before"):
        StyliseSource()({"style_reference": reference})
    with pytest.raises(ValueError, match=r"img must be an RGB picture of shape \(H, W, 3\), got \(4, 4\)"):
        StyliseSource()({"img": np.zeros((4, 4), np.uint8), "style_reference": reference})
    with pytest.raises(ValueError, match="method is one of colour, fda"):
        StyliseSource("gan")
    with pytest.raises(ValueError, match="channel_order is one of"):
        StyliseSource(channel_order="gbr")
    with pytest.raises(ValueError, match="strength must be two numbers"):
        StyliseSource(strength=(0, 2))
    with pytest.raises(ValueError, match="beta must be two numbers"):
        StyliseSource(beta=(0.2, 0.1))
