"""What a classifier of very many classes costs, as a model: arithmetic, memory, messages and time of a training step.

Symbols: N classes, D features, B global batch, P ranks, n = ceil(N / P) rows of a rank, M active classes in all,
m of one rank, U distinct labels of a batch, K neighbours, r samples a class, s = 4 bytes (float32). A step costs

                      full               fused                 random, knn
    FLOP, all ranks   6 B D N            8 B D N               6 B D M
    state of a rank   8 n D              8 n D                 8 n D + 4 n     (knn: + the graph's edges)
    logits            4 B n              -                     4 B m
    gradient          4 n D              4 n D                 4 m D + 20 m
    scratch           4 B b + 12 b D + 24 B D, b classes in a block; SGD's copy for the weight decay where it is more
    messages          8 B (P-1)/P labels, 4 B D (P-1)/P all-gather, 8 B D (P-1)/P all-reduce, 24 B (P-1) softmax

State is the weight and its momentum (and the step that a row stands at). The logits are kept once, since the head works
on them block by block. SGD copies a dense gradient, 4 n D, to add the weight decay, when the blocks are free again.
The graph costs 2 N^2 D to build exactly; of an epoch of N r samples that is 1 / (3 r) with the full softmax, and N / M
times as much with active classes.

The formulas are derived from the algorithms of `alimm.heads.ShardedHead` and `alimm.RowSparseSGD`. Time adds what each
kind of work takes at a measured rate; sending and the backbone are not in it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

METHODS = ("full", "fused", "random", "knn")

MOVES = {"full": 24, "fused": 27, "random": 26, "knn": 26}
"""Reads and writes of a computed row by normalising, its gradient and the optimizer, counted in the code."""


@dataclass(frozen=True)
class HeadShape:
    """The sizes that decide.

    Attributes:
        classes: N.
        dim: D.
        batch: B, over all ranks.
        ranks: P.
        active: M as a share of N in (0, 1], or a number of classes above 1.
        neighbours: K.
        samples_per_class: r, or None where unknown.
        backbone_gflop: 1e9 operations of the backbone for one training sample, forward and backward, or None.
        block: classes that the head works on at a time.
    """

    classes: int
    dim: int
    batch: int
    ranks: int = 1
    active: float = 0.1
    neighbours: int = 16
    samples_per_class: float | None = None
    backbone_gflop: float | None = None
    block: int = 2048

    def __post_init__(self) -> None:
        for name in ("classes", "dim", "batch", "ranks", "neighbours", "block"):
            value = getattr(self, name)
            if value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, got {value}")
        fits = 0 < self.active <= self.classes
        if not fits or (self.active > 1 and self.active != int(self.active)):
            raise ValueError(
                f"active must be a share in (0, 1], as 0.1, or a whole number of classes up to {self.classes:,}, got "
                f"{self.active:g}"
            )
        for name in ("samples_per_class", "backbone_gflop"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} must be above 0, got {value:g}; leave it out if you do not know it")

    @property
    def rows(self) -> int:
        """n, rows of the rank that holds most."""
        return math.ceil(self.classes / self.ranks)

    @property
    def distinct(self) -> float:
        """U, labels that differ in a batch, expected for labels drawn alike."""
        if self.classes == 1:
            return 1.0
        return max(1.0, -self.classes * math.expm1(self.batch * math.log1p(-1 / self.classes)))

    @property
    def active_rows(self) -> int:
        """m, the budget of a rank, or its share of the labels where they are more."""
        share = self.active if self.active <= 1 else self.active / self.classes
        budget = math.ceil(share * self.rows - 1e-9)
        return min(self.rows, max(budget, math.ceil(self.distinct / self.ranks)))

    @property
    def active_classes(self) -> int:
        """M."""
        return min(self.classes, self.active_rows * self.ranks)

    @property
    def graph_flop(self) -> float:
        """2 N^2 D, of an exact build."""
        return 2.0 * self.classes**2 * self.dim

    def computed_rows(self, method: str) -> int:
        """Rows of a rank that a step computes."""
        return self.rows if method in ("full", "fused") else self.active_rows


@dataclass(frozen=True)
class HeadCost:
    """Cost of a step with one method.

    Attributes:
        method: one of `METHODS`.
        flop: operations, all ranks together.
        state_bytes: what a rank holds between steps, without the logits' buffer.
        logits_bytes: kept logits of a rank.
        gradient_bytes: gradient of a rank's rows.
        scratch_bytes: blocks and features in work in backward, or the optimizer's copy of the gradient after it.
        message_bytes: what a rank receives in a step.
    """

    method: str
    flop: float
    state_bytes: int
    logits_bytes: int
    gradient_bytes: int
    scratch_bytes: int
    message_bytes: int

    @property
    def peak_bytes(self) -> int:
        """The most that the head and its optimizer hold on a rank at a time."""
        return self.state_bytes + self.logits_bytes + self.gradient_bytes + self.scratch_bytes


@dataclass(frozen=True)
class Rates:
    """What a machine does in a second on one device, at the head's shapes.

    Attributes:
        logits: operations a second of X W^T.
        grad_features: of the gradient times W.
        grad_rows: of the gradient, transposed, times X.
        softmax_forward: seconds a logit for scale, maximum, exponential and sum.
        softmax_backward: seconds a logit for the gradient of the softmax.
        copy: bytes a second, read and written ones counted.
        fresh: bytes a second of first writes to memory that was just allocated.
        graph: operations a second of the half precision product that builds the graph.
        sample: seconds a sample of a step with next to no classes: labels, features, calls.
    """

    logits: float
    grad_features: float
    grad_rows: float
    softmax_forward: float
    softmax_backward: float
    copy: float
    fresh: float
    graph: float
    sample: float


def head_cost(shape: HeadShape, method: str) -> HeadCost:
    """The table of the module's docstring for one method."""
    assert method in METHODS
    n, m, dim, batch, ranks = shape.rows, shape.active_rows, shape.dim, shape.batch, shape.ranks
    block = min(shape.block, shape.computed_rows(method))
    state, logits, gradient = 8 * n * dim, 4 * batch * m, 4 * m * dim + 20 * m
    if method in ("full", "fused"):
        logits, gradient = 4 * batch * n if method == "full" else 0, 4 * n * dim
    else:
        state += 4 * n
    if method == "knn":
        state += graph_bytes(shape)
    # A block of logits, its weights gathered, normalised and times their gradient; features and what becomes of them.
    scratch = 4 * batch * block + 12 * block * dim + 24 * batch * dim
    if method in ("full", "fused"):
        scratch = max(scratch, 4 * n * dim)
    others = (ranks - 1) / ranks
    messages = batch * others * (8 + 12 * dim) + 24 * batch * (ranks - 1)
    products, computed = (4, shape.classes) if method == "fused" else (3, shape.classes)
    if method in ("random", "knn"):
        computed = shape.active_classes
    return HeadCost(
        method, 2.0 * products * batch * dim * computed, state, logits, gradient, scratch, math.ceil(messages)
    )


