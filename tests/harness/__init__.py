"""What the tests break posttrain with: bad input, networks that cannot be cleaned with, kills at random moments."""

from __future__ import annotations

import os
from pathlib import Path

RESULTS = Path(__file__).parents[2] / "pipelines" / "benchmarks" / "results"
"""Where the tables are written."""


def python_path() -> str:
    """PYTHONPATH of processes, Ray's workers among them, that import posttrain from this checkout, and the harness."""
    own = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]
    given = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    return os.pathsep.join([*own, *(path for path in given if path and path not in own)])
