"""A small index by hand, with all its files: what the tests of the files damage."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import numpy as np

from alimm.projects.binary_graph.manifest import Manifest, publish, write_deleted
from alimm.projects.binary_graph.segment import Segment, fresh_segment_name, write_segment
from alimm.projects.binary_graph.wal import ADD, DELETE, WriteAheadLog

WORDS = 2
HEADER = 32
"""Bytes of the header of a log."""
TINY = np.array([5]), np.array([[1, 2]], np.uint64)
"""Ids and codes of an add."""


def small_segment(nodes: int = 300, seed: int = 0, first_id: int = 0, words: int = WORDS) -> Segment:
    """Random codes, 1 to 3 rows and 0 to 8 edges a node, 5 centres with up to 12 entries each."""
    generator = np.random.default_rng(seed)
    codes = generator.integers(0, 2**64, (nodes, words), dtype=np.uint64)
    degrees, rows = generator.integers(0, 9, nodes), generator.integers(1, 4, nodes)
    lists = [np.sort(part) for part in np.split(first_id + generator.permutation(rows.sum()), np.cumsum(rows)[:-1])]
    entry_counts = generator.integers(0, 13, 5)
    entries = generator.integers(0, nodes, entry_counts.sum()).astype(np.int32)
    return Segment(
        codes=codes,
        indptr=np.concatenate([[0], np.cumsum(degrees)]).astype(np.int64),
        edges=generator.integers(0, nodes, degrees.sum()).astype(np.int32),
        row_indptr=np.concatenate([[0], np.cumsum(rows)]).astype(np.int64),
        ids=np.concatenate(lists).astype(np.int64),
        centres=generator.integers(0, 2**64, (5, words), dtype=np.uint64),
        entry_indptr=np.concatenate([[0], np.cumsum(entry_counts)]).astype(np.int64),
        entry_nodes=entries,
        entry_codes=codes[entries],
        info={"recall": 0.97, "name": "Gro\u00dfe"},
    )


def empty_segment(words: int = WORDS) -> Segment:
    """No codes at all."""
    starts, codes = np.zeros(1, np.int64), np.empty((0, words), np.uint64)
    nodes = np.empty(0, np.int32)
    return Segment(codes, starts, nodes, starts, np.empty(0, np.int64), codes, starts, nodes, codes)


def write_generation(root: Path, generation: int = 1, **changes: Any) -> Manifest:
    """Publish two segments (ids 0.. and 10000..), deleted ids, and a log of two adds and a delete."""
    root.mkdir(parents=True, exist_ok=True)
    (root / "segments").mkdir(exist_ok=True)
    tables = []
    for seed in range(2):
        segment = small_segment(300 - 100 * seed, seed + 10 * generation, 10_000 * seed)
        tables.append(write_segment(root, fresh_segment_name(root, generation), segment, durable=False))
    with WriteAheadLog.create(root, WORDS, generation, durable=False) as log:
        log.append_add(np.arange(3) + 20_000, np.arange(6, dtype=np.uint64).reshape(3, 2))
        log.append_delete(np.array([20_001, 5]))
        log.append_add(np.array([2**63 - 1]), np.full((1, 2), 2**64 - 1, np.uint64))
    deleted = write_deleted(root, generation, np.array([3, 7, 10_002]), durable=False)
    inside = {tables[0]["name"]: write_deleted(root, generation, np.array([9]), durable=False)}
    manifest = Manifest(generation, 64 * WORDS, tables, log.name, 20_003, {"links": 8}, deleted, inside)
    manifest = Manifest(**{**vars(manifest), **changes})
    publish(root, manifest, durable=False)
    return manifest


def files_of(root: Path) -> list[Path]:
    """All files of an index, in a fixed order."""
    return sorted(path for path in root.rglob("*") if path.is_file())


def random_rows(count: int, seed: int, words: int = WORDS) -> tuple[np.ndarray, np.ndarray]:
    """Ids and codes of an add."""
    generator = np.random.default_rng(seed)
    return generator.integers(0, 2**63, count), generator.integers(0, 2**64, (count, words), dtype=np.uint64)


def small_log(root: Path, count: int = 5, words: int = 2) -> tuple[Path, list[tuple], list[int]]:
    """A log of adds and deletes: its path, what was appended, and where each record ends."""
    sent, ends = [], [HEADER]
    with WriteAheadLog.create(root, words, 3, durable=False) as log:
        for seed in range(count):
            ids, codes = random_rows(1 + seed, seed, words)
            if seed % 3 == 2:
                assert log.append_delete(ids) == seed + 1
                sent.append((DELETE, ids, None))
            else:
                assert log.append_add(ids, codes) == seed + 1
                sent.append((ADD, ids, codes))
            ends.append(log.size)
    return log.path, sent, ends


def check_records(records: list, sent: list[tuple]) -> None:
    """Assert that records are those that were appended."""
    assert [record.sequence for record in records] == list(range(1, len(sent) + 1))
    for record, (kind, ids, codes) in zip(records, sent, strict=True):
        assert record.kind == kind
        np.testing.assert_array_equal(record.ids, ids, strict=True)
        if codes is None:
            assert record.codes is None
        else:
            np.testing.assert_array_equal(record.codes, codes, strict=True)


def environment() -> dict[str, str]:
    """Of a process that finds what this one does."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(["", *sys.path])}
