"""What a run tells the world: its sockets, and the passwords that it was given."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from posttrain.config import RunFile
from posttrain.runs.clean import clean

pytestmark = pytest.mark.ray

SECRET = "hunter2-planted"


def descendants(pid: int) -> Iterator[int]:
    """The process and all that it started, by the kernel's own lists."""
    yield pid
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            yield from descendants(int(child))


def listening(pids: set[int]) -> set[str]:
    """The addresses, in the kernel's hexadecimal, on which these processes wait for connections."""
    sockets: set[str] = set()
    for pid in pids:
        for number in Path(f"/proc/{pid}/fd").iterdir():
            try:
                sockets.update(re.findall(r"socket:\[(\d+)\]", os.readlink(number)))
            except OSError:
                continue  # closed since
    found: set[str] = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            _, local, _, state, *_, inode = line.split()[:10]
            if state == "0A" and inode in sockets:
                found.add(local.partition(":")[0])
    return found


LOOPBACK = {"0100007F", "0000000000000000FFFF00000100007F", "00000000000000000000000001000000"}
"""127.0.0.1, the same as an IPv6 address, and ::1."""


def test_a_ray_that_posttrain_starts_is_reachable_from_this_machine_alone(shared_workers: None) -> None:
    found = listening(set(descendants(os.getpid())))
    assert found and found <= LOOPBACK


def test_a_planted_password_is_nowhere_in_the_run_folder_nor_in_what_is_printed(
    runfile: Callable[..., dict[str, Any]],
    shared_workers: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    for name in ("AWS_SECRET_ACCESS_KEY", "MLFLOW_TRACKING_PASSWORD"):
        monkeypatch.setenv(name, SECRET)
    raw = runfile(
        tmp_path / "run",
        data={"root": f"https://somebody:{SECRET}@data.example.com/sets?token={SECRET}"},
        removal={"max_rounds": 1},
        # MLflow beside the run, where its database is looked through, too
        tracking={"uri": None, "log_model": True},
    )
    clean(RunFile.model_validate(raw))
    # and once more: what is finished says so
    clean(RunFile.model_validate(raw))
    printed = capfd.readouterr()
    assert "validation accuracy" in printed.out and SECRET not in printed.out + printed.err
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert {"run.yaml", "summary.json", "mlflow.db", "tracking.json"} <= {path.name for path in files}
    assert "data.example.com/sets" in (tmp_path / "run" / "run.yaml").read_text()
    for path in files:
        assert SECRET.encode() not in path.read_bytes(), path
        if path.suffix == ".parquet":
            assert SECRET not in str(pq.read_table(path).to_pylist()), path
