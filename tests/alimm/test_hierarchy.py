"""HierarchyVectors against a slow computation from the formula, and the models on vectors."""

from __future__ import annotations

import math
import pickle
import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mmengine.dataset import ConcatDataset, pseudo_collate
from torch.utils.data import DataLoader

from alimm.datasets import HierarchyVectors
from alimm.datasets.hierarchy import counter_bits, counter_normals
from alimm.models import ImageClassifier, VectorBackbone, VectorPreprocessor
from alimm.seeding import stream_seed

MASK = 2**64 - 1


def splitmix64(key, counter):
    """The published algorithm, on Python's integers: the state has taken ``counter + 1`` steps."""
    z = (key + (counter + 1) * 0x9E3779B97F4A7C15) & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def normal_row(key, row, dim):
    half = (dim + 1) // 2
    uniform = [((splitmix64(key, row * 2 * half + k) >> 11) + 0.5) / 2**53 for k in range(2 * half)]
    pairs = [(math.sqrt(-2 * math.log(uniform[k])), 2 * math.pi * uniform[half + k]) for k in range(half)]
    return ([r * math.cos(t) for r, t in pairs] + [r * math.sin(t) for r, t in pairs])[:dim]


def test_the_generator_gives_the_published_numbers():
    # The first outputs of SplitMix64 from the state 1234567.
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    assert counter_bits(1234567, np.arange(4, dtype=np.uint64)).tolist() == published


@given(st.integers(0, 2**63 - 1), st.integers(0, 2**40), st.integers(1, 9))
@settings(max_examples=30, deadline=None)
def test_a_row_of_normals_is_that_of_the_slow_loop(key, row, dim):
    rows = np.array([row, row + 1])
    assert np.allclose(counter_normals(key, rows, dim)[0], normal_row(key, row, dim), rtol=0, atol=1e-12)


def test_normals_are_normal():
    values = counter_normals(5, np.arange(4000), 50)
    assert abs(values.mean()) < 0.01
    assert abs(values.std() - 1) < 0.01
    assert abs((values**4).mean() - 3) < 0.1
    assert np.abs(np.corrcoef(values.T) - np.eye(50)).max() < 0.1
    assert np.abs(np.corrcoef(values[:60]) - np.eye(60)).max() < 0.7


