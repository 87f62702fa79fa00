"""Methods for training on noisy labels: their names and arguments. `vision.losses` has their formulas."""

from __future__ import annotations

from collections.abc import Callable
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

_SHARE = "from 0 to 1", lambda value: 0 <= value <= 1
_BELOW_ONE = "at least 0 and below 1", lambda value: 0 <= value < 1
_NOT_NEGATIVE = "at least 0", lambda value: 0 <= value < float("inf")

BOUNDS: dict[Method, dict[str, tuple[str, Callable[[float], bool]]]] = {
    "label_smoothing": {"smoothing": _BELOW_ONE},
    "mixup": {"alpha": ("above 0", lambda value: 0 < value < float("inf"))},
    "gce": {"q": ("above 0 and at most 1", lambda value: 0 < value <= 1)},
    "sce": {
        "alpha": _NOT_NEGATIVE,
        "beta": _NOT_NEGATIVE,
        "log_zero": ("below 0", lambda value: float("-inf") < value < 0),
    },
    "bootstrapping": {"beta": _SHARE},
    "elr": {"strength": _NOT_NEGATIVE, "momentum": _BELOW_ONE},
    "co_teaching": {"ramp": _SHARE},
    "sop": {"rate_u": _NOT_NEGATIVE, "rate_v": _NOT_NEGATIVE},
}
"""The values that an argument may have, in words and as a function."""

NEEDS_NOISE: tuple[Method, ...] = ("forward", "co_teaching")
"""Methods that need an estimate of the label noise."""
