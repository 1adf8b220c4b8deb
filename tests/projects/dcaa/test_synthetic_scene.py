"""The geometry and the colours of the synthetic streets."""

import zlib

import numpy as np
import pytest

pytest.importorskip("mmseg")

from alimm.projects.dcaa.synthetic import CLASSES, PALETTE, draw_scene, paint
from alimm.projects.dcaa.synthetic.noise import smooth_noise
from alimm.projects.dcaa.synthetic.scene import BUILDING, CAR, PERSON, ROAD, SKY, SKY_DEPTH
from alimm.seeding import numpy_stream

GOLDEN = [2885806340, 3790472984, 2174437468]
SIZES = [(64, 128), (65, 131), (256, 512), (16, 16), (33, 200)]


def crc(array):
    return zlib.crc32(np.ascontiguousarray(array).tobytes())


@pytest.mark.parametrize("size", SIZES)
def test_a_scene_has_maps_of_the_size_that_agree_with_each_other(size):
    for index in range(4):
        scene = draw_scene(0, index, size)
        assert scene.label.shape == scene.depth.shape == scene.part.shape == size
        assert (scene.label.dtype, scene.depth.dtype, scene.part.dtype) == (np.uint8, np.float32, np.uint8)
        np.testing.assert_array_equal(scene.part_class[scene.part], scene.label)
        assert len(scene.part_class) == len(scene.part_kind)
        assert ((scene.depth > 0) & (scene.depth <= SKY_DEPTH)).all()
        assert (scene.depth[scene.label == SKY] == SKY_DEPTH).all()
        assert (scene.depth[(scene.label != SKY) & (np.arange(size[0]) > scene.horizon + 2)[:, None]] < SKY_DEPTH).all()


def test_the_road_lies_where_the_pinhole_camera_sees_it():
    for index in range(6):
        scene = draw_scene(3, index)
        left, right = scene.road
        rows, columns = np.nonzero(scene.label == ROAD)
        assert len(rows)
        for row, column in list(zip(rows, columns, strict=True))[::37]:
            depth = 1.5 * 60 / (row + 0.5 - scene.horizon)
            across = (column + 0.5 - scene.vanish) * depth / 60
            assert scene.depth[row, column] == pytest.approx(min(depth, 300), rel=1e-6)
            assert left <= across <= right


def test_a_scene_is_the_same_at_another_size():
    agreement = []
    for index in range(5):
        small, large = draw_scene(0, index, (64, 128)), draw_scene(0, index, (256, 512))
        agreement.append((small.label == large.label[2::4, 2::4]).mean())
    assert np.mean(agreement) > 0.9
    assert (small.label == draw_scene(0, 99).label).mean() < 0.8


def test_each_class_has_its_share_and_is_in_most_pictures():
    labels = np.stack([draw_scene(0, index).label for index in range(100)])
    share = np.bincount(labels.ravel(), minlength=len(CLASSES)) / labels.size
    low = dict(sky=0.08, building=0.18, vegetation=0.06, road=0.25, sidewalk=0.04, car=0.02, person=0.008, pole=0.012)
    high = dict(sky=0.22, building=0.36, vegetation=0.2, road=0.45, sidewalk=0.12, car=0.06, person=0.03, pole=0.045)
    for number, name in enumerate(CLASSES):
        assert low[name] < share[number] < high[name], name
        assert np.mean([(label == number).any() for label in labels]) > 0.85, name
    assert len(CLASSES) == len(PALETTE) == len(set(PALETTE)) == len(share)


def test_things_stand_on_the_ground_and_the_near_hide_the_far():
    for index in range(10):
        scene = draw_scene(1, index)
        for label in (CAR, PERSON):
            for part in np.unique(scene.part[scene.label == label]):
                rows, columns = np.nonzero(scene.part == part)
                depths = np.unique(scene.depth[rows, columns])
                assert len(depths) == 1
                # No lower than the ground at that distance, up to rounding.
                assert rows.max() <= scene.horizon + 1.5 * 60 / depths[0] + 1
        # Whatever stands on the ground hides it: it is never farther than the ground in its pixel.
        below = np.arange(64) + 0.5 - scene.horizon
        ground = 90 / below[below > 0]
        assert (scene.depth[below > 0] <= ground[:, None] * 1.1 + 1).all()


