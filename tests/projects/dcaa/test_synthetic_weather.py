"""Weather on the synthetic streets."""

import numpy as np
import pytest

pytest.importorskip("mmseg")

from alimm.projects.dcaa.synthetic import CONDITIONS, apply_weather, draw_scene, paint
from alimm.projects.dcaa.synthetic.scene import CAR, ROAD, SIDEWALK, SKY

ADVERSE = CONDITIONS[1:]


def street(index, size=(64, 128)):
    scene = draw_scene(0, index, size)
    return scene, paint(scene, "target", 0.45, np.random.default_rng(index))


def weather(index, condition, severity=1.0, seed=7, size=(64, 128)):
    scene, image = street(index, size)
    return apply_weather(image, scene.depth, scene.label, condition, severity, np.random.default_rng(seed))


def test_the_conditions():
    assert CONDITIONS == ("clear", "fog", "rain", "night", "snow")


@pytest.mark.parametrize("condition", CONDITIONS)
@pytest.mark.parametrize("size", [(64, 128), (65, 131), (256, 512), (16, 16)])
def test_a_picture_of_bytes_and_no_weather_at_severity_0(condition, size):
    scene, image = street(2, size)
    out = weather(2, condition, 0.0, size=size)
    assert out.dtype == np.uint8
    np.testing.assert_array_equal(out, np.rint(image).astype(np.uint8))
    full = weather(2, condition, 1.0, size=size)
    assert full.shape == (*size, 3)
    assert (full != out).any() == (condition != "clear")
    assert scene.label.shape == size


@pytest.mark.parametrize("condition", CONDITIONS)
def test_weather_reads_and_never_writes(condition):
    scene, image = street(0)
    before = image.copy(), scene.depth.copy(), scene.label.copy()
    apply_weather(image, scene.depth, scene.label, condition, 1.0, np.random.default_rng(0))
    for now, then in zip((image, scene.depth, scene.label), before, strict=True):
        np.testing.assert_array_equal(now, then)


@pytest.mark.parametrize("condition", ADVERSE)
def test_severity_is_a_straight_line_from_the_clear_picture(condition):
    _, image = street(3)
    full = weather(3, condition, 1.0).astype(float)
    half = weather(3, condition, 0.5).astype(float)
    inside = (full > 0) & (full < 255)
    np.testing.assert_allclose(half[inside], (image + full)[inside] / 2, atol=0.76)


def test_fog_is_koschmieders_law():
    scene, image = street(4)
    out = weather(4, "fog").astype(float)
    generator = np.random.default_rng(7)
    density, air = generator.uniform(0.03, 0.07), generator.uniform(190, 215)
    for row, column in [(0, 0), (30, 64), (40, 20), (60, 100)]:
        passed = np.exp(-density * scene.depth[row, column])
        for channel, tint in enumerate((0.99, 1.0, 1.01)):
            wanted = image[row, column, channel] * passed + air * tint * (1 - passed)
            assert out[row, column, channel] == pytest.approx(wanted, abs=0.51)


def test_fog_hides_the_far_more_than_the_near():
    label = np.full((16, 40), ROAD, np.uint8)
    depth = np.tile(np.linspace(2, 150, 40, dtype=np.float32), (16, 1))
    image = np.full((16, 40, 3), 40, np.float32)
    out = apply_weather(image, depth, label, "fog", 1.0, np.random.default_rng(0))[0, :, 1].astype(int)
    assert (np.diff(out) >= 0).all()
    assert out[0] < 70
    assert out[-1] > 180


def test_night_is_dark_and_bluish_but_for_its_warm_lamps():
    for index in range(5):
        scene, image = street(index)
        out = weather(index, "night").astype(float)
        assert out.mean() < 0.5 * image.mean()
        dim = out.sum(-1) < np.median(out.sum(-1))
        lit = out.sum(-1) > np.quantile(out.sum(-1), 0.99)
        blueness = lambda picture, where: (picture[..., 2] - picture[..., 0])[where].mean()
        assert blueness(out, lit) < blueness(out, dim)
        assert out[scene.label == SKY].mean() < 80


def test_a_night_without_anything_that_shines_has_no_lamps():
    label = np.full((32, 32), ROAD, np.uint8)
    out = apply_weather(
        np.full((32, 32, 3), 100.0, np.float32), np.full((32, 32), 9, np.float32), label, "night", 1.0,
        np.random.default_rng(0),
    )  # fmt: skip
    assert out.max() < 80


def test_rain_dulls_mirrors_in_the_road_and_draws_streaks():
    for index in range(5):
        _, image = street(index)
        assert weather(index, "rain").std() < image.std()
    # A scene in two halves: what is left and right above the road is seen left and right in it.
    label = np.full((64, 128), SKY, np.uint8)
    label[32:] = ROAD
    image = np.full((64, 128, 3), 90, np.float32)
    image[:32, :64], image[:32, 64:] = 10, 240
    out = apply_weather(image, np.full(label.shape, 5, np.float32), label, "rain", 1.0, np.random.default_rng(0))
    road = np.median(out[34:, :, 1], axis=0)
    assert np.median(road[64:]) - np.median(road[:64]) > 25
    label[32:] = CAR
    dry = apply_weather(image, np.full(label.shape, 5, np.float32), label, "rain", 1.0, np.random.default_rng(0))
    columns = np.median(dry[34:, :, 1], axis=0)
    assert np.median(columns[64:]) - np.median(columns[:64]) < 3
    # Against the same rain on a wall without texture, streaks are the pixels that stand out.
    flat = np.full((64, 128, 3), 90, np.float32)
    wet = apply_weather(flat, np.full(label.shape, 5, np.float32), label, "rain", 1.0, np.random.default_rng(3))
    bright = wet[..., 1] > np.median(wet[..., 1]) + 20
    assert 0.03 < bright.mean() < 0.2


def test_snow_lies_on_the_ground_and_flakes_are_everywhere():
    for index in range(5):
        scene, image = street(index)
        out = weather(index, "snow").astype(float)
        for label in (ROAD, SIDEWALK):
            where = scene.label == label
            assert (out[where].mean(-1) > 190).mean() > (image[where].mean(-1) > 190).mean() + 0.1
    dark = np.full((64, 128), CAR, np.uint8)
    out = apply_weather(
        np.full((64, 128, 3), 20.0, np.float32), np.full(dark.shape, 1, np.float32), dark, "snow", 1.0,
        np.random.default_rng(0),
    )  # fmt: skip
    assert (out == 245).all(-1).mean() == pytest.approx(0.02, abs=0.006)
    assert np.median(out) < 70


@pytest.mark.parametrize("condition", ADVERSE)
def test_weather_is_drawn_from_the_generator(condition):
    np.testing.assert_array_equal(weather(1, condition, seed=1), weather(1, condition, seed=1))
    assert (weather(1, condition, seed=1) != weather(1, condition, seed=2)).mean() > 0.05


def test_what_does_not_fit_is_refused():
    scene, image = street(0)
    generator = np.random.default_rng(0)
    with pytest.raises(ValueError, match="clear, fog, rain, night, snow, got 'hail'"):
        apply_weather(image, scene.depth, scene.label, "hail", 1.0, generator)
    with pytest.raises(ValueError, match="severity"):
        apply_weather(image, scene.depth, scene.label, "fog", 1.01, generator)
    with pytest.raises(ValueError, match="depth and label"):
        apply_weather(image, scene.depth[:-1], scene.label, "fog", 1.0, generator)
    with pytest.raises(ValueError, match="depth and label"):
        apply_weather(image[..., 0], scene.depth, scene.label, "fog", 1.0, generator)
