"""The build: stages of idempotent tasks, run by any engine, resumed at any point.

Paper: "Large-Scale Visual Search with Binary Distributed Graph at Alibaba" (CIKM 2019, arXiv 2102.04656). As there: the
codes are divided, each compared with the cores of its t nearest clusters, and the lists improved by breadth-first
propagation. Ours, since the paper's parameters and details could not be read or a bare k-nearest-neighbour graph is not
enough: codes that are equal are one node, guests ask only for what is nearer, propagation goes along edges in both
directions and ends when a sample's recall is good, edges are diversified with ties in mind, islands are joined, and
there is an entry layer that sees all of them.

The graph follows from the codes and the configuration alone: not from the order of the rows, the number or kind of
workers, how the work was cut, or what was interrupted.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from alimm.projects.binary_graph.assemble import assemble_exact, assemble_graph, maker
from alimm.projects.binary_graph.config import BuildConfig, Sizes, plan_sizes
from alimm.projects.binary_graph.engine import Engine, Task, ThreadEngine
from alimm.projects.binary_graph.segment import Segment
from alimm.projects.binary_graph.sources import CodeSource, source_from
from alimm.projects.binary_graph.stage_common import fetch_rows
from alimm.projects.binary_graph.stage_lists import sampled_recall
from alimm.projects.binary_graph.store import RunFolder

VERSION = 1
"""Rises when the same codes and settings give another graph."""
SPLITS = 3
"""How often clusters that are too large are divided anew before they are cut by the hash."""

_STAGES = "alimm.projects.binary_graph"


def build_segment(
    source: NDArray[Any] | CodeSource,
    ids: NDArray[np.int64] | None = None,
    *,
    config: BuildConfig | None = None,
    engine: Engine | None = None,
    worker_memory: int | None = None,
    run_dir: str | Path | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> Segment:
    """Build the graph of some codes.

    Args:
        source: codes, uint64 (N, W), or something that can be read piece by piece.
        ids: int64 (N,), at least 0 and unique; None: the row numbers, or what the source has.
        config: settings.
        engine: who runs the tasks; None: threads of this process.
        worker_memory: bytes that a task may need.
        run_dir: where the parts are kept, so that an interrupted build goes on; None: a temporary folder.
        progress: called with the stage, its parts that are done and all of them.

    Raises:
        ValueError: codes or ids that do not fit, a run folder of another build, too little memory.
    """
    opened = source_from(source, ids=ids) if ids is not None else source_from(source)
    config = config or BuildConfig()
    sizes = plan_sizes(opened.count, opened.words, config, worker_memory)
    if run_dir is not None:
        fingerprint = {
            "source": opened.fingerprint(),
            "config": config.to_dict(),
            "version": VERSION,
            "part_nodes": sizes.part_nodes,
        }
        run = RunFolder(run_dir, fingerprint)
        return _run(run, opened, config, sizes, engine, progress, keep=True)
    with tempfile.TemporaryDirectory(prefix="alimm-build-") as folder:
        return _run(RunFolder(folder, durable=False), opened, config, sizes, engine, progress, keep=False)


def _run(
    run: RunFolder,
    source: CodeSource,
    config: BuildConfig,
    sizes: Sizes,
    engine: Engine | None,
    progress: Callable[[str, int, int], None] | None,
    keep: bool,
) -> Segment:
    if engine is not None:
        return _Build(run, source, config, sizes, engine, progress, keep).segment()
    with ThreadEngine() as threads:
        return _Build(run, source, config, sizes, threads, progress, keep).segment()


class _Build:
    """The driver: which tasks a stage has, and what follows from what they found."""

    def __init__(
        self,
        run: RunFolder,
        source: CodeSource,
        config: BuildConfig,
        sizes: Sizes,
        engine: Engine,
        progress: Callable[[str, int, int], None] | None,
        keep: bool,
    ) -> None:
        self.run, self.source, self.config, self.sizes = run, source, config, sizes
        self.engine, self.progress = engine, progress
        self.make = maker(run.path / "segment" if keep else None)
        self.began = time.perf_counter()

    def stage(
        self, name: str, parts: int, function: str, payload: dict[str, Any], costs: Any = None
    ) -> list[dict[str, Any]]:
        tasks = [
            Task(name, part, f"{_STAGES}.{function}", payload, 1.0 if costs is None else float(costs[part]))
            for part in range(parts)
        ]
        return self.engine.run_stage(self.run, tasks, self.progress)

    def write(self, name: str, arrays: dict[str, NDArray[Any]]) -> None:
        if self.run.done(name, 0, verify=self.run.resumed) is None:
            self.run.write(name, 0, arrays)

    def segment(self) -> Segment:
        config, run = self.config, self.run
        parts = max(1, -(-self.source.count // self.sizes.part_nodes))
        chunks = max(1, -(-self.source.count // self.sizes.chunk_rows))
        payload = {
            "source": self.source.describe(run.path / "input"),
            "chunk_rows": self.sizes.chunk_rows,
            "count": self.source.count,
            "parts": parts,
            "seed": config.seed,
        }
        self.stage("ingest", chunks, "stage_ingest:ingest", payload)
        receipts = self.stage("distinct", parts, "stage_ingest:distinct", {"chunks": chunks, "seed": config.seed})
        if self.source.has_ids:
            _check_unique(np.concatenate([run.map("distinct", part, "ids") for part in range(parts)]))
        nodes = np.array([receipt["meta"]["nodes"] for receipt in receipts])
        info: dict[str, Any] = {
            "config": config.to_dict(),
            "rows": self.source.count,
            "nodes": int(nodes.sum()),
            "largest_group": max(receipt["meta"]["largest"] for receipt in receipts),
        }
        if nodes.sum() >= 2**31:
            raise ValueError(f"{nodes.sum()} distinct codes; a segment holds fewer than 2**31: build several indexes")
        if nodes.sum() <= max(config.exact_below, 2):
            segment = assemble_exact(run, parts, self.source.words, info, self.make)
        else:
            self.divide(parts, int(nodes.sum()), info)
            lists = self.lists(info)
            self.edges(lists, info)
            segment = assemble_graph(run, config.entry_share, info, self.make)
        return segment

    def divide(self, parts: int, num_nodes: int, info: dict[str, Any]) -> None:
        config, run = self.config, self.run
        num_centres = max(1, num_nodes // config.cluster_size)
        self.stage("centres", 1, "stage_division:centres", {"parts": parts, "num_centres": num_centres})
        stage, assigned = "centres", "assign"
        overlap = config.overlap * config.waves
        for attempt in range(SPLITS + 1):
            payload = {"centre_stage": stage, "overlap": overlap}
            self.stage(assigned, parts, "stage_division:assign", payload)
            counts = np.sum([run.read(assigned, part, ["counts"])["counts"] for part in range(parts)], axis=0)
            large = np.flatnonzero(counts > config.max_cluster)
            if not len(large) or attempt == SPLITS:
                break
            payload = {
                "parts": parts,
                "centre_stage": stage,
                "assign_stage": assigned,
                "large": large.tolist(),
                "pieces": (-(-counts[large] // config.cluster_size)).tolist(),
            }
            stage = f"centres-{attempt + 1}"
            self.stage(stage, 1, "stage_division:split", payload)
            assigned = f"assign-{attempt + 1}"
        # What is still too large is cut by the hash; a cluster without codes has one piece all the same.
        pieces = np.where(counts > config.max_cluster, -(-counts // (config.max_cluster // 2)), 1)
        self.write("pieces", {"first_piece": np.append(0, np.cumsum(pieces)).astype(np.int64)})
        self.stage("count", parts, "stage_division:count_clusters", {"assign_stage": assigned, "seed": config.seed})
        per_part = np.stack([run.read("count", part)["counts"] for part in range(parts)])
        cluster_starts = np.append(0, np.cumsum(per_part.sum(axis=0))).astype(np.int64)
        part_clusters = _cut(cluster_starts, self.sizes.part_nodes)
        self.write(
            "plan",
            {
                "cluster_starts": cluster_starts,
                "part_clusters": part_clusters,
                "bounds": cluster_starts[part_clusters],
                "before": (np.cumsum(per_part, axis=0) - per_part).astype(np.int64),
                "first_piece": run.read("pieces", 0)["first_piece"],
            },
        )
        self.stage("number", parts, "stage_division:number", {"assign_stage": assigned, "seed": config.seed})
        self.parts = len(part_clusters) - 1
        self.costs = np.add.reduceat(np.diff(cluster_starts).astype(float) ** 2, part_clusters[:-1])
        self.stage("gather", self.parts, "stage_division:gather", {"sources": parts})
        self.sources, self.assigned = parts, assigned
        sizes = np.diff(cluster_starts)
        info["clusters"], info["largest_cluster"] = len(sizes), int(sizes.max())

    def lists(self, info: dict[str, Any]) -> str:
        config, run = self.config, self.run
        k = config.neighbours
        bounds = run.read("plan", 0, ["bounds"])["bounds"]
        rng = np.random.default_rng(config.seed)
        nodes = np.sort(rng.choice(int(bounds[-1]), size=min(config.probes, int(bounds[-1])), replace=False))
        codes = fetch_rows(run, {"codes": "gather"}, bounds, nodes.astype(np.int32))["codes"]
        self.write("probes", {"nodes": nodes.astype(np.int32), "codes": codes})
        self.stage("truth", self.parts, "stage_lists:truth", {})
        self.stage("core", self.parts, "stage_lists:core", {"k": k}, self.costs)
        stage = self.wave(0, "core")
        waves, recalls = 1, [sampled_recall(run, stage)]
        for number in range(config.rounds):
            if recalls[-1] >= config.recall_target:
                break
            if number and waves < config.waves:
                # Propagation from good lists is worth more than twice that from bad ones.
                stage = self.wave(waves, stage)
                waves += 1
            payload = {
                "stage": stage,
                "width": min(config.hops, k),
                "first_round": number == 0,
                "block": self.sizes.round_rows,
            }
            stage = f"round-{number + 1}"
            self.stage(stage, self.parts, "stage_lists:propagation", payload)
            recalls.append(sampled_recall(run, stage))
            if not sum(receipt["meta"]["fresh"] for receipt in run.receipts(stage)):
                break
        info["recalls"], info["graph_recall"], info["waves"] = recalls, recalls[-1], waves
        return stage

    def wave(self, wave: int, stage: str) -> str:
        """Compare every code with the cores of ``overlap`` more clusters; the stage of the lists after that."""
        overlap = self.config.overlap
        payload: dict[str, Any] = {
            "assign_stage": self.assigned,
            "seed": self.config.seed,
            "first": max(1, wave * overlap),
            "last": (wave + 1) * overlap,
        }
        self.stage(f"guests-{wave}", self.sources, "stage_division:guests", payload)
        payload = {"k": self.config.neighbours, "sources": self.sources, "wave": wave, "stage": stage}
        self.stage(f"across-{wave}", self.parts, "stage_lists:across", payload, self.costs)
        merged = f"merge-{wave}"
        self.stage(merged, self.parts, "stage_lists:merge", {"stage": stage, "wave": wave})
        return merged

    def edges(self, lists: str, info: dict[str, Any]) -> None:
        config = self.config
        payload = {"stage": lists, "degree": config.degree, "alpha_percent": config.alpha_percent}
        self.stage("edges", self.parts, "stage_edges:edges", payload)
        payload = {
            "degree": config.degree,
            "max_degree": config.max_degree,
            "alpha_percent": config.alpha_percent,
        }
        self.stage("links", self.parts, "stage_edges:links", payload)
        receipt = self.stage("stitch", 1, "stitch:stitch", {"entry_share": config.entry_share})[0]
        info.update(receipt["meta"])


def _cut(cluster_starts: NDArray[np.int64], part_nodes: int) -> NDArray[np.int64]:
    """First cluster of each part, and the number of clusters at the end; of ``part_nodes`` at most if it can."""
    cuts = [0]
    for cluster in range(1, len(cluster_starts) - 1):
        if cluster_starts[cluster + 1] - cluster_starts[cuts[-1]] > part_nodes:
            cuts.append(cluster)
    return np.array([*cuts, len(cluster_starts) - 1], np.int64)


def _check_unique(ids: NDArray[np.int64]) -> None:
    ordered = np.sort(ids)
    twice = np.flatnonzero(ordered[1:] == ordered[:-1])
    if len(twice):
        raise ValueError(f"ids must be unique; {len(twice)} are given twice, e.g. {ordered[twice[0]]}")
