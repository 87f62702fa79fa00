"""Methods for training on noisy labels: their names and arguments. `vision.losses` has their formulas."""

from __future__ import annotations

from typing import Literal

Method = Literal[
    "cross_entropy",
    "label_smoothing",
    "mixup",
    "gce",
    "sce",
    "bootstrapping",
    "elr",
    "forward",
    "co_teaching",
    "sop",
]
"""How a network is trained on labels some of which are wrong."""

METHODS: dict[Method, dict[str, float]] = {
    "cross_entropy": {},
    "label_smoothing": {"smoothing": 0.1},
    "mixup": {"alpha": 1.0},
    "gce": {"q": 0.7},
    "sce": {"alpha": 0.1, "beta": 1.0, "log_zero": -4.0},
    "bootstrapping": {"beta": 0.95},
    "elr": {"strength": 3.0, "momentum": 0.7},
    "forward": {},
    "co_teaching": {"ramp": 0.05},
    "sop": {"rate_u": 1.0, "rate_v": 10.0},
}
"""The arguments of each method, as its paper sets them."""

NEEDS_NOISE: tuple[Method, ...] = ("forward", "co_teaching")
"""Methods that need an estimate of the label noise."""
