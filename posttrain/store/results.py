"""The result files of a run, written from its rounds: removed.parquet, issues.csv, the manifest."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv

from posttrain.arrow_compute import pc
from posttrain.live import Live
from posttrain.schema import LABEL, PARTITION, ROW, SAMPLE_ID, SELF_CONFIDENCE, label_quality
from posttrain.store.folder import RunFolder

# columns that are of no use outside a run
_INNER = (PARTITION, ROW)


def live_rows(table: pa.Table, live: Live) -> pa.Table:
    """The rows of a table with (partition, row) that take part."""
    return table.filter(pa.array(live.mask(table[PARTITION].to_numpy(), table[ROW].to_numpy())))


def write_acted_on(folder: RunFolder, name: str, rounds: Sequence[int], classes: Sequence[str]) -> int:
    """`<name>.parquet`: all removed (or relabelled) samples of the run in the order of their rounds; their number.

    Where none was removed, `rounds` names the round that was scored last, for the columns of its file; what it selected
    was not removed, as its `round.json` says, or as there is none.
    """
    names = pa.array(classes)

    def tables() -> Iterator[pa.Table]:
        for number in rounds:
            path = folder.round(number, f"{name}.parquet")
            if not folder.exists(path):
                continue
            table = folder.read_table(path).drop_columns(list(_INNER))
            if not _was_carried_out(folder, name, number):
                table = table.slice(0, 0)
            for column, of in (("label_name", LABEL), ("suggested_name", "suggested_label")):
                table = table.append_column(column, names.take(table[of]))
            yield table

    nothing = pa.table({SAMPLE_ID: pa.array([], pa.int64())})
    return folder.write_row_groups(folder.path(f"{name}.parquet"), tables(), of_none=nothing)


def _was_carried_out(folder: RunFolder, name: str, number: int) -> bool:
    path = folder.round(number, "round.json")
    return folder.exists(path) and folder.read_json(path)[name] > 0


def write_issues(
    folder: RunFolder,
    rounds: Sequence[int],
    last_scores: str | None,
    live: Live,
    classes: Sequence[str],
) -> int:
    """`issues.csv`: every scored sample in the columns of cleanlab; returns the number of rows.

    `label_quality` (cleanlab's `find_label_issues`) and `label_score` (its Datalab) are the same number here: the
    probability that the given label is right. The removed and relabelled come first, in the order of their rounds.
    Text that a spreadsheet would take for a formula has an apostrophe before it.
    """
    count = 0
    with folder.writing(folder.path("issues.csv")) as stream:
        writer = None
        for table, is_issue in _scored(folder, rounds, last_scores, live):
            part = _issues(table, is_issue, classes)
            if writer is None:
                writer = pyarrow.csv.CSVWriter(stream, part.schema)
            writer.write_table(part)
            count += part.num_rows
        if writer is not None:
            writer.close()
    return count


def _scored(
    folder: RunFolder, rounds: Sequence[int], last_scores: str | None, live: Live
) -> Iterator[tuple[pa.Table, bool]]:
    for number in rounds:
        for name in ("removed", "relabelled"):
            if folder.exists(path := folder.round(number, f"{name}.parquet")):
                yield folder.read_table(path), True
    # a relabelled sample is live, and listed above under the label that it was given
    others = live.as_given()
    if last_scores is not None:
        for table in folder.row_groups(last_scores):
            yield live_rows(table, others), False


def _issues(table: pa.Table, is_issue: bool, classes: Sequence[str]) -> pa.Table:
    names = pa.array(classes)
    quality = label_quality(table["mislabel_odds"].to_numpy())
    return pa.table(
        {
            SAMPLE_ID: _for_spreadsheets(table[SAMPLE_ID]),
            "is_label_issue": pa.array(np.full(table.num_rows, is_issue)),
            "label_quality": quality,
            "label_score": quality,
            "given_label": _for_spreadsheets(names.take(table[LABEL])),
            "predicted_label": _for_spreadsheets(names.take(table["predicted_label"])),
            "suggested_label": _for_spreadsheets(names.take(table["suggested_label"])),
            SELF_CONFIDENCE: table[SELF_CONFIDENCE],
        }
    )


def _for_spreadsheets(column: Any) -> Any:
    """Text as no spreadsheet takes it for a formula and no terminal for a command; numbers as they are."""
    if not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
        return column
    column = pc.replace_substring_regex(column, pattern=r"^([=+\-@\t\r])", replacement=r"'\1")
    if not pc.any(pc.match_substring_regex(column, pattern=r"[\x00-\x1f\x7f]")).as_py():
        return column
    written = [re.sub(r"[\x00-\x1f\x7f]", lambda found: ascii(found[0])[1:-1], text) for text in column.to_pylist()]
    return pa.array(written, pa.string())


def write_manifest(folder: RunFolder, last_scores: str | None, live: Live) -> int:
    """`manifest.parquet`: id and present label of every kept sample; returns their number."""

    def tables() -> Iterator[pa.Table]:
        for table in folder.row_groups(last_scores, [SAMPLE_ID, LABEL, PARTITION, ROW]) if last_scores else ():
            kept = live_rows(table, live)
            places = kept[PARTITION].to_numpy(), kept[ROW].to_numpy()
            labels = live.labels(*places, kept[LABEL].to_numpy())
            yield kept.select([SAMPLE_ID]).append_column(LABEL, pa.array(labels, pa.int32()))

    nothing = pa.table({SAMPLE_ID: pa.array([], pa.int64()), LABEL: pa.array([], pa.int32())})
    return folder.write_row_groups(folder.path("manifest.parquet"), tables(), of_none=nothing)


def reason(table: pa.Table, score: str, number: int, classes: Sequence[str]) -> pa.Array:
    """One sentence for each sample: why it was removed or relabelled."""
    if score == "random":
        return pa.array([f"sampled at random in round {number} (control)"] * table.num_rows, pa.string())
    names = pa.array(classes)
    said = label_sentences(
        names.take(table[LABEL]),
        label_quality(table["mislabel_odds"].to_numpy()),
        names.take(table["suggested_label"]),
        table["confidence"],
    )
    return pc.binary_join_element_wise(said, pa.scalar(f"among the highest {score} of round {number}"), "; ")


def label_sentences(given: Any, quality: np.ndarray, suggested: Any, confidence: Any) -> Any:
    """How likely each given label is wrong, and what else the sample likely is; class names are arrow arrays."""

    def percent(share: Any) -> Any:
        # down, and never 100 %: the odds are too sure where they are high
        percents = pc.floor(pc.multiply(pc.cast(share, pa.float64()), 100.0))
        text = pc.cast(pc.cast(pc.min_element_wise(percents, 99.0), pa.int64()), pa.string())
        return pc.binary_join_element_wise(pc.if_else(pc.greater_equal(percents, 99.0), "over ", ""), text, "")

    return pc.binary_join_element_wise(
        "label ",
        given,
        " is wrong with a probability of ",
        percent(pa.array(1 - quality)),
        " %; most likely class instead: ",
        suggested,
        " (",
        percent(confidence),
        " %)",
        "",
    )
