"""What every test may count on: one thread per process, one Ray, shapes and types checked, skips that say why."""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness import python_path

# Before anyone imports torch: worker processes share the cores, and threads of one steal from the others.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Before any Ray starts: its workers, and commands in processes of their own, import this checkout and the harness.
os.environ["PYTHONPATH"] = python_path()
# Seconds per test, read by pytest-timeout: a Ray that hangs must fail, not block.
os.environ.setdefault("PYTEST_TIMEOUT", "900")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--share", metavar="I/N", help="run the I-th of N shares of the tests, by a hash of their names, from 0 on"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if (share := config.getoption("--share")) is not None:
        own, count = map(int, share.split("/"))
        of_others = [item for item in items if zlib.crc32(item.nodeid.encode()) % count != own]
        config.hook.pytest_deselected(items=of_others)
        items[:] = [item for item in items if zlib.crc32(item.nodeid.encode()) % count == own]
    needing = [item for item in items if item.get_closest_marker("gpu")]
    if not needing:
        return
    import torch

    if not torch.cuda.is_available():
        for item in needing:
            item.add_marker(pytest.mark.skip(reason="needs a GPU, torch.cuda sees none"))


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """One Ray for all tests of a process."""
    from posttrain.cluster.session import session

    with session(num_cpus=2, object_store_gb=0.5):
        yield


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """The folder with the data sets that are not in the repository: POSTTRAIN_DATA, or ../shared/data."""
    folder = Path(os.environ.get("POSTTRAIN_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"needs data sets that are not in the repository: {folder} is not there (POSTTRAIN_DATA)")
    return folder
