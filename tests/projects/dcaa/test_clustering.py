"""Conditions found by the pictures' style."""

import itertools

import faiss
import numpy as np
import pytest
from PIL import Image

pytest.importorskip("mmseg")

from alimm.projects.dcaa.clustering import Clusters, assign_or_cluster, cluster_conditions, style_features
from alimm.projects.dcaa.conditions import resolve_conditions
from alimm.projects.dcaa.synthetic.dataset import SyntheticWeatherDataset
from alimm.seeding import numpy_stream
from tests.projects.dcaa.test_datasets import write


def agreement(a, b):
    """Adjusted Rand index, by looking at every pair: 1 for the same groups, 0 on average by chance."""
    pairs = list(itertools.combinations(range(len(a)), 2))
    in_a, in_b = (np.array([labels[i] == labels[j] for i, j in pairs]) for labels in (a, b))
    both, chance = (in_a & in_b).sum(), in_a.sum() * in_b.sum() / len(pairs)
    return (both - chance) / ((in_a.sum() + in_b.sum()) / 2 - chance)


def styles(count, name="train"):
    """Pictures of three styles, in turn: dark, noisy grey, bright blue."""
    pictures = []
    for number in range(count):
        stream = numpy_stream(0, f"test/{name}", number)
        base = [(20, 20, 25), (110, 110, 110), (120, 180, 250)][number % 3]
        noise = stream.normal(0, [4, 30, 4][number % 3], (20, 36, 3)) + stream.normal(0, 6)
        pictures.append(np.clip(np.array(base) + noise, 0, 255).astype(np.uint8))
    return pictures


@pytest.fixture(scope="module")
def weather():
    data = SyntheticWeatherDataset(domain="target", num=24, with_labels=False)
    return [data.raw_item(row)["img"][..., ::-1] for row in range(len(data))], data.condition_ids()


def test_finds_the_weather(weather):
    pictures, ids = weather
    clusters = cluster_conditions(pictures[::2], 5)
    assert agreement(ids[::2], clusters.ids) > 0.8
    others = [clusters.assign(picture) for picture in pictures[1::2]]
    assert agreement(ids[1::2], others) > 0.8
    assert agreement(ids, np.roll(ids, 12)) < 0.5


def test_same_pictures_and_seed_give_the_same_styles_and_faiss_keeps_its_threads():
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(3)
    try:
        first, second = (cluster_conditions(styles(12), 3, seed=4) for _ in range(2))
        assert faiss.omp_get_max_threads() == 3
    finally:
        faiss.omp_set_num_threads(before)
    np.testing.assert_array_equal(first.centres, second.centres)
    assert first.ids.tolist() == [0, 1, 2] * 4, "numbered from dark to bright"
    assert first.names == ("style0", "style1", "style2")


def test_assign_finds_the_nearest_centre_in_standardised_features():
    pictures = styles(9)
    clusters = cluster_conditions(pictures, 3)
    features = np.stack([style_features(picture) for picture in pictures])
    rows = (features - features.mean(0)) / features.std(0)
    for picture, row, own in zip(pictures, rows, clusters.ids, strict=True):
        expected = min(range(3), key=lambda number: np.square(row - clusters.centres[number]).sum())
        assert clusters.assign(picture) == expected == own


def test_first_features_are_lab_means_and_sizes_do_not_matter():
    grey = style_features(np.full((40, 60, 3), 119, np.uint8))
    np.testing.assert_allclose(grey[:6], [50.03, 0, 0, 0, 0, 0], atol=0.3)
    large = style_features(np.full((400, 600, 3), 119, np.uint8))
    np.testing.assert_allclose(grey, large, atol=1e-5)
    red = style_features(np.full((40, 60, 3), (255, 0, 0), np.uint8))
    np.testing.assert_allclose(red[:3], [53.24, 80.09, 67.2], atol=0.3)
    assert style_features(np.zeros((1, 1), np.uint8)).shape == (27,)
    assert np.isfinite(style_features(np.zeros((1, 1), np.uint8))).all()


def test_equal_pictures_do_not_divide_by_zero():
    clusters = cluster_conditions([np.full((8, 8, 3), 7, np.uint8)] * 3, 1)
    assert np.isfinite(clusters.centres).all()
    assert clusters.ids.tolist() == [0, 0, 0]


def test_saved_styles_are_the_same(tmp_path):
    clusters = cluster_conditions(styles(9), 3)
    clusters.save(tmp_path / "deep" / "styles.json")
    loaded = Clusters.load(tmp_path / "deep" / "styles.json")
    for name in ("ids", "centres", "mean", "std"):
        np.testing.assert_array_equal(getattr(loaded, name), getattr(clusters, name))
        assert getattr(loaded, name).dtype == getattr(clusters, name).dtype
    assert [file.name for file in (tmp_path / "deep").iterdir()] == ["styles.json"]


def test_rule_gives_other_pictures_the_styles_of_the_file(tmp_path):
    train, val = ([str(tmp_path / name / f"{i}.png") for i in range(n)] for name, n in (("train", 9), ("val", 4)))
    for path, picture in zip([*train, *val], [*styles(9), *styles(6, "val")[2:]], strict=True):
        write(path, picture)
    rule = {"type": "clusters", "k": 3, "file": str(tmp_path / "styles.json")}
    with pytest.raises(ValueError, match="build the training set first"):
        resolve_conditions(val, rule | {"fit": False})
    names, conditions = resolve_conditions(train, rule)
    assert names == ["style0", "style1", "style2"] * 3
    assert resolve_conditions(val, rule | {"fit": False}) == (["style2", "style0", "style1", "style2"], conditions)
    assert resolve_conditions(val[:1], rule, root=tmp_path)[1] == conditions == ("style0", "style1", "style2")
    assert resolve_conditions(train, rule | {"rename": {"style0": "night"}})[1] == ("night", "style1", "style2")
    with pytest.raises(ValueError, match="holds 3 styles, wanted k=4"):
        resolve_conditions(val, rule | {"k": 4})
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(train[2])
    assert assign_or_cluster(train, 3, rule["file"])[2] == 2, "known pictures are not read again"


def test_wrong_requests(tmp_path):
    with pytest.raises(ValueError, match=r"2 pictures cannot form k=3 styles"):
        cluster_conditions(styles(2), 3)
    with pytest.raises(ValueError, match="at least 1"):
        cluster_conditions(styles(2), 0)
    with pytest.raises(ValueError, match="no picture"):
        cluster_conditions([str(tmp_path / "none.png")], 1)
    (tmp_path / "styles.json").write_text("[]")
    with pytest.raises(ValueError, match="holds no styles of this version"):
        Clusters.load(tmp_path / "styles.json")
    (tmp_path / "styles.json").write_text("[")
    with pytest.raises(ValueError, match="is damaged"):
        Clusters.load(tmp_path / "styles.json")
    with pytest.raises(ValueError, match="no file of styles"):
        Clusters.load(tmp_path / "nothing.json")
