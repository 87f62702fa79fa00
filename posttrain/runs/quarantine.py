"""Samples that cannot be used: `quarantine.parquet` says which, and why."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pyarrow as pa

from posttrain.arrow_compute import pc
from posttrain.errors import PosttrainError, RecipeError
from posttrain.live import Live, Rows
from posttrain.runs.context import Run
from posttrain.schema import PARTITION, ROW, SAMPLE_ID
from posttrain.store.features import ShardSummary, quarantine_table

_FILE = "quarantine.parquet"


def quarantine(run: Run, summaries: Mapping[str, Sequence[ShardSummary]], live: Live) -> Live:
    """Write down what could not be embedded, by split; what is live without it.

    Raises PosttrainError where nothing of a split can be used.
    """
    tables = []
    for name, found in summaries.items():
        table = _unusable(name, found)
        if table.num_rows:
            tables.append(table)
            if name == "train":
                live = live.quarantine(Rows.of_table(table))
    _add(run, tables)
    for name in ("validation", "test"):
        if name in summaries and not any(found.count for found in summaries[name]):
            raise PosttrainError(
                f"not one {name} sample can be used; {_FILE} in the run folder gives the reasons: is data.{name} right?"
            )
    if live.count <= 0:
        raise PosttrainError(
            f"not one training sample can be used; {_FILE} in the run folder gives the reasons: "
            "are data.image and data.image_shape right?"
        )
    return live


def refuse_more(run: Run, summaries: Mapping[str, Sequence[ShardSummary]]) -> None:
    """Raises RecipeError where a network could not embed a sample that is not in quarantine."""
    tables = [_unusable(name, found) for name, found in summaries.items()]
    new = [table for table in _not_in(_known(run), tables) if table.num_rows]
    if new:
        count, [first] = sum(table.num_rows for table in new), new[0].slice(0, 1).to_pylist()
        raise RecipeError(
            f"{count} sample{'s' * (count != 1)} cannot be used with it, the first: "
            f"{first['file']} (sample_id {first[SAMPLE_ID]}): {first['reason']}"
        )


def _unusable(split: str, summaries: Sequence[ShardSummary]) -> pa.Table:
    table = quarantine_table(list(summaries))
    return table.append_column("split", pa.array([split] * table.num_rows, pa.string()))


def _known(run: Run) -> pa.Table | None:
    path = run.folder.path(_FILE)
    return run.folder.read_table(path) if run.folder.exists(path) else None


def _not_in(known: pa.Table | None, tables: Sequence[pa.Table]) -> list[pa.Table]:
    keys = set() if known is None else set(_keys(known))
    return [table.filter(pa.array([key not in keys for key in _keys(table)], pa.bool_())) for table in tables]


def _add(run: Run, tables: list[pa.Table]) -> None:
    path, known = run.folder.path(_FILE), _known(run)
    if known is not None and not tables:
        return
    new = _not_in(known, tables)
    empty = _unusable("train", [])
    parts = [part for part in (known, *new) if part is not None and part.num_rows]
    run.folder.write_table(path, pa.concat_tables(parts) if parts else empty)
    count = sum(table.num_rows for table in new)
    if count:
        [first] = next(table for table in new if table.num_rows).slice(0, 1).to_pylist()
        run.progress.say(
            f"  unusable, and in {_FILE}: {count} sample{'s' * (count != 1)}, the first: "
            f"{first['file']} (sample_id {first[SAMPLE_ID]}): {first['reason']}"
        )


def _keys(table: pa.Table) -> list[tuple[str, int, int]]:
    return list(zip(*(table[name].to_pylist() for name in ("split", PARTITION, ROW)), strict=True))


def quarantined_before(run: Run) -> Rows:
    """The training samples that earlier starts of the run quarantined."""
    path = run.folder.path(_FILE)
    if not run.folder.exists(path):
        return Rows()
    table = run.folder.read_table(path)
    return Rows.of_table(table.filter(pc.equal(table["split"], "train")))


def readable_validation_samples(run: Run) -> int:
    """How many validation samples can be used."""
    table = run.folder.read_table(run.folder.path(_FILE), ["split"])
    return run.splits["validation"].rows - (pc.sum(pc.equal(table["split"], "validation")).as_py() or 0)
