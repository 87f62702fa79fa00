"""A check, before any work, that all nodes of a cluster see the same files."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from pyarrow import fs
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from posttrain.errors import ConfigError, PosttrainError
from posttrain.store.folder import RunFolder, resolve

ANSWER_S = 120.0
"""Seconds in which a node has to answer; starting a first worker process there takes a few."""


@dataclass(frozen=True)
class Complaint:
    """What a node does not see."""

    key: str
    """The key of the run file that names it."""
    location: str
    why: str


def refuse_unshared(location: str, data: Mapping[str, Sequence[str]]) -> None:
    """Raises ConfigError where a node of the cluster does not see the run folder at `location`, or a data path.

    Every node has to read what the driver writes to the run folder, and the driver what the node writes. `data`: the
    locations that each key of the run file names. With one node there is nothing to check.
    """
    nodes = {node["NodeID"]: f"{node['NodeManagerHostname']} ({node['NodeID'][:8]})" for node in _alive()}
    if len(nodes) > 1:
        check_nodes(location, data, nodes, _ask_nodes)


def _alive() -> list[dict[str, Any]]:
    return [node for node in ray.nodes() if node["Alive"]]


def _ask_nodes(nodes: Sequence[str], *question: Any) -> dict[str, Complaint | None]:
    remote: Any = ray.remote(check_this_node)
    pending = {
        node: remote.options(
            num_cpus=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False), max_retries=1
        ).remote(*question, node)
        for node in nodes
    }
    done, _ = ray.wait(list(pending.values()), num_returns=len(pending), timeout=ANSWER_S)
    found: dict[str, Complaint | None] = {}
    for node, reference in pending.items():
        if reference not in done:
            found[node] = Complaint("ray.address", "the cluster", f"has not answered within {ANSWER_S:.0f} s")
            continue
        try:
            found[node] = ray.get(reference)
        except Exception as error:  # a node that goes, an environment that cannot be made there
            found[node] = Complaint(
                "ray.address", "the cluster", f"cannot work ({str(error).strip().splitlines()[-1]})"
            )
    return found


def check_nodes(
    location: str,
    data: Mapping[str, Sequence[str]],
    nodes: Mapping[str, str],
    ask: Callable[..., dict[str, Complaint | None]],
) -> None:
    """`refuse_unshared` for these nodes (id to name); `ask` gives the complaint of each node, or None."""
    folder, token = RunFolder(location), uuid.uuid4().hex
    # hidden: if the check is killed, what it leaves behind does not keep a run from using the folder
    place = folder.path(f".nodes-{token}")
    folder.write_bytes(f"{place}/driver", token.encode())
    try:
        found = ask(list(nodes), location, token, data)
        for node in nodes:
            if found[node] is None and not _reads(folder, f"{place}/{node}", token):
                found[node] = Complaint("run.path", location, "writes what the driver does not see there")
    finally:
        with contextlib.suppress(OSError):
            folder.files.delete_dir(place)
    wrong = [(nodes[node], complaint) for node, complaint in found.items() if complaint is not None]
    if wrong:
        name, complaint = wrong[0]
        others = f" (and {len(wrong) - 1} more of {len(nodes)} nodes)" if len(wrong) > 1 else ""
        raise ConfigError(
            f"{complaint.key} = {complaint.location}: node {name}{others} {complaint.why}; all nodes of a cluster need "
            "the same storage: s3://, gs://, or a file system that is mounted on each under the same absolute path"
        )


def check_this_node(location: str, token: str, data: Mapping[str, Sequence[str]], node: str) -> Complaint | None:
    """What this process does not see of the run folder and the data; None where it sees all."""
    try:
        folder = RunFolder(location)
        place = folder.path(f".nodes-{token}")
        if not _reads(folder, f"{place}/driver", token):
            return Complaint("run.path", location, "does not see what the driver wrote there")
        folder.write_bytes(f"{place}/{node}", token.encode())
    except (OSError, PosttrainError) as error:
        return Complaint("run.path", location, f"cannot work there ({' '.join(str(error).split())})")
    for key, locations in data.items():
        for path in locations:
            try:
                files, inside = resolve(path)
                if files.get_file_info(inside).type == fs.FileType.NotFound:
                    return Complaint(key, path, "does not see it")
            except (OSError, PosttrainError) as error:
                return Complaint(key, path, f"cannot look there ({' '.join(str(error).split())})")
    return None


def _reads(folder: RunFolder, path: str, token: str) -> bool:
    return folder.exists(path) and folder.read_bytes(path) == token.encode()
