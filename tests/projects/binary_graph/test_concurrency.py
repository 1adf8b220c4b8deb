"""One writer and its readers: in threads, in other processes, and when a process is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from alimm.projects.binary_graph import BinaryGraph, manifest
from tests.projects.binary_graph.brute_force import random_codes

ROOT = Path(__file__).parents[3]
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "ops")])}

WRITER = """
import sys
import numpy as np
from alimm.projects.binary_graph import BinaryGraph
index = BinaryGraph.open(sys.argv[1])
for number in range(1000, 10**6):
    index.add(np.full((3, 2), number, np.uint64), [3 * number, 3 * number + 1, 3 * number + 2])
    if number % 3 == 0:
        index.delete([3 * number + 1])
        print("deleted", 3 * number + 1, flush=True)
    print("added", number, flush=True)
"""

PUBLISHER = """
import os, sys
import numpy as np
from alimm.projects.binary_graph import BinaryGraph, manifest
index = BinaryGraph.open(sys.argv[1])
manifest._step_hook = lambda name: os._exit(9) if name == sys.argv[2] else None
getattr(index, sys.argv[3])()
"""


def run(code: str, *arguments: object, **options) -> subprocess.Popen:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT, **options)


@pytest.mark.parametrize("lines", [1, 40])
def test_what_a_killed_writer_acknowledged_is_there_and_nothing_half(lines, tmp_path):
    path = tmp_path / "a"
    BinaryGraph.build(random_codes(10), path=path, delta_limit=30).close()
    with run(WRITER, path) as process:
        seen = [process.stdout.readline().split() for _ in range(lines)]
        os.kill(process.pid, signal.SIGKILL)
        seen += [line.split() for line in process.stdout.read().splitlines()]
    seen = [words for words in seen if len(words) == 2]
    with BinaryGraph.open(path, verify="full") as index:
        ids = set(index.ids.tolist()) - set(range(10))
        deleted = {int(number) for what, number in seen if what == "deleted"}
        added = {int(number) for what, number in seen if what == "added"}
        assert len(added) + len(deleted) >= lines - 1
        assert not ids & deleted
        assert {3 * n + i for n in added for i in range(3)} - deleted <= ids
        last = max(added, default=999) + 1  # begun, perhaps finished, never told
        assert ids <= {3 * n + i for n in range(1000, last + 1) for i in range(3)}
        assert len(ids & {3 * last, 3 * last + 2}) in (0, 2)
        for number in added:
            found = set(index.search(np.full((1, 2), number, np.uint64), 2)[1][0].tolist())
            assert found <= {3 * number, 3 * number + 1, 3 * number + 2}
        index.add(random_codes(1))


@pytest.mark.parametrize(
    ("step", "operation"),
    [(step, "flush") for step in ("begin", "written", "flushed", "renamed", "published")] + [("renamed", "compact")],
)
def test_a_publisher_killed_between_two_steps_loses_nothing(step, operation, tmp_path):
    path = tmp_path / "a"
    with BinaryGraph.build(random_codes(30), path=path) as index:
        index.add(random_codes(5))
        index.delete([1, 31])
        expected = index.ids.tolist()
    with run(PUBLISHER, path, step, operation) as process:
        assert process.wait() == 9
    with BinaryGraph.open(path, verify="full") as index:
        assert index.ids.tolist() == expected
        assert index.stats()["generation"] == (2 if step in ("renamed", "published") else 1)
        index.compact()
        assert index.ids.tolist() == expected
    assert len(list((path / "segments").iterdir())) == 1
    assert len(list(path.glob("wal-*"))) == 1
    assert not list(path.glob("*.part-*"))


def test_a_second_writer_is_refused_and_takes_over_after_close(tmp_path):
    first = BinaryGraph.build(random_codes(5), path=tmp_path / "a")
    second = BinaryGraph.open(tmp_path / "a")
    first.add(random_codes(1))
    with pytest.raises(ValueError, match="another writer"):
        second.add(random_codes(1))
    with pytest.raises(ValueError, match="another writer"):
        BinaryGraph.build(random_codes(2), path=tmp_path / "a")
    assert len(second) == 5
    first.close()
    assert second.add(random_codes(1)).tolist() == [6]  # it has seen what the first one wrote
    assert len(second) == 7


def test_a_reader_takes_up_what_is_written(tmp_path):
    writer = BinaryGraph.build(random_codes(40), path=tmp_path / "a")
    reader = BinaryGraph.open(tmp_path / "a", read_only=True)
    old = reader._view.parts[0].segment
    assert not reader.refresh()
    for change in (
        lambda: writer.add(random_codes(3)),
        lambda: writer.delete([5]),
        lambda: writer.add(random_codes(1), [5]),
        writer.flush,
        lambda: writer.delete([5, 41]),
        writer.flush,
    ):
        change()
        if writer._view.generation == 1:
            assert reader._view.parts[0].segment is old
        assert reader.refresh()
        assert not reader.refresh()
        np.testing.assert_array_equal(reader.ids, writer.ids)
        assert reader.stats()["deleted"] == writer.stats()["deleted"]
    assert reader._view.parts[0].segment is old, "an open segment stays open"
    writer.compact()
    assert reader.search(random_codes(2), 3)[1].shape == (2, 3), "its files are gone, its maps are not"
    assert reader.refresh()
    np.testing.assert_array_equal(reader.ids, writer.ids)


def test_a_reader_survives_a_generation_that_vanishes_while_it_opens(tmp_path, monkeypatch):
    writer = BinaryGraph.build(random_codes(40), path=tmp_path / "a")
    reader = BinaryGraph.open(tmp_path / "a", read_only=True)
    writer.compact()
    real, compactions = manifest.load, 2

    def load(root):
        nonlocal compactions
        found = real(root)
        if compactions:
            compactions -= 1
            monkeypatch.setattr("alimm.projects.binary_graph.folder.load", real)
            writer.compact()
            monkeypatch.setattr("alimm.projects.binary_graph.folder.load", load)
        return found

    monkeypatch.setattr("alimm.projects.binary_graph.folder.load", load)
    assert reader.refresh()
    assert reader.stats()["generation"] == 4
    assert len(reader) == 40


def test_threads_that_search_see_a_prefix_of_the_changes(tmp_path):
    """Change n adds the ids 10 n .. 10 n + 9, all with the same code, and deletes those of change n - 5."""
    index = BinaryGraph.build(np.zeros((1, 1), np.uint64), [10**6], path=tmp_path / "a", delta_limit=60, max_segments=3)
    query, stop, problems, looks = np.zeros((1, 1), np.uint64), threading.Event(), [], []

    def look() -> None:
        try:
            while not stop.is_set():
                ids = index.search(query, 200)[1][0]
                ids = ids[(ids >= 0) & (ids < 10**6)]
                groups, counts = np.unique(ids // 10, return_counts=True)
                if len(groups):
                    assert (counts == 10).all(), (groups, counts)
                    assert (np.diff(groups) == 1).all(), groups
                    assert len(groups) <= 6, groups
                looks.append(groups.max(initial=-1))
        except BaseException as error:  # the test must see what a thread met
            problems.append(error)

    threads = [threading.Thread(target=look) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        for number in range(60):
            index.add(np.full((10, 1), number, np.uint64), np.arange(10 * number, 10 * number + 10))
            if number >= 5:
                index.delete(np.arange(10 * number - 50, 10 * number - 40))
            if number % 25 == 24:
                index.compact()
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    if problems:
        raise problems[0]
    assert len(set(looks)) > 5
    assert index.stats()["generation"] >= 3
