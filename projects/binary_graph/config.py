"""What a build can be told, and what follows from it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

from alimm_ops.graph.hamming_reference import MAX_WORDS


@dataclass(frozen=True)
class BuildConfig:
    """Settings of a build. The graph depends on these and on the codes, on nothing else.

    Attributes:
        neighbours: k, length of the lists from which edges are chosen.
        cluster_size: codes in a cluster, on average. Larger: more comparisons, better lists, fewer tasks.
        overlap: t, a code is compared with the cores of its t nearest clusters.
        waves: so many times t at most: before a second round of propagation, and each later one, the next t clusters
            are compared too.
        max_cluster: clusters with more codes than this are split.
        rounds: most rounds of propagation.
        hops: how many entries of a list a round looks at.
        recall_target: rounds end when the lists' recall@10, on a sample, reaches it.
        probes: codes in that sample.
        degree: out-edges of a node before those are added that point back.
        max_degree: out-edges of a node after that; edges that hold the graph together come on top.
        alpha_percent: 110 keeps an edge unless another is 1.1 times nearer to its end.
        entry_share: one in so many codes can be where a walk begins.
        exact_below: up to so many distinct codes there is no graph: all are compared.
        seed: of every random choice.
    """

    neighbours: int = 22
    cluster_size: int = 2000
    overlap: int = 8
    waves: int = 3
    max_cluster: int = 8000
    rounds: int = 4
    hops: int = 22
    recall_target: float = 0.992
    probes: int = 500
    degree: int = 15
    max_degree: int = 32
    alpha_percent: int = 110
    entry_share: int = 8
    exact_below: int = 10_000
    seed: int = 0

    def __post_init__(self) -> None:
        least = {"exact_below": 0, "seed": 0, "rounds": 0, "alpha_percent": 100}
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name == "recall_target":
                if not isinstance(value, int | float) or not 0 <= value <= 1:
                    raise ValueError(f"recall_target must be from 0 to 1, got {value!r}")
            elif not isinstance(value, int) or isinstance(value, bool) or value < least.get(field.name, 1):
                raise ValueError(
                    f"{field.name} must be a whole number of at least {least.get(field.name, 1)}, got {value!r}"
                )
        if self.seed >= 2**63:
            raise ValueError(f"seed must be below 2**63, got {self.seed}")
        if self.neighbours > 256 or self.max_degree > 512:
            raise ValueError("neighbours may be at most 256, max_degree at most 512")
        if self.max_degree < self.degree:
            raise ValueError(f"max_degree {self.max_degree} is below degree {self.degree}")
        if self.max_cluster < 2 * self.cluster_size:
            raise ValueError(
                f"max_cluster must be at least twice cluster_size, got {self.max_cluster} and {self.cluster_size}"
            )

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> BuildConfig:
        """From names and values.

        Raises:
            ValueError: a name that is none, or a value that does not fit.
        """
        known = {field.name for field in fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ValueError(f"a build has no setting {', '.join(unknown)}; there are: {', '.join(sorted(known))}")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Names and values, as JSON takes them."""
        return asdict(self)


@dataclass(frozen=True)
class Sizes:
    """How the work is cut; the graph does not depend on it.

    Attributes:
        chunk_rows: rows of the input that a task reads.
        part_nodes: distinct codes in a part, about.
        round_rows: nodes whose lists a task of a round improves at a time.
    """

    chunk_rows: int
    part_nodes: int
    round_rows: int


WORKER_MEMORY = 1 << 30
"""Bytes that a task may need where nobody says."""
_TASKS = 80
_SMALLEST = 8192
_HALO = 40
"""Nodes that a round must know for each that it improves; measured on diffuse codes."""


def plan_sizes(rows: int, words: int, config: BuildConfig, worker_memory: int | None = None) -> Sizes:
    """Cut the work so that no task needs more memory than is allowed.

    A part at work holds lists old and new, those of the nodes that they name, and codes; about eight lists a node.

    Raises:
        ValueError: the memory is too little for the smallest part.
    """
    if not 1 <= words <= MAX_WORDS:
        raise ValueError(f"codes must have 1 to {MAX_WORDS} words of 64 bits, got {words}")
    memory = WORKER_MEMORY if worker_memory is None else worker_memory
    node_bytes = 8 * (8 * config.neighbours + 8 * words) + 8 * words * config.overlap
    most = memory // node_bytes
    least = max(1024, min(config.max_cluster, rows))
    if most < least:
        raise ValueError(
            f"worker_memory of {memory} bytes is too little for a cluster of {config.max_cluster} codes: allow "
            f"{least * node_bytes} bytes or more, or lower cluster_size and max_cluster"
        )
    part_nodes = max(least, min(max(_SMALLEST, -(-rows // _TASKS)), most))
    round_bytes = _HALO * (10 * config.neighbours + 16 * words)
    return Sizes(chunk_rows=part_nodes, part_nodes=part_nodes, round_rows=max(256, memory // round_bytes))
