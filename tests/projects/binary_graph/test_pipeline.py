from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

from alimm.projects.binary_graph.config import BuildConfig, plan_sizes
from alimm.projects.binary_graph.engine import ThreadEngine, make_engine
from alimm.projects.binary_graph.pipeline import build_segment
from alimm.projects.binary_graph.segment import ARRAYS, Segment, validate
from alimm.projects.binary_graph.walk import search_segment
from alimm_ops.graph import hamming_reference as oracle

from .synthetic import clustered_codes

SMALL = BuildConfig(
    overlap=6,
    waves=2,
    neighbours=12,
    cluster_size=50,
    max_cluster=150,
    hops=8,
    degree=8,
    max_degree=16,
    probes=100,
    exact_below=0,
    recall_target=1.0,
)
LITTLE = 1024 * 8 * (8 * 12 + 8 * 2 + 12)
"""Bytes for a task of about a thousand nodes."""


def same(a: Segment, b: Segment) -> bool:
    return all(np.array_equal(getattr(a, name), getattr(b, name)) for name in ARRAYS)


@pytest.fixture(scope="module")
def codes() -> np.ndarray:
    return clustered_codes(3000)


@pytest.fixture(scope="module")
def segment(codes: np.ndarray) -> Segment:
    return build_segment(codes, config=SMALL)


def true_distances(queries: np.ndarray, codes: np.ndarray, k: int) -> np.ndarray:
    return np.sort(oracle.hamming_matrix(queries, codes), axis=1)[:, :k].astype(np.int32)


def test_the_graph_is_sound(segment: Segment, codes: np.ndarray) -> None:
    validate(segment, full=True)
    assert len(np.unique(segment.codes, axis=0)) == segment.num_nodes == len(np.unique(codes, axis=0))
    for node in range(segment.num_nodes):
        row = segment.edges[segment.indptr[node] : segment.indptr[node + 1]]
        assert node not in row
        assert len(set(row.tolist())) == len(row)
        ids = segment.ids[segment.row_indptr[node] : segment.row_indptr[node + 1]]
        assert (codes[ids] == segment.codes[node]).all()
    assert np.array_equal(np.sort(segment.ids), np.arange(len(codes)))


def test_every_node_is_reached_from_the_entries(segment: Segment) -> None:
    reached, ahead = set(segment.entry_nodes.tolist()), segment.entry_nodes.tolist()
    while ahead:
        node = ahead.pop()
        for other in segment.edges[segment.indptr[node] : segment.indptr[node + 1]].tolist():
            if other not in reached:
                reached.add(other)
                ahead.append(other)
    assert len(reached) == segment.num_nodes


def test_a_full_beam_finds_everything_exactly(segment: Segment, codes: np.ndarray) -> None:
    queries = clustered_codes(20, seed=9)
    distances, ids = search_segment(segment, queries, 10, segment.num_nodes)
    assert np.array_equal(distances, true_distances(queries, codes, 10))
    for row in range(len(queries)):
        every = oracle.hamming_matrix(queries[[row]], codes)[0]
        assert np.array_equal(ids[row], np.lexsort((np.arange(len(codes)), every))[:10])


def test_recall_of_lists_and_search(segment: Segment, codes: np.ndarray) -> None:
    assert segment.info["graph_recall"] >= 0.995
    assert segment.info["recalls"] == sorted(segment.info["recalls"])
    queries = clustered_codes(200, seed=9)
    true = true_distances(queries, codes, 10)
    found, _ = search_segment(segment, queries, 10, 32)
    assert (found <= true[:, -1:]).mean() >= 0.98


def test_the_graph_does_not_depend_on_how_the_work_was_cut_or_ordered(segment: Segment, codes: np.ndarray) -> None:
    order = np.random.default_rng(1).permutation(len(codes))
    shuffled = build_segment(codes[order], order.astype(np.int64), config=SMALL)
    assert same(segment, shuffled)
    assert plan_sizes(3000, 2, SMALL).part_nodes >= 3000  # the first build had one part, this one has several
    assert plan_sizes(3000, 2, SMALL, LITTLE).part_nodes < 1100
    assert same(segment, build_segment(codes, config=SMALL, worker_memory=LITTLE))
    with ThreadEngine(3) as engine:
        assert same(segment, build_segment(codes, config=SMALL, engine=engine))


def test_processes_build_the_same_graph(segment: Segment, codes: np.ndarray, tmp_path: Path) -> None:
    with make_engine("processes", workers=2) as engine:
        built = build_segment(codes, config=SMALL, engine=engine, run_dir=tmp_path / "run")
    assert same(segment, built)


def test_another_seed_or_setting_gives_another_graph(segment: Segment, codes: np.ndarray) -> None:
    other = build_segment(codes, config=BuildConfig(**{**SMALL.to_dict(), "seed": 1}))
    assert not np.array_equal(segment.codes, other.codes)