def test_houses_reach_down_to_the_ground():
    feet = []
    for index in range(10):
        scene = draw_scene(2, index)
        ground = (scene.part >= 1) & (scene.part <= 5)
        for row, column in np.argwhere((scene.label[:-1] == BUILDING) & ground[1:]):
            metre = scene.depth[row, column] / 60
            feet.append((1.5 - (row + 1 - scene.horizon) * metre) / metre)
    # The lower edge of the lowest pixel of a wall, in pixels above the ground.
    assert len(feet) > 100
    assert np.abs(feet).max() <= 0.5 + 1e-3


def test_the_same_numbers_give_the_same_scene_and_others_do_not():
    one, again = draw_scene(5, 2), draw_scene(5, 2)
    for name in ("label", "depth", "part", "part_class", "part_kind"):
        np.testing.assert_array_equal(getattr(one, name), getattr(again, name))
    assert crc(one.label) != crc(draw_scene(5, 3).label)
    assert crc(one.label) != crc(draw_scene(6, 2).label)


def test_the_labels_of_a_few_scenes_stay_as_they_are():
    assert [crc(draw_scene(0, index).label) for index in range(3)] == GOLDEN


@pytest.mark.parametrize("size", [(16, 15), (8, 128)])
def test_a_size_too_small_is_refused(size):
    with pytest.raises(ValueError, match="at least 16"):
        draw_scene(0, 0, size)


@pytest.mark.parametrize("size", SIZES)
def test_a_painted_street_is_a_picture(size):
    for domain in ("source", "target"):
        image = paint(draw_scene(0, 1, size), domain, 0.5, np.random.default_rng(0))
        assert image.shape == (*size, 3)
        assert image.dtype == np.float32
        assert image.min() >= 0
        assert image.max() <= 255
        assert image.std() > 15


def _paint(index, domain, alpha):
    return paint(draw_scene(0, index), domain, alpha, numpy_stream(0, "test", index))


def test_alpha_moves_the_target_and_never_the_source():
    np.testing.assert_array_equal(_paint(0, "source", 0.0), _paint(0, "source", 1.0))
    np.testing.assert_array_equal(_paint(0, "source", 0.7), _paint(0, "target", 0.0))

    def colourfulness(alpha):
        images = np.stack([_paint(index, "target", alpha) for index in range(8)])
        return (images.max(-1) - images.min(-1)).mean()

    def fineness(alpha):
        images = np.stack([_paint(index, "target", alpha) for index in range(8)])
        road = np.stack([draw_scene(0, index).label == ROAD for index in range(8)])
        return np.abs(np.diff(images, axis=2))[road[:, :, 1:]].mean()

    for measure in (colourfulness, fineness):
        values = [measure(alpha) for alpha in (0.0, 0.5, 1.0)]
        assert values[0] > values[1] > values[2], measure


def test_a_class_varies_from_picture_to_picture():
    means = np.stack([_paint(index, "source", 0)[draw_scene(0, index).label == ROAD].mean(0) for index in range(12)])
    assert (means.std(0) > 3).all()


def test_smooth_noise_is_smooth_and_of_mean_zero():
    field = smooth_noise(np.random.default_rng(0), 200, 300, 10)
    assert abs(field.mean()) < 0.1
    assert 0.4 < field.std() < 1.0
    steps = np.abs(np.diff(field, axis=1)).mean()
    assert steps < 0.2 * field.std()
    assert smooth_noise(np.random.default_rng(0), 3, 5, 100).shape == (3, 5)
    assert np.abs(np.diff(smooth_noise(np.random.default_rng(0), 200, 300, 40), axis=1)).mean() < 0.5 * steps


@pytest.mark.parametrize(("domain", "alpha", "text"), [("Source", 0.1, "domain"), ("target", 1.2, "alpha")])
def test_wrong_painting_is_refused(domain, alpha, text):
    with pytest.raises(ValueError, match=text):
        paint(draw_scene(0, 0), domain, alpha, np.random.default_rng(0))
