"""The small kernels of a build, and entry points, against slow readable oracles."""

from __future__ import annotations

import numpy as np
import pytest

from alimm_ops.graph import build_cpu, entry_cpu
from alimm_ops.graph import hamming_reference as oracle

SEEDS = range(6)


def random_edges(seed: int, rows: int = 30, nodes: int = 40, columns: int = 4) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.where(rng.random((rows, columns)) < 0.4, rng.integers(0, nodes, (rows, columns)), -1).astype(np.int32)


def test_equal_codes_have_equal_hashes_and_others_do_not() -> None:
    codes = np.random.default_rng(0).integers(0, 2**63, (5000, 3), np.uint64)
    hashes = build_cpu.hash_codes(codes, 7)
    assert np.array_equal(hashes, build_cpu.hash_codes(codes[::-1].copy(), 7)[::-1])
    assert len(np.unique(hashes)) == 5000
    assert not np.array_equal(hashes, build_cpu.hash_codes(codes, 8))
    assert 0.45 < (hashes >> np.uint64(63)).mean() < 0.55


@pytest.mark.parametrize("seed", SEEDS)
def test_renumbering(seed: int) -> None:
    rng = np.random.default_rng(seed)
    ids = rng.integers(-1, 300, (20, 3)).astype(np.int32)
    numbering = build_cpu.Renumbering(300)
    numbering.add(ids)
    nodes = numbering.finish()
    assert nodes.tolist() == sorted(set(ids[ids >= 0].tolist()))
    asked = np.arange(-1, 300, dtype=np.int32)
    known = {node: place for place, node in enumerate(nodes.tolist())}
    assert numbering.places(asked).tolist() == [known.get(node, -1) for node in asked.tolist()]
    with pytest.raises(ValueError, match="ids must be from 0 to 299"):
        numbering.add(np.array([300], np.int32))


@pytest.mark.parametrize("seed", SEEDS)
def test_inserted_edges_and_blocks_are_the_nearest(seed: int) -> None:
    rng = np.random.default_rng(seed)
    pairs = rng.permutation(12 * 40)[:200]
    targets, sources = (pairs // 40).astype(np.int32), (pairs % 40).astype(np.int32)
    dists, flags = rng.integers(0, 6, 200).astype(np.uint16), rng.integers(0, 2, 200).astype(np.uint8)
    ids, far, marked = build_cpu.insert_edges(targets, sources, dists, flags, 12, 5)
    for row in range(12):
        own = sorted((int(dists[e]), int(sources[e]), int(flags[e])) for e in np.flatnonzero(targets == row))[:5]
        count = len(own)
        found = zip(far[row, :count].tolist(), ids[row, :count].tolist(), marked[row, :count].tolist(), strict=True)
        assert list(found) == own
        assert (ids[row, count:] == -1).all()
    # The same as blocks, given twice: what is there already changes nothing, and its flag stays.
    order = np.argsort(targets, kind="stable")
    owners, starts = np.unique(targets[order], return_index=True)
    blocks = owners.astype(np.int32), np.append(starts, 200).astype(np.int64), sources[order], dists[order]
    lists = np.full((12, 5), -1, np.int32), np.full((12, 5), 65535, np.uint16), np.zeros((12, 5), np.uint8)
    build_cpu.insert_blocks(*blocks, *lists)
    assert np.array_equal(lists[0], ids)
    assert np.array_equal(lists[1], far)
    assert np.array_equal(lists[2], ids >= 0)
    lists[2][:] = 0
    build_cpu.insert_blocks(*blocks, *lists)
    assert np.array_equal(lists[0], ids)
    assert not lists[2].any()
    with pytest.raises(ValueError, match="owners must be from 0 to 11"):
        build_cpu.insert_blocks(blocks[0] + 12, *blocks[1:], *lists)
    with pytest.raises(ValueError, match="targets must be from 0 to 10"):
        build_cpu.insert_edges(targets, sources, dists, flags, 11, 5)


@pytest.mark.parametrize("seed", SEEDS)
def test_islands_and_reach(seed: int) -> None:
    edges = random_edges(seed)
    parents = np.arange(40, dtype=np.int32)
    build_cpu.union_edges(parents, 5, edges)
    names = np.arange(40)
    for _ in range(40):
        for row in range(30):
            for node in edges[row][edges[row] >= 0]:
                names[[5 + row, node]] = names[[5 + row, node]].min()
    assert build_cpu.roots(parents).tolist() == names.tolist()

    reached = np.zeros(40, np.uint8)
    reached[[5, 9]] = 1
    expected, ahead = {5, 9}, [5, 9]
    while ahead:
        node = ahead.pop() - 5
        for other in edges[node].tolist() if 0 <= node < 30 else []:
            if other >= 0 and other not in expected:
                expected.add(other)
                ahead.append(other)
    count = build_cpu.spread(reached, 5, edges)
    assert set(np.flatnonzero(reached).tolist()) == expected
    assert count == len(expected) - 2


@pytest.mark.parametrize(("words", "probes", "starts"), [(1, 3, 4), (4, 2, 8), (5, 9, 3)])
def test_entry_points(words: int, probes: int, starts: int) -> None:
    rng = np.random.default_rng(words)
    codes = rng.integers(0, 2**63, (60, words), np.uint64) & np.uint64(0xFF)
    centres, queries = codes[:7], rng.integers(0, 2**63, (9, words), np.uint64) & np.uint64(0xFF)
    indptr = np.array([0, 10, 10, 25, 30, 31, 50, 60], np.int64)
    nodes = rng.permutation(60).astype(np.int32)
    found = entry_cpu.entry_points(queries, centres.T.copy(), indptr, nodes, codes.T.copy(), probes, starts)
    for row, query in enumerate(queries):
        chosen = oracle.nearest(query[None], centres, min(probes, 7))[0][0]
        listed = np.concatenate([np.arange(indptr[c], indptr[c + 1]) for c in chosen])
        near = oracle.hamming_matrix(query[None], codes[listed])[0]
        best = nodes[listed[np.argsort(near, kind="stable")[:starts]]]
        assert found[row].tolist() == [*best.tolist(), *[-1] * (starts - len(best))]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("k", [1, 4, 30])
def test_expand(seed: int, k: int) -> None:
    rng = np.random.default_rng(seed)
    row_indptr = np.append(0, np.cumsum(rng.integers(1, 5, 12))).astype(np.int64)
    ids = rng.permutation(1000)[: row_indptr[-1]].astype(np.int64)
    for node in range(12):
        ids[row_indptr[node] : row_indptr[node + 1]].sort()
    far = np.sort(rng.integers(0, 3, 12)).astype(np.uint16)
    live = rng.random(len(ids)) < 0.6
    nodes = np.append(rng.permutation(12), -1).astype(np.int32)[None]
    for mask in (None, live):
        rows = [
            (int(far[place]), int(ids[row]))
            for place, node in enumerate(nodes[0, :12].tolist())
            for row in range(row_indptr[node], row_indptr[node + 1])
            if mask is None or mask[row]
        ]
        expected = [*sorted(rows), *[(-1, -1)] * k][:k]
        distances, found = entry_cpu.expand(
            nodes, np.append(far, 65535).astype(np.uint16)[None], row_indptr, ids, mask, k
        )
        assert list(zip(distances[0].tolist(), found[0].tolist(), strict=True)) == expected