def test_islands_are_joined() -> None:
    # Far clusters that no list of neighbours crosses.
    codes = clustered_codes(2000, clusters=40, noise=0.02, bits=256)
    segment = build_segment(codes, config=SMALL)
    assert segment.info["islands"] > 5
    queries = clustered_codes(100, seed=3, clusters=40, noise=0.02, bits=256)
    found, _ = search_segment(segment, queries, 5, 16)
    assert (found <= true_distances(queries, codes, 5)[:, -1:]).mean() >= 0.97
    everything, _ = search_segment(segment, queries[:5], 5, segment.num_nodes)
    assert np.array_equal(everything, true_distances(queries[:5], codes, 5))


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_equal_codes_are_one_node(share: float) -> None:
    codes = clustered_codes(2000)
    codes[: int(share * 2000)] = codes[-1]
    segment = build_segment(codes, config=SMALL)
    assert segment.info["largest_group"] == int(share * 2000) + 1
    queries = clustered_codes(100, seed=4)
    found, ids = search_segment(segment, queries, 10, 32)
    assert (found <= true_distances(queries, codes, 10)[:, -1:]).mean() >= 0.99
    assert all(len(set(row)) == 10 for row in ids.tolist())
    # The copies come by the smallest ids.
    distances, ids = search_segment(segment, codes[-1:], 4, 32)
    assert distances.tolist() == [[0] * 4]
    assert ids.tolist() == [[0, 1, 2, 3]]


def test_all_equal_and_very_few() -> None:
    for codes in (np.repeat(clustered_codes(1), 500, axis=0), clustered_codes(1), clustered_codes(3)):
        segment = build_segment(codes, config=SMALL)
        validate(segment, full=True)
        distances, ids = search_segment(segment, codes[:1], 2, 10)
        assert distances[0, 0] == 0
        assert ids[0, 0] == 0


def test_no_rows_at_all() -> None:
    segment = build_segment(np.empty((0, 2), np.uint64), config=SMALL)
    validate(segment, full=True)
    distances, ids = search_segment(segment, clustered_codes(2), 3, 10)
    assert (distances == -1).all()
    assert (ids == -1).all()


def test_few_codes_are_compared_exactly() -> None:
    codes = clustered_codes(900)
    segment = build_segment(codes)
    assert len(segment.edges) == 0
    queries = clustered_codes(30, seed=5)
    assert np.array_equal(search_segment(segment, queries, 7, 7)[0], true_distances(queries, codes, 7))


def test_a_crowded_cluster_is_split(codes: np.ndarray) -> None:
    # Half of the codes in a ball so small that k-means cannot part it well.
    rng = np.random.default_rng(0)
    ball = np.repeat(codes[:1], 1500, axis=0)
    ball[:, 0] ^= np.uint64(1) << rng.integers(0, 64, 1500).astype(np.uint64)
    ball[:, 1] ^= np.uint64(1) << rng.integers(0, 64, 1500).astype(np.uint64)
    segment = build_segment(np.concatenate([codes[:1500], ball]), config=SMALL)
    assert segment.info["largest_cluster"] <= 2 * SMALL.max_cluster
    assert segment.info["graph_recall"] >= 0.9


def test_live_rows_filter_results_only(segment: Segment, codes: np.ndarray) -> None:
    live = np.random.default_rng(2).random(segment.num_rows) < 0.3
    queries = clustered_codes(20, seed=6)
    distances, ids = search_segment(segment, queries, 5, segment.num_nodes, live)
    allowed = segment.ids[live]
    assert np.isin(ids, allowed).all()
    assert np.array_equal(distances, true_distances(queries, codes[np.sort(allowed)], 5))


def test_mistakes_are_named(codes: np.ndarray, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"ids must be unique; 1 are given twice, e\.g\. 7"):
        build_segment(codes[:10], np.array([0, 1, 2, 3, 4, 5, 6, 7, 7, 9]))
    with pytest.raises(ValueError, match=r"worker_memory of 1000 bytes is too little.*allow \d+ bytes"):
        build_segment(codes, config=SMALL, worker_memory=1000)
    with pytest.raises(ValueError, match="max_degree 4 is below degree 8"):
        BuildConfig(degree=8, max_degree=4)
    with pytest.raises(ValueError, match="no setting neighbors"):
        BuildConfig.from_dict({"neighbors": 3})
    build_segment(codes, config=SMALL, run_dir=tmp_path / "run")
    with pytest.raises(ValueError, match="another build"):
        build_segment(codes[:-1], config=SMALL, run_dir=tmp_path / "run")


DRIVER = """
import os, signal, sys
import numpy as np
from alimm.projects.binary_graph.config import BuildConfig
from alimm.projects.binary_graph.engine import make_engine
from alimm.projects.binary_graph.pipeline import build_segment

codes, run_dir, settings, stage, what = np.load(sys.argv[1]), sys.argv[2], eval(sys.argv[3]), sys.argv[4], sys.argv[5]

def progress(name, done, total):
    if name == stage and done == (total + 1) // 2:
        os.kill(os.getpid(), signal.SIGKILL)

with make_engine(what, workers=2) as engine:
    build_segment(codes, config=BuildConfig(**settings), engine=engine, run_dir=run_dir, progress=progress,
                  worker_memory=1024 * 8 * (8 * 12 + 8 * 2 + 12))
"""


