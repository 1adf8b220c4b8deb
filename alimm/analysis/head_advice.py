"""What the costs of a classifier of very many classes mean, in sentences: which method fits, and which can pay."""

from __future__ import annotations

import math

from alimm.analysis.head_cost import METHODS, HeadCost, HeadShape, Rates, graph_share, head_cost

EXACT_GRAPH_ROWS = 300_000
"""Beyond so many classes an exact graph on a CPU takes longer than most will wait."""


def advice(shape: HeadShape, memory: float | None = None, rates: Rates | None = None, device: str = "cpu") -> list[str]:
    """What the numbers mean, in sentences.

    Args:
        shape: of the head.
        memory: bytes that a rank has for head and optimizer, if known.
        rates: of the machine, if measured.
        device: ``'cpu'`` or ``'cuda'``.
    """
    costs = {method: head_cost(shape, method) for method in METHODS}
    lines = [*_worth(shape, costs), *_memory(costs, memory), *_active(shape), *_graph(shape, rates, device)]
    if shape.ranks > shape.classes:
        lines.append(f"{shape.ranks - shape.classes} of {shape.ranks} ranks hold no class: use fewer ranks.")
    return lines


def _worth(shape: HeadShape, costs: dict[str, HeadCost]) -> list[str]:
    if shape.backbone_gflop is None:
        return ["Give --backbone-gflop (ResNet-50 at 224: about 24.6 a sample) to see how much the head can matter."]
    backbone = shape.backbone_gflop * 1e9 * shape.batch
    full, active = costs["full"].flop, costs["knn"].flop
    share, gain = full / (full + backbone), (full + backbone) / (active + backbone)
    equal = shape.backbone_gflop * 1e9 / (6 * shape.dim)
    line = (
        f"The full softmax is {share:.1%} of a step's arithmetic (half at {equal:,.0f} classes); an active set of "
        f"{shape.active_classes:,} classes makes a step at most {gain:.2f} times as fast (model)."
    )
    if gain < 1.15:
        line += " In time the head does not matter here; choose the method by memory and accuracy."
    return [line]


def _memory(costs: dict[str, HeadCost], memory: float | None) -> list[str]:
    if memory is None:
        return []
    fits = [method for method in METHODS if costs[method].peak_bytes <= memory]
    need = {method: f"{method} {human(cost.peak_bytes)}" for method, cost in costs.items()}
    beside = "beside the backbone"
    if "full" in fits:
        return [f"All that full needs, {human(costs['full'].peak_bytes)}, fits {human(memory)} of a rank {beside}."]
    if "fused" in fits:
        return [
            f"full does not fit ({human(costs['full'].peak_bytes)} of {human(memory)} a rank), fused does "
            f"({human(costs['fused'].peak_bytes)}): the same numbers at 4/3 of the arithmetic."
        ]
    if fits:
        return [
            f"In {human(memory)} of a rank neither full nor fused fits, but {' and '.join(fits)} "
            f"{'do' if len(fits) > 1 else 'does'}: "
            f"{', '.join(need[method] for method in METHODS)}."
        ]
    more = math.ceil(costs["knn"].peak_bytes / memory)
    return [
        f"No method fits {human(memory)} a rank ({', '.join(need[method] for method in METHODS)}): take about {more} "
        "times as many ranks, fewer features, or a smaller active set."
    ]


def _active(shape: HeadShape) -> list[str]:
    labels, lists = shape.distinct, shape.neighbours
    depth = shape.active_classes / labels
    union = -shape.classes * math.expm1(-labels * (lists + 1) / shape.classes)
    lines = []
    if shape.classes < shape.batch * lists:
        lines.append(
            f"KNN softmax cannot pay here: {shape.classes:,} classes are fewer than B x K = "
            f"{shape.batch * lists:,}; the neighbours of a batch are up to {union / shape.classes:.0%} of all classes."
        )
    line = (
        f"A budget of {shape.active_classes:,} classes is K_eff = M / U = {depth:,.1f} for each of the {labels:,.0f} "
        "distinct labels of a batch."
    )
    if depth < 2:
        line += " Labels fill it and there is no room for neighbours: raise --active or lower --batch."
    elif depth < lists + 1:
        line += f" Lists of K = {lists} are used to rank {max(int(depth) - 1, 1)} or so: more neighbours gain nothing."
    elif depth > 2 * (lists + 1):
        drawn = max(0.0, 1 - union / shape.active_classes)
        line += (
            f" At least {drawn:.0%} of it is drawn at random: lists of {int(depth) - 1} neighbours would fit, or a "
            "smaller active set would do."
        )
    return [*lines, line]


def _graph(shape: HeadShape, rates: Rates | None, device: str) -> list[str]:
    seconds = None if rates is None else shape.graph_flop / shape.ranks / rates.graph
    built = f"An exact graph costs 2 N^2 D = {shape.graph_flop:.1e} FLOP"
    if seconds is not None:
        built += f", about {duration(seconds)} on {shape.ranks} rank(s) at the measured half precision rate (model)"
    full, knn = graph_share(shape, "full"), graph_share(shape, "knn")
    if full is None or knn is None:
        built += "; of a full softmax epoch that is 1 / (3 r) with r samples a class (give --samples-per-class)."
        late = 0.0
    else:
        built += f": {full:.1%} of an epoch with the full softmax and {knn:.1%} of one with KNN softmax in arithmetic."
        late = knn
    lines = [built]
    slow = (device == "cpu" and shape.classes > EXACT_GRAPH_ROWS) or (seconds is not None and seconds > 3600)
    if slow or late > 0.25:
        why = "it takes too long" if slow else f"it would be {late:.0%} of an epoch"
        lines.append(f"Build the graph with IVF (backend='faiss_ivf') or only every few epochs: exact, {why}.")
    return lines


def human(count: float) -> str:
    """A number of bytes for people."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("KB", 1e3)):
        if count >= size:
            return f"{count / size:,.3g} {unit}" if count < 1e3 * size else f"{count / size:,.0f} {unit}"
    return f"{count:.0f} B"


def duration(seconds: float) -> str:
    """A time for people."""
    if seconds < 1:
        return f"{seconds * 1e3:.3g} ms"
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.3g} s"
