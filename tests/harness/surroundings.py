"""What surrounds a run that is killed: an environment without any other Ray, a local cluster, an MLflow server."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import psutil

from harness import python_path


def environment(folder: str) -> dict[str, str]:
    """Of processes that know nothing of any other Ray on this machine."""
    own = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return {
        **own,
        "NO_PROXY": "127.0.0.1,localhost",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": python_path(),
        "RAY_AUTH_MODE": "disabled",
        "RAY_BACKEND_LOG_LEVEL": "fatal",
        # Ray's workers give way to all others by default: beside other work these would wait for minutes
        "RAY_worker_niceness": "0",
        # short: the path of a socket has at most 107 characters
        "RAY_TMPDIR": folder,
        "RAY_USAGE_STATS_ENABLED": "0",
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    }


NODES = """
import sys
from ray.cluster_utils import Cluster

node = {"num_cpus": 1, "num_gpus": 0, "object_store_memory": 100_000_000}
cluster = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
others = [cluster.add_node(**node) for _ in range(2)]
print(cluster.address, flush=True)
for line in sys.stdin:
    if line.strip() == "kill":
        cluster.remove_node(others.pop(0), allow_graceful=False)
    elif line.strip() == "mend":
        while len(others) < 2:
            others.append(cluster.add_node(**node))
    else:
        break
    print("done", flush=True)
cluster.shutdown()
"""


class Nodes:
    """A cluster of three nodes of one CPU each on this machine, in a process of its own."""

    def __init__(self, env: Mapping[str, str]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", NODES],
            env=dict(env),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert self._process.stdout is not None
        self.address = self._process.stdout.readline().strip()
        if not self.address:
            raise RuntimeError("the local cluster has not started")

    def ask(self, what: Literal["kill", "mend"]) -> None:
        """Kill all processes of a node that is not the head; or start as many nodes as there were."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(f"{what}\n")
        self._process.stdin.flush()
        self._process.stdout.readline()

    def close(self) -> None:
        own = family(self._process.pid)
        assert self._process.stdin is not None
        self._process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=60)
        end(own)


class Server:
    """An MLflow server on loopback."""

    def __init__(self, folder: Path, env: Mapping[str, str]) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.uri = f"http://127.0.0.1:{port}"
        self._command = [
            *(sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port)),
            *("--backend-store-uri", f"sqlite:///{folder / 'mlflow.db'}", "--artifacts-destination"),
            *(str(folder / "mlartifacts"), "--workers", "1"),
        ]
        self._env = dict(env)
        self._returning: threading.Thread | None = None
        self._start()

    def _start(self) -> None:
        """Start it, and wait until it answers."""
        self._process = subprocess.Popen(
            self._command, env=self._env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        deadline = time.monotonic() + 300
        while True:
            try:
                urllib.request.urlopen(f"{self.uri}/health", timeout=5).close()
                return
            except OSError:
                if time.monotonic() > deadline:
                    raise RuntimeError("the MLflow server does not answer") from None
                time.sleep(0.2)

    def kill(self) -> None:
        """Also where it is dead already."""
        found = family(self._process.pid)
        self._process.kill()
        self._process.wait()
        end(found)

    def come_back(self, after_s: float) -> None:
        """Start it once so many seconds are over, while the caller goes on."""

        def start() -> None:
            time.sleep(after_s)
            self._start()

        self._returning = threading.Thread(target=start)
        self._returning.start()

    def mend(self) -> None:
        """Wait until it is back; start it where it has died."""
        if self._returning is not None:
            self._returning.join()
            self._returning = None
        if self._process.poll() is not None:
            self._start()

    def close(self) -> None:
        self.mend()
        self.kill()


def family(pid: int) -> list[psutil.Process]:
    """The descendants of a process."""
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def end(processes: Sequence[psutil.Process]) -> int:
    """SIGKILLs those that are still there (psutil tells a process from another with the same id)."""
    count = 0
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                process.kill()
                count += 1
    return count
