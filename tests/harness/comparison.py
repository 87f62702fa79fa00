"""Whether a run on the digits lost or changed anything beside another: results, samples, MLflow."""

from __future__ import annotations

import contextlib
import json
import sqlite3
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq

SAMPLES = 1203
"""Of the digits' training set."""


def differences(run: Path, expected: Path) -> list[str]:
    """In what a run's results are not those of the other, bit for bit."""
    found = []
    if not (run / "summary.json").exists():
        return ["no summary"]
    ids = [pq.read_table(folder / "removed.parquet")["sample_id"].to_pylist() for folder in (run, expected)]
    if ids[0] != ids[1]:
        found.append("removed ids")
    weights = [(folder / "model.safetensors").read_bytes() for folder in (run, expected)]
    if weights[0] != weights[1]:
        found.append("weights")
    for path in sorted(expected.glob("rounds/*/scores.parquet")):
        own = run / path.relative_to(expected)
        if not own.exists() or own.read_bytes() != path.read_bytes():
            found.append(f"scores of round {path.parent.name}")
    names = [sorted(p.parent.name for p in folder.glob("rounds/*/round.json")) for folder in (run, expected)]
    if names[0] != names[1]:
        found.append("committed rounds")
    found += [f"{path.relative_to(run)} left behind" for path in run.rglob("*.tmp")]
    found += [f"{path.relative_to(run)} left behind" for path in run.glob("rounds/*/scoring")]
    return found


def misplaced(run: Path) -> int:
    """Training samples that are not in exactly one of kept, removed and quarantined."""
    try:
        manifest = pq.read_table(run / "manifest.parquet")["sample_id"].to_pylist()
        quarantined = pq.read_table(run / "quarantine.parquet").to_pylist()
        removed = pq.read_table(run / "removed.parquet")["sample_id"].to_pylist()
        images = [
            i for p in sorted((run / "cleaned").glob("part-*.parquet")) for i in pq.read_table(p)["id"].to_pylist()
        ]
    except FileNotFoundError:
        return SAMPLES
    places = Counter([*manifest, *removed, *(row["sample_id"] for row in quarantined if row["split"] == "train")])
    doubled = sum(count - 1 for count in places.values())
    return doubled + abs(SAMPLES - len(places)) + sum((Counter(images) - Counter(manifest)).values())


def tracked(run: Path, database: Path) -> list[str]:
    """In what MLflow's database does not hold one run per round, at its end, beneath one parent."""
    if not (run / "tracking.json").exists():
        return ["not in MLflow"]
    with contextlib.closing(sqlite3.connect(database)) as connection:
        runs = {key: rest for key, *rest in connection.execute("SELECT run_uuid, name, status FROM runs")}
        tags = connection.execute("SELECT run_uuid, key, value FROM tags").fetchall()
    parents = [key for key, name, value in tags if (name, value) == ("posttrain.run", str(run))]
    own = json.loads((run / "tracking.json").read_text())["run_id"]
    beneath = [runs[key] for key, name, value in tags if (name, value) == ("mlflow.parentRunId", own)]
    names = sorted(name for name, _ in beneath)
    expected = [f"round {path.parent.name}" for path in sorted(run.glob("rounds/*/round.json"))]
    found = [] if names == expected else [f"MLflow holds {names}"]
    found += [f"{name} is {status}" for name, status in (*beneath, runs[own]) if status != "FINISHED"]
    if parents != [own]:
        found.append(f"{len(parents)} parents in MLflow")
    return found