def graph_bytes(shape: HeadShape) -> int:
    """Bytes of the edges into a rank's rows, as the project knn_softmax stores them: degrees, offsets, ids, ranks."""
    edges = shape.rows * min(shape.neighbours, max(shape.classes - 1, 1))
    rank = 0 if shape.ranks == 1 else 1 if shape.neighbours <= 256 else 2
    return 2 * shape.classes + 8 * (math.ceil(shape.classes / 256) + 1) + (4 + rank) * edges


def step_seconds(shape: HeadShape, method: str, rates: Rates) -> float:
    """Time of the head's step on one rank: products, softmax, passes over the rows. Without sending and backbone."""
    rows = shape.computed_rows(method)
    flop, logits = 2.0 * shape.batch * shape.dim * rows, float(shape.batch) * rows
    passes = 2 if method == "fused" else 1
    products = flop * (passes / rates.logits + 1 / rates.grad_features + 1 / rates.grad_rows)
    softmax = logits * (rates.softmax_forward + rates.softmax_backward)
    matrix = 4.0 * rows * shape.dim
    new = 2 if method in ("full", "fused") else 1
    return shape.batch * rates.sample + products + softmax + matrix * (MOVES[method] / rates.copy + new / rates.fresh)


def graph_share(shape: HeadShape, method: str = "full") -> float | None:
    """Arithmetic of one exact graph in units of an epoch's (head and, if known, backbone); None without r."""
    if shape.samples_per_class is None:
        return None
    samples = shape.classes * shape.samples_per_class
    head = head_cost(shape, method).flop / shape.batch
    return shape.graph_flop / (samples * (head + 1e9 * (shape.backbone_gflop or 0.0)))


def feasible(shape: HeadShape, memory: float, most_classes: int = 200_000, flop: float = 6e10) -> HeadShape:
    """The same head made small enough to run here: one rank, fewer classes, and a smaller batch only if it must be.

    Args:
        shape: as asked for.
        memory: bytes that no method may exceed.
        most_classes: upper bound of N.
        flop: upper bound of the arithmetic of a step.

    Raises:
        ValueError: not even 64 classes and one sample fit.
    """
    share = shape.active if shape.active <= 1 else shape.active / shape.classes
    small = replace(shape, ranks=1, active=share, classes=min(shape.classes, most_classes))
    while max(head_cost(small, method).peak_bytes for method in METHODS) > memory or (
        head_cost(small, "fused").flop > flop
    ):
        if small.classes > 4096 or (small.batch == 1 and small.classes > 64):
            small = replace(small, classes=max(64, int(small.classes / 1.25)))
        elif small.batch > 1:
            small = replace(small, batch=max(1, int(small.batch / 1.25)))
        else:
            raise ValueError(
                f"one sample of dim {shape.dim} and 64 classes take more than {memory / 1e6:,.0f} MB: check --dim, "
                "or do without the measurement (--no-measure)"
            )
    return small
