"""Plots as SVG, for a page."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence

from alimm.report.page import Raw

COLOURS = ("#2563b0", "#c2571a", "#2e8b57", "#8a4fb0", "#7a6a00", "#b03060")


def curves(panels: Mapping[str, Mapping[str, tuple[Sequence[float], Sequence[float]]]], x_label: str = "epoch") -> Raw:
    """Line plots side by side, as inline SVG.

    Args:
        panels: title of the panel -> name of the line -> (x, y).
        x_label: of every panel.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        1, len(panels), figsize=(4.4 * len(panels), 3.2), squeeze=False, layout="constrained"
    )
    for axis, (title, lines) in zip(axes[0], panels.items(), strict=True):
        for colour, (name, (x, y)) in zip(COLOURS * 4, lines.items(), strict=False):
            axis.plot(x, y, color=colour, label=name, linewidth=1.8, marker="o" if len(x) < 20 else None, markersize=4)
        axis.set_title(title, fontsize=11, loc="left")
        axis.set_xlabel(x_label)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        if len(lines) > 1:
            axis.legend(frameon=False, fontsize=9)
    stream = io.StringIO()
    figure.savefig(stream, format="svg", metadata={"Date": None})
    pyplot.close(figure)
    text = stream.getvalue()
    return Raw(f"<figure>{text[text.index('<svg') :]}</figure>")