@pytest.mark.parametrize("stage", ["ingest", "assign", "number", "core", "across-0", "round-1", "edges", "links"])
def test_a_killed_build_is_resumed_to_the_same_bytes(
    stage: str, segment: Segment, codes: np.ndarray, tmp_path: Path
) -> None:
    np.save(tmp_path / "codes.npy", codes)
    script = tmp_path / "driver.py"
    script.write_text(textwrap.dedent(DRIVER))
    words = [sys.executable, str(script), str(tmp_path / "codes.npy"), str(tmp_path / "run"), repr(SMALL.to_dict())]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([*words, stage, "threads"], env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == -signal.SIGKILL, done.stderr
    parts = (path.with_suffix(".safetensors") for path in (tmp_path / "run").glob("*/part-*.json"))
    finished = {path: path.stat().st_mtime_ns for path in parts}  # a part without a receipt is not finished
    assert finished
    with ThreadEngine(2) as engine:
        resumed = build_segment(
            codes,
            config=SMALL,
            engine=engine,
            run_dir=tmp_path / "run",
            worker_memory=LITTLE,
        )
        assert sum(engine.skipped.values()) >= 1
    assert same(segment, resumed)
    assert all(path.stat().st_mtime_ns == time for path, time in finished.items())


def test_a_damaged_part_is_computed_again(segment: Segment, codes: np.ndarray, tmp_path: Path) -> None:
    run = tmp_path / "run"
    build_segment(codes, config=SMALL, run_dir=run)
    part = run / "core" / "part-00000.safetensors"
    content = bytearray(part.read_bytes())
    content[len(content) // 2] ^= 16
    part.write_bytes(content)
    (run / "links" / "part-00000.safetensors").write_bytes(b"short")
    assert same(segment, build_segment(codes, config=SMALL, run_dir=run))


def test_ties_are_decided_by_the_smaller_id() -> None:
    # All at one distance from the query: only ids tell them apart, whatever the order of the nodes.
    rng = np.random.default_rng(0)
    codes = np.zeros((64, 1), np.uint64) | (np.uint64(1) << np.arange(64, dtype=np.uint64))[:, None]
    ids = rng.permutation(1000)[:64]
    segment = build_segment(codes, ids.astype(np.int64))
    zero = np.zeros((1, 1), np.uint64)
    assert search_segment(segment, zero, 5, 5)[1].tolist() == [np.sort(ids)[:5].tolist()]
    live = np.ones(64, bool)
    live[np.isin(segment.ids, np.sort(ids)[:3])] = False
    assert search_segment(segment, zero, 5, 5, live)[1].tolist() == [np.sort(ids)[3:8].tolist()]
    # Also where a node's first id is dead, and for a k beyond what is selected by insertion.
    twice = build_segment(np.concatenate([codes, codes]), np.concatenate([ids, ids + 2000]).astype(np.int64))
    live = twice.ids != np.sort(ids)[0]
    assert search_segment(twice, zero, 64, 5, live)[1].tolist() == [[*np.sort(ids)[1:], np.sort(ids)[0] + 2000]]


def test_many_neighbours_are_exact(codes: np.ndarray) -> None:
    segment = build_segment(codes)
    queries = clustered_codes(3, seed=8)
    distances, ids = search_segment(segment, queries, 2000, 10)
    assert np.array_equal(distances, true_distances(queries, codes, 2000))
    assert all(len(set(row)) == 2000 for row in ids.tolist())


def test_a_full_beam_is_exact_even_on_a_poor_graph(codes: np.ndarray) -> None:
    poor = BuildConfig(**{**SMALL.to_dict(), "neighbours": 1, "degree": 1, "max_degree": 1, "rounds": 0})
    segment = build_segment(codes, config=poor)
    queries = clustered_codes(20, seed=8)
    found, _ = search_segment(segment, queries, 10, segment.num_nodes)
    assert np.array_equal(found, true_distances(queries, codes, 10))


def test_clusters_of_two_codes_and_empty_ones() -> None:
    codes = clustered_codes(1500, clusters=60, noise=0.02)
    tiny = BuildConfig(**{**SMALL.to_dict(), "cluster_size": 2, "max_cluster": 4})
    validate(build_segment(codes, config=tiny), full=True)


def test_a_mapped_index_outlives_another_build_in_its_folder(codes: np.ndarray, tmp_path: Path) -> None:
    first = build_segment(codes, config=SMALL, run_dir=tmp_path / "run")
    before = np.array(first.codes)
    again = build_segment(codes, config=SMALL, run_dir=tmp_path / "run")
    assert np.array_equal(first.codes, before)
    assert same(first, again)


def test_batches_do_not_matter(segment: Segment, monkeypatch: pytest.MonkeyPatch) -> None:
    queries = clustered_codes(50, seed=8)
    whole = search_segment(segment, queries, 5, 20)
    monkeypatch.setattr("alimm.projects.binary_graph.walk.BATCH_BYTES", 8 * 20 * 7)
    pieces = search_segment(segment, queries, 5, 20)
    assert all(np.array_equal(a, b) for a, b in zip(whole, pieces, strict=True))
