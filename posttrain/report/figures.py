"""Pictures of a round."""

from __future__ import annotations

import io
import math
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class ScoreHistogram:
    """How many samples of each score were kept, and how many were removed or relabelled."""

    score: str
    edges: np.ndarray
    """[bins + 1]"""
    kept: np.ndarray
    """[bins] counts."""
    acted_on: np.ndarray
    """[bins] counts."""
    lowest: float | None = None
    """Lowest score among those that were acted on."""

    def png(self) -> bytes:
        """The picture, with counts on a logarithmic axis."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        figure = Figure(figsize=(7, 3.5), layout="constrained")
        axes = figure.add_subplot()
        for counts, name, color in ((self.kept, "kept", "tab:blue"), (self.acted_on, "removed", "tab:red")):
            label = f"{name} ({int(counts.sum()):,})"
            axes.stairs(counts, self.edges, fill=True, alpha=0.5, color=color, label=label)
        axes.set_ylim(0.5, 2 * max(1, int(np.max(self.kept)), int(np.max(self.acted_on))))
        axes.set_yscale("log", nonpositive="clip")
        if self.lowest is not None and math.isfinite(self.lowest):
            label = f"from {self.lowest:.3g}"
            axes.axvline(self.lowest, color="black", linestyle="--", linewidth=1, label=label)
        axes.set_xlabel(self.score)
        axes.set_ylabel("samples")
        axes.legend()
        png = io.BytesIO()
        FigureCanvasAgg(figure).print_png(png)
        return png.getvalue()
