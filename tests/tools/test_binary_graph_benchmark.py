"""Benchmark of binary graphs: data, recall, interpolation and verdicts against oracles, and a quick run of it all."""

import argparse
import importlib
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest

from alimm.search import recall_at_k

BENCHMARKS = Path(__file__).resolve().parents[2] / "tools" / "benchmarks"
NAMES = ("_binary_data", "_binary_real", "_binary_rivals", "_binary_measure", "_binary_kernels", "_binary_floats",
         "_binary_parts", "binary_graph")  # fmt: skip


@pytest.fixture(scope="module")
def modules():
    """The benchmarks, imported as tools/benchmark.py does."""
    sys.path.insert(0, str(BENCHMARKS))
    yield {name: importlib.import_module(name) for name in NAMES}
    sys.path.remove(str(BENCHMARKS))
    for name in NAMES:
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("sets")


@pytest.fixture(scope="module")
def small(modules, cache):
    return modules["_binary_data"].made("clustered", 1_000, cache, queries=50)


def distances(queries, base):
    """Hamming, bit by bit."""
    bits = [np.unpackbits(codes.view(np.uint8), axis=1).astype(int) for codes in (queries, np.array(base))]
    return (bits[0][:, None] != bits[1][None]).sum(axis=2)


# --- data


def test_words_hold_bit_b_at_place_b(modules):
    bits = np.random.default_rng(0).random((7, 128)) < 0.5
    codes = modules["_binary_data"].pack(bits)
    for row, code in zip(bits, codes, strict=True):
        for b in range(128):
            assert bool(int(code[b // 64]) >> (b % 64) & 1) == row[b]


def test_made_set_has_its_exact_distances_and_is_not_drawn_again(modules, small, cache):
    assert small.base.shape == (1_000, 4)
    assert small.queries.shape == (50, 4)
    np.testing.assert_array_equal(small.truth, np.sort(distances(small.queries, small.base), axis=1)[:, :10])
    stamp = (small.folder / "base.npy").stat().st_mtime_ns
    again = modules["_binary_data"].made("clustered", 1_000, cache, queries=50)
    assert (again.folder / "base.npy").stat().st_mtime_ns == stamp
    assert again.notes == small.notes
    assert not [path for path in cache.iterdir() if path.name.endswith(".tmp")]


def test_queries_are_of_the_same_clusters_but_not_in_the_base(small):
    nearest = small.truth[:, 0]
    assert nearest.min() > 0
    assert np.median(nearest) < 80  # codes of other clusters differ in about 128 bits


def test_blocks_do_not_change_the_codes_before_them(modules, monkeypatch):
    data = modules["_binary_data"]
    recipe = data.RECIPES["diffuse"]
    monkeypatch.setattr(data, "BLOCK", 64)
    long, short = (data.draw(recipe, count, 128, 0, 500, 0) for count in (200, 128))
    np.testing.assert_array_equal(long[:128], short)
    assert len(np.unique(long, axis=0)) == 200  # no block repeats another
    queries = data.draw(recipe, 200, 128, 0, 500, 1)
    assert len(np.unique(np.concatenate([long, queries]), axis=0)) == 400  # nor do the queries repeat the base


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_identical_codes(modules, cache, share):
    found = modules["_binary_data"].made("clustered", 1_000, cache, queries=50, same=share)
    _, counts = np.unique(np.array(found.base), axis=0, return_counts=True)
    assert counts.max() == 1_000 * share
    assert found.notes["distinct"] == 1_000 - counts.max() + 1


def test_failed_set_leaves_nothing(modules, tmp_path):
    data = modules["_binary_data"]

    def build():
        codes = np.zeros((5, 1), np.uint64)
        return codes, codes, {}

    def fail(folder):
        raise OSError("full")

    with pytest.raises(OSError, match="full"):
        data.keep("key", "label", tmp_path, build, fail)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="clustered, diffuse"):
        data.made("uniform", 10, tmp_path)


@pytest.mark.parametrize("dim", [4, 12])
def test_intrinsic_dimension_of_a_known_law(modules, dim):
    # Distances to points that fill a ball of so many dimensions evenly: (d / R)^dim is uniform.
    rng = np.random.default_rng(1)
    radii = np.sort(rng.random((4_000, 21)) ** (1 / dim), axis=1)
    assert modules["_binary_data"].intrinsic_dimension(radii * 1e6) == pytest.approx(dim, rel=0.08)
    assert math.isnan(modules["_binary_data"].intrinsic_dimension(np.zeros((3, 5))))


def test_glosses_of_a_data_file(modules, tmp_path):
    real = modules["_binary_real"]
    with pytest.raises(real.Missing, match="wordnet-base"):
        list(real.gloss_texts(tmp_path))
    for part in ("noun", "verb", "adj", "adv"):
        (tmp_path / f"data.{part}").write_text("  1 This software | licence\n")
    line = "00002 03 n 02 ice_cream 0 gelato 0 001 @ 1 n 0 | frozen food; with cream  \n"
    (tmp_path / "data.noun").write_text("  1 licence\n" + line)
    assert list(real.gloss_texts(tmp_path)) == ["ice cream, gelato: frozen food; with cream"]


def test_photographs_say_which_package_brings_more(modules, tmp_path, monkeypatch):
    real = modules["_binary_real"]
    (tmp_path / "photos").mkdir()
    monkeypatch.setattr(real, "photo_files", lambda folder: [])
    with pytest.raises(real.Missing, match="opencv-doc"):
        real.photographs("orb", tmp_path, tmp_path / "photos", 100)


@pytest.mark.parametrize(("kind", "words"), [("orb", 4), ("brief", 8)])
def test_photographs_give_descriptors(modules, tmp_path, monkeypatch, kind, words):
    import skimage.data

    real = modules["_binary_real"]
    picture = Path(skimage.data.__file__).parent / "chelsea.png"
    monkeypatch.setattr(real, "photo_files", lambda folder: [picture])
    found = real.photographs(kind, tmp_path, None, 150)
    assert found.base.shape[1] == words
    assert 75 <= len(found.base) <= 150
    assert found.notes["photographs"] == 1
    # The same picture seen again: its codes are far nearer than those of nothing in common, half of all bits.
    assert np.median(found.truth[:, 0]) < 0.35 * 64 * words


# --- measures


def test_recall_is_that_of_the_search_package(modules, small):
    measure = modules["_binary_measure"]
    rng = np.random.default_rng(3)
    base, queries = np.array(small.base), small.queries
    base[500:] = base[:500]  # many ties
    all_distances = distances(queries, base)
    order = np.argsort(all_distances, axis=1, kind="stable")
    truth = np.take_along_axis(all_distances, order, axis=1)
    found = order[:, :10].copy()
    found[rng.random(found.shape) < 0.3] = -1
    found[:, 4] = found[:, 3]  # an id twice
    found[:, 7] = order[:, 30]
    assert measure.recall(found, base, queries, truth[:, :10]) == pytest.approx(recall_at_k(found, order, -truth))
    assert measure.recall(order[:, :10], base, queries, truth[:, :10]) == 1.0
    assert measure.recall(np.full((50, 10), -1), base, queries, truth[:, :10]) == 0.0


def points(*pairs):
    return [dict(width=10 * number, recall=recall, qps=qps) for number, (recall, qps) in enumerate(pairs, 1)]


def test_rate_at_a_recall(modules):
    rate_at = modules["_binary_measure"].rate_at
    odds = [math.log(value / (1 - value)) for value in (0.9, 0.95, 0.98)]
    share = (odds[1] - odds[0]) / (odds[2] - odds[0])
    rate, note = rate_at(points((0.9, 1000.0), (0.98, 100.0)), 0.95)
    assert (rate, note) == (pytest.approx(1000.0 * 0.1**share), "")
    assert rate_at(points((0.9, 1000.0), (0.98, 100.0)), 0.99) is None
    assert rate_at(points((0.96, 1000.0), (0.98, 100.0)), 0.95) == (1000.0, "at least ")
    assert rate_at(points((0.5, 9.0), (1.0, 3.0)), 0.95)[0] > 3.0  # a recall of 1 has no odds


def test_rounds_go_back_and_forth_and_their_medians_count(modules, monkeypatch):
    measure = modules["_binary_measure"]
    order = []

    def run_job(job):
        order.append(job.library)
        value = float(len(order))
        record = dict.fromkeys(("build_cpu", "build_wall", "warm_up", "peak_bytes", "grown_bytes", "bytes"), value)
        return dict(record, label=job.library, search=[dict(width=10, recall=0.5, qps=value)])

    monkeypatch.setattr(measure, "run_job", run_job)
    found = measure.run_jobs([measure.Job("a", ""), measure.Job("b", "")], 3, lambda *_, **__: None)
    assert order == ["a", "b", "b", "a", "a", "b"]
    merged = measure.merge(found[0])
    assert (merged["build_cpu"], merged["build_cpu_range"], merged["search"][0]["qps"]) == (4.0, [1.0, 5.0], 4.0)


@pytest.mark.parametrize("library", ["faiss HNSW", "faiss IVF", "faiss flat", "hnswlib", "usearch"])
def test_a_rival_in_its_own_process_finds_what_is_there(modules, small, library):
    rivals, measure = modules["_binary_rivals"], modules["_binary_measure"]
    pytest.importorskip(rivals.LIBRARIES[library].module)
    record = measure.run_job(measure.Job(library, str(small.folder), repeats=1, widths=(64,)))
    assert record["search"][0]["recall"] > 0.97
    assert record["bytes"] >= small.base.nbytes
    assert record["points"] == 1_000
    assert record["build_cpu"] < 5
    assert record["peak_bytes"] > 1_000_000


def test_signs_square_to_four_times_the_distance(modules, small):
    signs = [modules["_binary_rivals"].as_signs(codes) for codes in (small.queries, np.array(small.base)[:20])]
    square = ((signs[0][:, None] - signs[1][None]) ** 2).sum(axis=2)
    np.testing.assert_array_equal(square, 4 * distances(small.queries, small.base[:20]))


def test_a_process_that_fails_is_named(modules, tmp_path):
    measure = modules["_binary_measure"]
    with pytest.raises(RuntimeError, match=r"faiss HNSW M=4 failed[\s\S]*FileNotFoundError"):
        measure.run_job(measure.Job("faiss HNSW", str(tmp_path), {"M": 4}))


def test_missing_libraries_are_left_out(modules, monkeypatch, capsys):
    rivals = modules["_binary_rivals"]
    monkeypatch.setattr(rivals.Usearch, "module", "no_such_library")
    assert rivals.present(["faiss HNSW", "usearch"]) == ["faiss HNSW"]
    assert "pip install 'alimm[rivals]'" in capsys.readouterr().out


# --- verdicts


def record(build=1.0, size=100.0, qps=100.0, graph=0.995, recall=0.9):
    notes = {} if graph is None else {"graph_recall": graph}
    search = points((recall, 2 * qps), (0.97, qps))
    return dict(build_cpu=build, bytes=size, notes=notes, search=search)


@pytest.mark.parametrize(
    ("ours", "verdict"),
    [
        (record(0.4, 79.0, 151.0), [True, True, True]),
        (record(0.6, 79.0, 151.0), [False, True, True]),
        (record(0.4, 81.0, 151.0), [True, True, False]),
        (record(0.4, 79.0, 149.0), [True, False, True]),
        (record(0.4, 79.0, 151.0, graph=0.98), [False, True, True]),
        (record(0.4, 79.0, 151.0, graph=None), [False, True, True]),
        (dict(record(0.4, 79.0), search=points((0.5, 900.0))), [True, False, True]),  # never reaches the recall
    ],
)
def test_verdicts_of_a_comparison(modules, ours, verdict):
    claims = modules["binary_graph"].judge("a set", 0.5, ours, record(graph=None))
    assert [claim.met for claim in claims] == verdict


def test_a_search_above_the_recall_says_so(modules):
    claims = modules["binary_graph"].judge("a set", 0.5, record(recall=0.96), record())
    assert "recall 0.9600 and 0.9000" in claims[1].figure


def test_growth_compares_cpu_a_point(modules):
    growth = modules["_binary_parts"].growth
    found = {("clustered", 100): {"build_cpu": 1.0}, ("clustered", 1000): {"build_cpu": 15.0}}
    assert [(claim.figure, claim.met) for claim in growth(found, [100, 1000])] == [("1.50x", True)]
    found["clustered", 1000]["build_cpu"] = 17.0
    assert not growth(found, [100, 1000])[0].met
    assert growth(found, [100]) == []


def test_recall_of_the_lists_of_a_build(modules, small, tmp_path):
    from alimm.projects.binary_graph.store import RunFolder

    recall_of = modules["_binary_parts"].list_recall
    run = RunFolder(tmp_path / "run", {"x": 1})
    codes = np.array(small.base)
    far = distances(codes, codes)
    np.fill_diagonal(far, 999)
    lists = np.argsort(far, axis=1, kind="stable")[:, :12].astype(np.int32)
    worse = lists.copy()
    worse[:, 0] = -1
    worse[:, 1] = np.arange(1_000)  # a node is not its own neighbour
    for part, rows in enumerate((slice(0, 300), slice(300, 1_000))):
        run.write("gather", part, {"codes": codes[rows]})
        for stage, ids in (("merge", worse), ("round-1", lists)):
            run.write(stage, part, {"ids": ids[rows], "dists": far[rows, :12], "fresh": ids[rows] > 5})
    assert recall_of(run, ["gather", "merge", "round-1"]) == 1.0
    assert recall_of(run, ["gather", "merge"]) == pytest.approx(0.8)
    assert math.isnan(recall_of(run, ["gather"]))


def test_options_of_the_command_line(modules):
    benchmark = modules["binary_graph"]
    assert benchmark.options_of(["a=3", "b=0.5", "c=word", "d=true"]) == {"a": 3, "b": 0.5, "c": "word", "d": True}
    with pytest.raises(ValueError, match="KEY=VALUE"):
        benchmark.options_of(["a"])
    with pytest.raises(ValueError, match="no part colour; there are: compare"):
        benchmark.chosen("compare,colour", list(benchmark.PARTS), "part")


def parsed(benchmark, *given):
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true")
    benchmark.add_arguments(parser)
    return parser.parse_args(["--quick", *given])


def test_quick_run_of_the_rivals(modules, cache, capsys, monkeypatch):
    benchmark = modules["binary_graph"]
    monkeypatch.setattr(benchmark, "QUICK_SIZE", 1_000)
    given = parsed(
        benchmark, "--libraries", "faiss HNSW", "--only", "compare,cold,kernels,duplicates,sweep", "--cache", str(cache)
    )
    outcome = benchmark.run(given)
    json.dumps(outcome.to_dict())
    assert {"compare_clustered-1k", "compare_diffuse-1k", "kernel_256", "duplicates_10", "sweep_diffuse-1k"} <= set(
        outcome.data
    )
    assert "cold is left out" in capsys.readouterr().out
    assert [claim.subject for claim in outcome.claims] == ["all pairs of 256-bit codes, time over the popcount limit"]
    for found in outcome.data["kernel_256"]["rows"], outcome.data["kernel_256"]["kernel"]:
        assert 0.01 < found < 1_000


def test_quick_run_with_our_own(modules, cache, capsys):
    benchmark = modules["binary_graph"]
    given = parsed(
        benchmark,
        "--libraries",
        "binary_graph,faiss HNSW",
        "--only",
        "compare,cold,makespan",
        "--cache",
        str(cache),
    )
    outcome = benchmark.run(given)
    subjects = [claim.subject for claim in outcome.claims]
    assert len(subjects) == 2 * 3 + 1 + 1
    assert any(subject.startswith("first search of a new process") for subject in subjects)
    assert outcome.data["lists"]["checked"] > 0.9
    ours = outcome.data["compare_clustered-2k"]["records"][0]
    assert ours["library"] == "binary_graph"
    assert max(point["recall"] for point in ours["search"]) > 0.99
