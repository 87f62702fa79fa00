from __future__ import annotations

import struct

import numpy as np

from posttrain.report.figures import score_histogram


def png_size(png: bytes) -> tuple[int, int]:
    assert png.startswith(b"\x89PNG\r\n")
    return struct.unpack(">II", png[16:24])


def test_the_score_histogram_is_a_png_even_where_nothing_was_removed():
    edges = np.linspace(-1, 1, 11)
    width, height = png_size(score_histogram(edges, np.arange(10), np.zeros(10), score="loo_margin", threshold=0.3))
    assert width > height > 100
    png_size(score_histogram(edges, np.zeros(10), np.zeros(10), score="loss", threshold=float("inf")))
