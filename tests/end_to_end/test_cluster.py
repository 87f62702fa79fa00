"""Jobs on a real head node, and runs on several real nodes; each Ray in processes of its own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from servers import free_ports
from small_data import assert_same_result, removed_ids

pytestmark = [pytest.mark.ray, pytest.mark.slow]

RunFile = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def environment() -> Iterator[dict[str, str]]:
    """For processes that know nothing of the test session's Ray."""
    own = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    # short: the path of a socket has at most 107 characters
    folder = tempfile.mkdtemp(prefix="pt", dir="/tmp")
    yield {
        **own,
        "PATH": f"{Path(sys.executable).parent}:{own['PATH']}",
        "NO_PROXY": "127.0.0.1,localhost",
        "RAY_AUTH_MODE": "disabled",
        "RAY_BACKEND_LOG_LEVEL": "fatal",
        "RAY_TMPDIR": folder,
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    shutil.rmtree(folder, ignore_errors=True)


# -- jobs --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dashboard(environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address that jobs are submitted to, of a head node on this machine."""
    names = ["port", "dashboard-port", "ray-client-server-port", "dashboard-agent-listen-port", "metrics-export-port"]
    ports = dict(zip(names, free_ports(len(names)), strict=True))
    options = ["--num-cpus=2", "--num-gpus=0", "--object-store-memory=200000000", "--node-ip-address=127.0.0.1"]
    # 0: the system chooses; Ray's own choice, 10002 to 19999, may be another Ray's, too
    options += ["--dashboard-host=127.0.0.1", "--min-worker-port=0", "--max-worker-port=0"]
    options += [f"--{name}={port}" for name, port in ports.items()]
    log = tmp_path_factory.mktemp("head") / "log"
    with log.open("w") as stream:
        head = subprocess.Popen(
            ["ray", "start", "--head", "--block", *options], env=environment, stdout=stream, stderr=stream
        )
    address = f"http://127.0.0.1:{ports['dashboard-port']}"
    try:
        deadline = time.monotonic() + 120
        while True:
            try:
                urllib.request.urlopen(f"{address}/api/version", timeout=5).close()
                break
            except (OSError, urllib.error.URLError):
                assert head.poll() is None, log.read_text()
                assert time.monotonic() < deadline, "the dashboard does not answer"
                time.sleep(0.2)
        yield address
    finally:
        head.terminate()
        head.wait(timeout=60)


@pytest.mark.long
def test_a_submitted_job_cleans_and_its_id_keeps_a_second_one_away(
    dashboard: str, environment: dict[str, str], runfile: RunFile, tmp_path: Path
) -> None:
    raw = runfile(tmp_path / "run", ray={"workers": 1}, removal={"max_rounds": 1})
    (tmp_path / "job").mkdir()
    (tmp_path / "job" / "cluster-run.yaml").write_text(yaml.safe_dump(raw))

    def submit() -> subprocess.CompletedProcess[str]:
        options = ["--address", dashboard, "--submission-id", "night-1", "--working-dir", "."]
        return subprocess.run(
            ["ray", "job", "submit", *options, "--", "posttrain", "clean", "cluster-run.yaml"],
            cwd=tmp_path / "job",
            env=environment,
            capture_output=True,
            text=True,
            timeout=600,
        )

    first = submit()
    assert first.returncode == 0, first.stdout + first.stderr
    assert "'night-1' succeeded" in first.stdout + first.stderr
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["rounds"] == 1 and summary["removed"] == len(removed_ids(tmp_path / "run")) == 45
    again = submit()
    assert again.returncode != 0
    assert "night-1" in again.stdout + again.stderr and "already exists" in again.stdout + again.stderr


# -- several nodes -----------------------------------------------------------------------------------------

CLUSTER = """
import json, os, subprocess, sys
from ray.cluster_utils import Cluster

run_file, lost_run_file, elsewhere = sys.argv[1:]
node = {"num_cpus": 1, "num_gpus": 0, "object_store_memory": 100_000_000}
cluster = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})

def clean(path):
    command = [sys.executable, "-m", "posttrain.cli", "clean", path, "--set", f"ray.address={cluster.address}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400)
    return [done.returncode, done.stderr]

try:
    for _ in range(2):
        cluster.add_node(**node)
    many = clean(run_file)
    # what lies under the home folder is not shared with this one
    lost = cluster.add_node(**node, env_vars={"HOME": elsewhere})
    print(json.dumps({"many": many, "lost": clean(lost_run_file), "node": lost.node_id}))
finally:
    cluster.shutdown()
"""


@pytest.fixture(scope="module")
def several_nodes(
    environment: dict[str, str], runfile: RunFile, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """Runs on three nodes of one CPU each, all taken by workers, and on four of which one has another home folder."""
    folder = tmp_path_factory.mktemp("nodes")
    home = folder / "home"
    home.mkdir()
    files = {"run": folder / "run.yaml", "lost": folder / "lost.yaml"}
    files["run"].write_text(yaml.safe_dump(runfile(folder / "run", ray={"workers": 3})))
    raw = runfile(folder / "run", ray={"workers": 3})
    raw["run"]["path"] = "~/run"
    files["lost"].write_text(yaml.safe_dump(raw))
    done = subprocess.run(
        [sys.executable, "-c", CLUSTER, *files.values(), folder / "elsewhere"],
        env={**environment, "HOME": str(home)},
        capture_output=True,
        text=True,
        timeout=850,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return {"folder": folder, **json.loads(done.stdout.splitlines()[-1])}


@pytest.mark.long
def test_several_nodes_give_the_ids_and_the_weights_of_one(
    several_nodes: dict[str, Any], undisturbed: Callable[[str], dict[str, Any]]
) -> None:
    code, told = several_nodes["many"]
    assert code == 0, told
    assert_same_result(several_nodes["folder"] / "run", undisturbed("head")["run"])


@pytest.mark.long
def test_a_run_folder_that_one_node_does_not_see_is_refused_before_any_work(several_nodes: dict[str, Any]) -> None:
    code, told = several_nodes["lost"]
    assert code == 2, told
    error = told.splitlines()[-1]
    assert error.startswith("error: run.path = ~/run: node ")
    assert f"({several_nodes['node'][:8]}) does not see what the driver wrote there" in error
    assert not (several_nodes["folder"] / "home" / "run").exists()
    assert not (several_nodes["folder"] / "elsewhere").exists()
