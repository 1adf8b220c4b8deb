"""What an index knows as what a folder holds: settings, the records of a log, and the files of a generation."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from alimm.projects.binary_graph import updates
from alimm.projects.binary_graph.array_files import DamagedIndexError, whole
from alimm.projects.binary_graph.manifest import MANIFEST, Manifest, load, publish, write_deleted
from alimm.projects.binary_graph.segment import FOLDER, fresh_segment_name, write_segment
from alimm.projects.binary_graph.view import View
from alimm.projects.binary_graph.wal_records import ADD, MOST_BYTES, WalRecord

if TYPE_CHECKING:
    from alimm.projects.binary_graph.config import BuildConfig

_MOST = 1 << 62


@dataclass(frozen=True)
class Settings:
    """What an index remembers of how it is to be kept.

    Attributes:
        build: fields of the `BuildConfig`, as JSON.
        delta_limit: rows of the delta; more become a segment.
        max_segments: more are merged.
    """

    build: dict[str, Any]
    delta_limit: int
    max_segments: int

    @property
    def config(self) -> BuildConfig:
        """How segments are built."""
        from alimm.projects.binary_graph.config import BuildConfig  # who only searches needs none

        return BuildConfig.from_dict(self.build)

    @classmethod
    def parse(cls, root: Path, config: dict[str, Any]) -> Settings:
        """Of a manifest, which anybody may have written."""
        try:
            if set(config) != {"build", "delta_limit", "max_segments"} or not isinstance(config["build"], dict):
                raise ValueError(f"expected build, delta_limit and max_segments, got {str(config)[:80]!r}")
            limits = (whole(config[name], name, 1, _MOST) for name in ("delta_limit", "max_segments"))
            return cls(config["build"], *limits)
        except ValueError as error:
            raise DamagedIndexError(root / MANIFEST, f"has a config that no index writes: {error}") from None


def replayed(view: View, records: list[WalRecord]) -> View:
    """The view and the records of its log that it does not know yet."""
    records = [record for record in records if record.sequence > view.applied]
    start = 0
    while start < len(records):
        stop = start + 1
        # Alike ones in a row are one: a log of single rows would take a copy of the delta or of a mask for each.
        while stop < len(records) and records[stop].kind == records[start].kind:
            stop += 1
        ids = np.concatenate([record.ids for record in records[start:stop]])
        if records[start].kind == ADD:
            codes = [record.codes for record in records[start:stop] if record.codes is not None]
            view = updates.added(view, np.concatenate(codes), ids)
        else:
            view, _ = updates.deleted(view, ids, ignore_missing=True)
        start = stop
    return replace(view, applied=records[-1].sequence) if records else view


def write_generation(root: Path, view: View, settings: Settings, generation: int) -> Manifest:
    """Write files and manifest of one generation; an error leaves the former one and nothing else."""
    from alimm.projects.binary_graph.wal import WriteAheadLog

    try:
        tables, deleted_in = [], {}
        for part in view.parts:
            table = part.table
            if table is None:
                table = write_segment(root, fresh_segment_name(root, generation), part.segment)
            tables.append(table)
        everywhere, elsewhere = updates.dead_tables(view.parts)
        deleted = write_deleted(root, generation, everywhere) if len(everywhere) else None
        for table, ids in zip(tables, elsewhere, strict=True):
            if len(ids):
                deleted_in[table["name"]] = write_deleted(root, generation, ids)
        with WriteAheadLog.create(root, view.words, generation) as log:
            rows = MOST_BYTES // (8 + 8 * view.words)
            for start in range(0, len(view.delta), rows):
                log.append_add(view.delta.ids[start : start + rows], view.delta.codes[start : start + rows])
        manifest = Manifest(
            generation, 64 * view.words, tables, log.name, view.next_id, vars(settings).copy(), deleted, deleted_in
        )
        publish(root, manifest)
    except BaseException:
        _take_back(root, generation)
        raise
    return manifest


def _take_back(root: Path, generation: int) -> None:
    """Remove what was written for a generation that does not come; the caller holds the lock."""
    try:
        named = load(root).names()
    except ValueError:
        named = set()
    for pattern in (
        f"{FOLDER}/seg-{generation:08d}-*",
        f"deleted-{generation:08d}-*.npy",
        f"wal-{generation:08d}-*.log",
    ):
        for path in root.glob(pattern):
            if path.relative_to(root).as_posix() in named:
                continue  # it came after all: what failed was to make sure of it
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
