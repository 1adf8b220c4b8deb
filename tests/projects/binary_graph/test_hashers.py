"""Hashes: angles, objectives, recall on real data, files."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alimm.projects.binary_graph import linear_hasher
from alimm.projects.binary_graph.hashers import HASHERS, Hasher, load_hasher, make_hasher
from alimm.projects.binary_graph.itq import itq_rotation
from alimm.projects.binary_graph.linear_hasher import haar, principal_directions, random_directions, stream
from alimm.projects.binary_graph.packing import pack_bits, unpack_bits
from alimm.seeding import numpy_stream
from tests.projects.binary_graph.hash_data import digits, patches, recall

NAMES = sorted(HASHERS)


def blob(count: int = 300, dim: int = 24, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.standard_normal((count, dim)) * np.linspace(3, 0.3, dim) + 5).astype(np.float32)


def test_the_streams_are_those_of_alimm():
    assert stream(7, "some.name", 1, 2).random() == numpy_stream(7, "some.name", 1, 2).random()


def test_names_and_protocol():
    assert NAMES == ["itq", "lph", "pca", "srp"]
    for name in NAMES:
        assert isinstance(make_hasher(name, 64), Hasher)
        assert make_hasher(name, 64).dim is None
    with pytest.raises(ValueError, match="hasher must be one of srp, pca, itq, lph, got 'lsh'"):
        make_hasher("lsh")
    with pytest.raises(ValueError, match="multiple of 64 bits from 64 to 1024, got 100"):
        make_hasher("itq", 100)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bits", [64, 128])
def test_codes_are_the_signs_of_the_centred_projections(name, bits):
    x = blob(dim=100)
    hasher = make_hasher(name, bits, seed=3).fit(x)
    state = hasher.state()
    expected = (x.astype(np.float64) - x.astype(np.float64).mean(axis=0)) @ state["directions"] > 0
    np.testing.assert_array_equal(hasher.encode(x), pack_bits(expected))
    again = make_hasher(name, bits, seed=3).fit(x)
    np.testing.assert_array_equal(again.encode(x), hasher.encode(x))
    if name != "pca":  # which draws nothing while the bits are fewer than the dimensions
        assert (make_hasher(name, bits, seed=4).fit(x).encode(x) != hasher.encode(x)).any()
    # Every bit is worth something, also those beyond the dimensions.
    means = unpack_bits(hasher.encode(x)).mean(axis=0)
    assert ((means > 0.2) & (means < 0.8)).all()
    assert len(np.unique(unpack_bits(hasher.encode(x)), axis=1).T) == bits


@pytest.mark.parametrize("name", NAMES)
def test_a_code_does_not_depend_on_the_batch(name, monkeypatch):
    x = blob()
    hasher = make_hasher(name, 128).fit(x)
    codes = hasher.encode(x)
    np.testing.assert_array_equal(np.concatenate([hasher.encode(row[None]) for row in x]), codes)
    monkeypatch.setattr(linear_hasher, "_BLOCK_BYTES", 8 * (24 + 128) * 7)
    np.testing.assert_array_equal(hasher.encode(x), codes)
    np.testing.assert_array_equal(hasher.encode(x[::-1].astype(np.float64)), codes[::-1])
    assert hasher.encode(x[:0]).shape == (0, 2)


@settings(max_examples=15)
@given(st.integers(2, 40), st.floats(0.1, 3.0), st.integers(0, 2**32))
def test_srp_differs_in_theta_over_pi_of_the_bits(dim, theta, seed):
    rng = np.random.default_rng(seed)
    first, second = random_directions(rng, dim, 2).T
    other = np.cos(theta) * first + np.sin(theta) * second
    x = np.stack([first, other, -first, -other]).astype(np.float32)  # the mean is zero
    distances = []
    for run in range(12):
        codes = unpack_bits(make_hasher("srp", 512, seed=seed + run).fit(x).encode(x))
        distances.append((codes[0] != codes[1]).mean())
    # 6144 bits, at worst independent: five standard errors.
    assert np.mean(distances) == pytest.approx(theta / np.pi, abs=5 * 0.5 / np.sqrt(12 * 512))


def test_rotations_are_uniform():
    rng = np.random.default_rng(0)
    drawn = np.stack([haar(rng, 3) for _ in range(2000)])
    # Each entry has the mean 0 and the variance 1/3; five standard errors.
    assert np.abs(drawn.mean(axis=0)).max() < 5 * np.sqrt(1 / 3 / 2000)
    assert (drawn**2).mean(axis=0) == pytest.approx(np.full((3, 3), 1 / 3), abs=0.04)


def test_srp_directions_are_orthogonal_in_blocks():
    directions = random_directions(np.random.default_rng(0), 30, 64)
    np.testing.assert_allclose(directions[:, :30].T @ directions[:, :30], np.eye(30), atol=1e-12)
    np.testing.assert_allclose(directions[:, 30:60].T @ directions[:, 30:60], np.eye(30), atol=1e-12)
    np.testing.assert_allclose((directions**2).sum(axis=0), 1)


@pytest.mark.parametrize("shape", [(50, 8), (8, 50), (20, 20)])
def test_principal_directions_are_those_of_the_covariance(shape):
    x = np.random.default_rng(2).standard_normal(shape)
    x -= x.mean(axis=0)
    found = principal_directions(x, 5)
    _, vectors = np.linalg.eigh(np.cov(x.T))
    for column, vector in zip(found.T, vectors[:, ::-1][:, :5].T, strict=True):
        assert abs(column @ vector) == pytest.approx(1)
    flat = np.concatenate([x, np.zeros((len(x), 1)), x[:, :1]], axis=1)
    assert principal_directions(flat, 99).shape[1] == min(shape[0] - 1, shape[1])


def test_itq_never_raises_its_objective_and_lowers_it():
    x = blob(400, 64)
    hasher = make_hasher("itq", 64).fit(x)
    objective = np.array(hasher.objective)
    assert len(objective) == 51
    assert (np.diff(objective) <= 1e-12).all()
    assert objective[-1] < 0.95 * objective[0]
    directions = hasher.state()["directions"]
    np.testing.assert_allclose(directions.T @ directions, np.eye(64), atol=1e-9)
    # The recorded value is the one of the definition.
    v = x.astype(np.float64) - x.astype(np.float64).mean(axis=0)
    v /= np.sqrt(np.mean(v * v))
    projected = v @ directions
    signs = np.where(projected > 0, 1, -1)
    assert objective[-1] == pytest.approx(((signs - projected) ** 2).sum() / projected.size)
    assert (np.diff(make_hasher("itq", 192).fit(x).objective) <= 1e-12).all()


def test_itq_finds_the_rotation_of_a_cube():
    corners = np.random.default_rng(5).choice([-1.0, 1.0], (500, 4))
    turned = corners @ np.linalg.qr(np.random.default_rng(6).standard_normal((4, 4)))[0]
    best = min(
        itq_rotation(turned, np.linalg.qr(np.random.default_rng(s).standard_normal((4, 4)))[0])[1][-1] for s in range(5)
    )
    assert best < 1e-12


@pytest.mark.parametrize("data", [digits, patches], ids=["digits", "patches"])
def test_learned_hashes_find_at_least_what_random_ones_find(data):
    x = data()
    found = {name: np.mean([recall(make_hasher(name, 64, seed), x) for seed in range(2)]) for name in NAMES}
    assert found["srp"] > 0.4
    assert found["itq"] >= found["srp"], found
    assert found["lph"] >= found["srp"], found


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("x", [blob(1), blob(2), blob(5), np.ones((40, 6), np.float32), blob(40, 1), blob(9)[[0] * 9]])
def test_poor_data_still_give_a_hash(name, x):
    hasher = make_hasher(name, 128).fit(x)
    codes = hasher.encode(blob(50, x.shape[1], seed=9))
    assert codes.shape == (50, 2)
    if x.shape[1] > 1:
        assert len(np.unique(codes, axis=0)) > 10  # what is new gets codes of its own
    same = hasher.encode(np.concatenate([x[:1]] * 5))
    assert (same == same[0]).all()


@pytest.mark.parametrize("name", NAMES)
def test_constant_columns_and_large_scales_change_nothing(name):
    x = blob()
    flat = np.concatenate([x, np.full((len(x), 3), 0.1, np.float32)], axis=1)
    codes = make_hasher(name, 64).fit(flat).encode(flat)
    np.testing.assert_array_equal(np.concatenate([make_hasher(name, 64).fit(flat).encode(r[None]) for r in flat[:5]]),
                                  codes[:5])  # fmt: skip
    big = make_hasher(name, 64).fit(x * np.float32(2.0**100))
    np.testing.assert_array_equal(big.encode(x * np.float32(2.0**100)), make_hasher(name, 64).fit(x).encode(x))


@pytest.mark.parametrize("name", NAMES)
def test_data_that_do_not_move_have_the_code_zero(name):
    x = np.full((41, 6), 0.1, np.float32)
    assert not make_hasher(name, 64).fit(x).encode(x).any()


def test_a_large_training_set_is_sampled(monkeypatch):
    monkeypatch.setattr(linear_hasher, "TRAINING_ROWS", 50)
    x = blob(500)
    hasher = make_hasher("pca", 64).fit(x)
    rows = np.sort(stream(0, "binary_graph.hash.sample").choice(500, 50, replace=False))
    np.testing.assert_allclose(hasher.state()["mean"], x[rows].astype(np.float64).mean(axis=0))


def test_mistakes_are_named_and_change_nothing():
    x = blob()
    hasher = make_hasher("itq", 64)
    with pytest.raises(ValueError, match="hasher itq is not fitted: call fit"):
        hasher.encode(x)
    with pytest.raises(ValueError, match="not fitted"):
        hasher.state()
    with pytest.raises(ValueError, match="no vectors"):
        hasher.fit(x[:0])
    hasher.fit(x)
    before = hasher.encode(x)
    spoilt = x.copy()
    spoilt[17, 3] = np.nan
    for action in (hasher.fit, hasher.encode):
        with pytest.raises(ValueError, match="x row 17 holds NaN"):
            action(spoilt)
    with pytest.raises(ValueError, match="row 2 holds NaN or a value beyond float32"):
        hasher.encode(np.array([[0.0] * 24] * 2 + [[1e300] * 24]))
    with pytest.raises(ValueError, match="x have 23 dimensions, the hasher was fitted on 24"):
        hasher.encode(x[:, 1:])
    with pytest.raises(ValueError, match=r"one vector is x\[None\]"):
        hasher.encode(x[0])
    with pytest.raises(ValueError, match="floating type, got int64"):
        hasher.fit(np.ones((3, 3), np.int64))
    np.testing.assert_array_equal(hasher.encode(x), before)


@pytest.mark.parametrize("name", NAMES)
def test_a_file_gives_the_same_hasher(name, tmp_path):
    x = blob()
    hasher = make_hasher(name, 128, seed=2**40 + 1).fit(x)
    path = tmp_path / "Verzeichnis ä" / "hasher.npz"
    path.parent.mkdir()
    hasher.save(path)
    assert [entry.name for entry in path.parent.iterdir()] == ["hasher.npz"]
    loaded = load_hasher(path)
    assert type(loaded) is type(hasher)
    assert (loaded.bits, loaded.seed, loaded.dim) == (128, 2**40 + 1, 24)
    assert loaded.objective == hasher.objective
    np.testing.assert_array_equal(loaded.encode(x), hasher.encode(x))
    twin = type(hasher).from_state(hasher.state())
    np.testing.assert_array_equal(twin.encode(x), hasher.encode(x))


def test_damaged_files_are_named(tmp_path):
    path = tmp_path / "hasher.npz"
    with pytest.raises(ValueError, match="there is no file of a hasher"):
        load_hasher(path)
    make_hasher("pca", 64).fit(blob()).save(path)
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    for cut in (0, 1, 10, 500, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(ValueError, match=r"hasher\.npz is no file of a hasher or is damaged"):
            load_hasher(path)
    x = blob()
    expected = make_hasher("pca", 64).fit(x).encode(x)
    for _ in range(150):
        spoilt = bytearray(whole)
        spoilt[rng.integers(len(whole))] ^= 1 << int(rng.integers(8))
        path.write_bytes(spoilt)
        message = ""
        try:
            found = load_hasher(path).encode(x)
        except ValueError as error:
            message = str(error)
        if message:
            assert "hasher.npz is" in message
        else:  # a byte that nobody reads, e.g. of a date
            np.testing.assert_array_equal(found, expected)


def test_a_state_of_another_kind_is_refused(tmp_path):
    state = make_hasher("pca", 64).fit(blob()).state()
    with pytest.raises(ValueError, match="'pca', not 'itq'"):
        HASHERS["itq"].from_state(state)
    with pytest.raises(ValueError, match="do not fit 128 bits"):
        HASHERS["pca"].from_state({**state, "bits": 128})
    with pytest.raises(ValueError, match="lacks or spoils 'mean'"):
        HASHERS["pca"].from_state({key: value for key, value in state.items() if key != "mean"})
    with pytest.raises(ValueError, match="not finite"):
        HASHERS["pca"].from_state({**state, "mean": state["mean"] * np.nan})
    path = tmp_path / "hasher.npz"
    np.savez(path, rest=np.array([{"a": 1}], dtype=object))
    with pytest.raises(ValueError, match="is no file of a hasher"):
        load_hasher(path)
    np.savez(path, rest=np.frombuffer(b'{"hasher": "deep"}', np.uint8))
    with pytest.raises(ValueError, match="is of the hasher 'deep', this version reads srp, pca, itq, lph"):
        load_hasher(path)


def test_encoding_needs_neither_torch_nor_mmengine_nor_faiss():
    code = (
        "import sys; import alimm.projects.binary_graph.hashers; "
        "print([name for name in ('torch', 'mmengine', 'faiss', 'scipy', 'numba') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
