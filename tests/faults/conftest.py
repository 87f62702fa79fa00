"""A Ray to kill processes of."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

# before any Ray starts: its workers are to find the network of these tests
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH")]))


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    from posttrain.cluster.session import session

    with session(num_cpus=2, object_store_gb=0.5):
        yield
