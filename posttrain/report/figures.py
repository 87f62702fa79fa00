"""Figures as PNG files, by matplotlib."""

from __future__ import annotations

import io
import math
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import ArrayLike


def score_histogram(
    edges: ArrayLike, kept: ArrayLike, removed: ArrayLike, *, score: str, threshold: float | None = None
) -> bytes:
    """A PNG histogram of the scores of kept and removed samples, with counts on a logarithmic axis.

    `edges` [bins + 1]; `kept` and `removed` [bins] are counts; `score` is the label of the axis; `threshold`, if given
    and finite, is drawn as a line: the lowest score that was removed.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.5), layout="constrained")
    axes = figure.add_subplot()
    for counts, name, color in ((kept, "kept", "tab:blue"), (removed, "removed", "tab:red")):
        counts = np.asarray(counts)
        label = f"{name} ({int(counts.sum()):,})"
        axes.stairs(counts, np.asarray(edges), fill=True, alpha=0.5, color=color, label=label)
    axes.set_ylim(0.5, 2 * max(1, int(np.max(kept)), int(np.max(removed))))
    axes.set_yscale("log", nonpositive="clip")
    if threshold is not None and math.isfinite(threshold):
        axes.axvline(threshold, color="black", linestyle="--", linewidth=1, label=f"threshold {threshold:.3g}")
    axes.set_xlabel(score)
    axes.set_ylabel("samples")
    axes.legend()
    png = io.BytesIO()
    FigureCanvasAgg(figure).print_png(png)
    return png.getvalue()