def test_samples_follow_the_formula():
    data = HierarchyVectors(3, 4, dim=5, samples_per_class=2, spread=0.3, noise=0.8, subset="test", seed=7)

    def unit(values):
        return np.array(values) / math.sqrt(sum(value * value for value in values))

    keys = [stream_seed(7, f"hierarchy_vectors/{name}") for name in ("coarse", "fine", "noise/test")]
    assert len(data) == 24
    assert data.metainfo == dict(num_classes=12, coarse=3, fine=4)
    for idx in range(24):
        label = idx // 2
        vector = unit(normal_row(keys[0], label // 4, 5)) + 0.3 * unit(normal_row(keys[1], label, 5))
        assert np.allclose(data.centres([label])[0], vector, atol=1e-12)
        vector = vector + 0.8 * np.array(normal_row(keys[2], idx, 5)) / math.sqrt(5)
        item = data.get_data_info(idx)
        assert np.allclose(item["vector"], vector, atol=1e-6)
        assert item["vector"].dtype == np.float32
        assert (item["gt_label"], item["gt_identity"], item["sample_id"]) == (label, label // 4, f"test/{idx:07d}")
        assert data.get_cat_ids(idx) == [label]


def test_the_two_sides_share_centres_and_not_noise():
    train, test = (HierarchyVectors(4, 8, dim=16, subset=subset) for subset in ("train", "test"))
    other = HierarchyVectors(4, 8, dim=16, seed=1)
    everything = np.arange(32)
    assert np.array_equal(train.centres(everything), test.centres(everything))
    assert not np.allclose(train.vectors(everything), test.vectors(everything))
    assert not np.allclose(train.centres(everything), other.centres(everything))


def test_brothers_are_nearer_than_strangers_and_noise_confuses_them():
    data = HierarchyVectors(40, 10, dim=64, spread=0.4)
    centres = data.centres(np.arange(400))
    distance = np.linalg.norm(centres[:, None] - centres[None], axis=2)
    brothers = (np.arange(400)[:, None] // 10 == np.arange(400) // 10) & ~np.eye(400, dtype=bool)
    strangers = np.arange(400)[:, None] // 10 != np.arange(400) // 10
    assert distance[brothers].mean() == pytest.approx(0.4 * math.sqrt(2), abs=0.03)
    assert distance[brothers].max() < distance[strangers].min()
    right = []
    for noise in (0.5, 2.0):
        vectors = HierarchyVectors(40, 10, dim=64, spread=0.4, noise=noise).vectors(np.arange(400))
        nearest = np.linalg.norm(vectors[:, None] - centres[None], axis=2).argmin(1)
        right.append((nearest == np.arange(400)).mean())
    assert right[0] > 0.98 > 0.8 > right[1] > 0.1


@given(st.integers(1, 5), st.integers(1, 5), st.integers(1, 3), st.data())
@settings(max_examples=30, deadline=None)
def test_a_part_is_spread_evenly(coarse, fine, each, draw):
    whole = HierarchyVectors(coarse, fine, dim=3, samples_per_class=each)
    count = draw.draw(st.integers(1, len(whole)))
    part = HierarchyVectors(coarse, fine, dim=3, samples_per_class=each, num_samples=count)
    chosen = [place * len(whole) // count for place in range(count)]
    assert len(part) == count == len(set(chosen))
    assert np.array_equal(part.vectors(np.arange(count)), whole.vectors(chosen))
    assert part.labels(range(count)).tolist() == whole.labels(chosen).tolist()
    assert [part.get_data_info(place)["sample_id"] for place in range(count)] == [f"train/{row:07d}" for row in chosen]


def test_the_loader_gets_whole_batches():
    data = HierarchyVectors(5, 4, dim=6, samples_per_class=3)
    batches = list(DataLoader(data, batch_size=16, collate_fn=pseudo_collate))
    assert [len(batch["inputs"]) for batch in batches] == [16, 16, 16, 12]
    for batch, start in zip(batches, range(0, 60, 16), strict=True):
        for offset, (vector, sample) in enumerate(zip(batch["inputs"], batch["data_samples"], strict=True)):
            single = data[start + offset]
            assert torch.equal(vector, single["inputs"])
            assert sample.gt_label.tolist() == [(start + offset) // 3] == single["data_samples"].gt_label.tolist()
            assert sample.gt_identity.tolist() == [(start + offset) // 12]
            assert sample.sample_id == single["data_samples"].sample_id == f"train/{start + offset:07d}"
    assert torch.equal(data[-1]["inputs"], data[59]["inputs"])
    assert len(list(data)) == 60
    with pytest.raises(IndexError, match="no item 60, they are 0 to 59"):
        data[60]
    with pytest.raises(IndexError, match="no class 20"):
        data.centres([3, 20])


def test_it_lives_in_wrappers_and_survives_copies():
    data = HierarchyVectors(2, 3, dim=4)
    both = ConcatDataset([data, HierarchyVectors(2, 3, dim=4)])
    assert len(both) == 12
    assert torch.equal(both[8]["inputs"], data[2]["inputs"])
    assert torch.equal(pickle.loads(pickle.dumps(data))[5]["inputs"], data[5]["inputs"])
    with pytest.raises(ValueError, match="num_samples"):
        data.get_subset(3)


def test_a_batch_of_a_hundred_million_classes_costs_a_batch():
    tracemalloc.start()
    data = HierarchyVectors(100_000, 1_000, dim=128, samples_per_class=10)
    batch = data.__getitems__(range(999_999_000, 999_999_256))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert batch[-1]["data_samples"].gt_label.item() == 99_999_925
    assert peak < 20 * 256 * 128 * 8


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(subset="val"), "subset must be train or test, got 'val'"),
        (dict(coarse=0), "coarse must be a whole number of at least 1, got 0"),
        (dict(fine=2.0), "fine must be a whole number"),
        (dict(samples_per_class=True), "samples_per_class must be"),
        (dict(noise=float("nan")), "noise must be a number of at least 0, got nan"),
        (dict(spread=-1), "spread must be"),
        (dict(num_samples=7), "num_samples must be None or 1 to 6, got 7"),
        (dict(num_samples=0), "got 0"),
        (dict(coarse=2**40, fine=2**20), "more than can be counted"),
    ],
)
def test_wrong_arguments(change, message):
    with pytest.raises(ValueError, match=message):
        HierarchyVectors(**dict(coarse=2, fine=3, dim=4) | change)


def test_a_classifier_of_vectors_learns_the_classes():
    torch.manual_seed(0)
    data = HierarchyVectors(5, 4, dim=16, samples_per_class=20, spread=0.8, noise=0.7)
    model = ImageClassifier(
        data_preprocessor=dict(type="alimm.VectorPreprocessor"),
        backbone=dict(type="alimm.VectorBackbone", in_channels=16, hidden_channels=32, out_channels=24),
        head=dict(type="alimm.CosineHead", num_classes=20, in_channels=24),
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)
    batch = model.data_preprocessor(pseudo_collate(data.__getitems__(range(len(data)))), True)
    assert batch["inputs"].shape == (400, 16)
    for _ in range(60):
        loss = model(**batch, mode="loss")["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    unseen = HierarchyVectors(5, 4, dim=16, samples_per_class=20, spread=0.8, noise=0.7, subset="test")
    batch = model.data_preprocessor(pseudo_collate(unseen.__getitems__(range(len(unseen)))))
    predicted = torch.cat([sample.pred_label for sample in model(**batch, mode="predict")])
    assert (predicted == torch.from_numpy(unseen.labels(range(400)))).float().mean() > 0.8


def test_the_backbone_is_its_matrices():
    single = VectorBackbone(3, 2)
    x = torch.randn(5, 3)
    assert torch.allclose(single(x), x @ single.layers[0].weight.T + single.layers[0].bias, atol=1e-6)
    double = VectorBackbone(3, 2, hidden_channels=7)
    hidden = (x @ double.layers[0].weight.T + double.layers[0].bias).clamp(min=0)
    assert torch.allclose(double(x), hidden @ double.layers[2].weight.T + double.layers[2].bias, atol=1e-6)
    assert double(x[:0]).shape == (0, 2)
    with pytest.raises(ValueError, match=r"expects \(B, 3\), got \(5, 4\)"):
        double(torch.randn(5, 4))
    with pytest.raises(ValueError, match="must be at least 1, got 3, 0 and 2"):
        VectorBackbone(3, 2, hidden_channels=0)


def test_the_preprocessor_stacks_or_says_why_not():
    stack = VectorPreprocessor()
    vectors = [torch.arange(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)]
    for inputs in (vectors, torch.stack(vectors)):
        done = stack(dict(inputs=inputs, data_samples=["a", "b"]), training=True)
        assert done["inputs"].dtype == torch.float32
        assert done["inputs"].tolist() == [[0, 1, 2], [1, 1, 1]]
        assert done["data_samples"] == ["a", "b"]
    with pytest.raises(ValueError, match=r"\[\(3,\), \(4,\)\]"):
        stack(dict(inputs=[torch.ones(3), torch.ones(4)]))
    with pytest.raises(ValueError, match="ClsDataPreprocessor"):
        stack(dict(inputs=torch.ones(2, 3, 8, 8)))
