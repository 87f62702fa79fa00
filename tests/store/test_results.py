"""What a run leaves behind, against plain pandas on the same rounds."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from posttrain.live import Live, NewLabels, Removal, Rows
from posttrain.schema import Round
from posttrain.store import results
from posttrain.store.folder import RunFolder
from posttrain.store.ledger import Ledger

CLASSES = ("cat", "dog", "hen")
REMOVED_IN = {1: [3, 40, 41], 2: [7, 99]}  # round -> positions among the 120 samples
RELABELLED_IN = {1: [90, 5], 2: [42]}


Positions = dict[int, list[int]]


@dataclass(frozen=True)
class Finished:
    """A run of two rounds that took out samples, of 120; round 3 scored the rest and found nothing."""

    folder: RunFolder
    text: bool
    """Whether the ids are strings."""
    scored: dict[int, pd.DataFrame]
    """Round -> all samples that it scored."""
    taken: dict[str, pd.DataFrame]
    """`removed` and `relabelled`."""
    live: Live

    @property
    def removed(self) -> pd.DataFrame:
        return self.taken["removed"]

    @property
    def last_scores(self) -> str:
        return self.folder.round(3, "scores.parquet")


def scored_samples(number: int, text: bool) -> pd.DataFrame:
    """120 samples in three partitions, in the columns of scores.parquet."""
    draw = np.random.default_rng(number)
    at = np.arange(120)
    return pd.DataFrame(
        {
            "sample_id": [f'x/{i}, "{i}".png' for i in at] if text else at * 11 - 5,
            "partition": (at // 40).astype(np.int32),
            "row": (at % 40).astype(np.int32),
            "label": (at % 3).astype(np.int32),
            "loo_margin": draw.normal(size=120).astype(np.float32),
            "predicted_label": draw.integers(0, 3, 120).astype(np.int32),
            "self_confidence": draw.random(120).astype(np.float32),
            "suggested_label": ((at + 1) % 3).astype(np.int32),
            "confidence": draw.random(120).astype(np.float32),
            "mislabel_odds": draw.normal(0, 3, 120).astype(np.float32),
        }
    )


def write(folder: RunFolder, path: str, table: pd.DataFrame) -> None:
    folder.write_table(path, pa.Table.from_pandas(table, preserve_index=False))


def finished(folder: RunFolder, text: bool, removed_in: Positions, relabelled_in: Positions) -> Finished:
    """The run with what a driver and its workers write in each round."""
    gone: list[int] = []
    new_labels: dict[int, int] = {}
    left = Live(120)
    scored: dict[int, pd.DataFrame] = {}
    parts: dict[str, list[pd.DataFrame]] = {"removed": [], "relabelled": []}
    for number in (1, 2, 3):
        live = scored_samples(number, text)
        live["label"] = [new_labels.get(at, label) for at, label in enumerate(live["label"])]
        live["label"] = live["label"].astype(np.int32)
        live = live.drop(index=gone)
        scored[number] = live
        with folder.writing(folder.round(number, "scores.parquet")) as stream:
            pq.write_table(pa.Table.from_pandas(live, preserve_index=False), stream, row_group_size=50)
        if number not in removed_in and number not in relabelled_in:
            continue
        for name, what in (("removed", removed_in), ("relabelled", relabelled_in)):
            part = live.loc[what.get(number, [])].assign(round=np.int32(number), reason="because")
            if name == "removed" or len(part):
                write(folder, folder.round(number, f"{name}.parquet"), part)
            parts[name].append(part)
        removed, changed = parts["removed"][-1], parts["relabelled"][-1]
        new = NewLabels.of(*(changed[name].to_numpy() for name in ("partition", "row", "suggested_label")))
        left = left.without(Removal(Rows.of(removed["partition"].to_numpy(), removed["row"].to_numpy()), new))
        gone += removed_in.get(number, [])
        new_labels |= changed["suggested_label"].to_dict()
        Ledger(folder).commit(Round(number, left.count, len(removed) + len(changed), len(removed), len(changed), {}))
    taken = {name: pd.concat(tables, ignore_index=True) for name, tables in parts.items()}
    return Finished(folder, text, scored, taken, left)


@pytest.fixture(params=[False, True], ids=["int ids", "string ids"])
def run(tmp_path: Path, request: pytest.FixtureRequest) -> Finished:
    return finished(RunFolder(str(tmp_path)), request.param, REMOVED_IN, {})


@pytest.fixture(params=[False, True], ids=["int ids", "string ids"])
def relabelling(tmp_path: Path, request: pytest.FixtureRequest) -> Finished:
    """The run with three samples relabelled beside those removed."""
    return finished(RunFolder(str(tmp_path)), request.param, REMOVED_IN, RELABELLED_IN)


def named(labels: Any) -> list[str]:
    return [CLASSES[label] for label in labels]


def test_removed_parquet_holds_every_removed_sample_in_the_order_of_the_rounds(run: Finished):
    assert results.write_acted_on(run.folder, "removed", [1, 2], CLASSES) == 5
    found = pq.read_table(run.folder.path("removed.parquet")).to_pandas()
    expected = run.removed.drop(columns=["partition", "row"])
    expected["label_name"] = named(expected["label"])
    expected["suggested_name"] = named(expected["suggested_label"])
    pd.testing.assert_frame_equal(found, expected, check_dtype=False)


def test_relabelled_parquet_holds_every_relabelled_sample_in_the_order_of_the_rounds(relabelling: Finished):
    folder = relabelling.folder
    assert results.write_acted_on(folder, "relabelled", [1, 2], CLASSES) == 3
    assert results.write_acted_on(folder, "removed", [1, 2], CLASSES) == 5
    found = pq.read_table(folder.path("relabelled.parquet")).to_pandas()
    expected = relabelling.taken["relabelled"].drop(columns=["partition", "row"])
    expected["label_name"] = named(expected["label"])
    expected["suggested_name"] = named(expected["suggested_label"])
    pd.testing.assert_frame_equal(found, expected, check_dtype=False)


def test_a_round_that_only_relabelled_adds_nothing_to_the_removed(tmp_path: Path):
    run = finished(RunFolder(str(tmp_path)), False, {2: [7]}, {1: [90], 2: [42]})
    assert run.folder.read_table(run.folder.round(1, "removed.parquet")).num_rows == 0
    assert results.write_acted_on(run.folder, "removed", [1, 2], CLASSES) == 1
    assert results.write_acted_on(run.folder, "relabelled", [1, 2], CLASSES) == 2
    assert pq.read_table(run.folder.path("removed.parquet"))["sample_id"].to_pylist() == [7 * 11 - 5]
    assert results.write_issues(run.folder, [1, 2], run.last_scores, run.live, CLASSES) == 120
    found = pd.read_csv(run.folder.path("issues.csv"))
    assert found["sample_id"][found["is_label_issue"]].tolist() == [at * 11 - 5 for at in (90, 7, 42)]


def test_a_round_without_relabelled_samples_needs_no_file_of_them(tmp_path: Path):
    run = finished(RunFolder(str(tmp_path)), False, REMOVED_IN, {2: [42]})
    assert not run.folder.exists(run.folder.round(1, "relabelled.parquet"))
    assert results.write_acted_on(run.folder, "relabelled", [1, 2], CLASSES) == 1
    assert pq.read_table(run.folder.path("relabelled.parquet"))["sample_id"].to_pylist() == [42 * 11 - 5]


def test_a_run_that_removed_nothing_leaves_a_removed_parquet_without_rows(run: Finished):
    assert results.write_acted_on(run.folder, "removed", [], CLASSES) == 0
    assert pq.read_table(run.folder.path("removed.parquet")).num_rows == 0


@pytest.mark.parametrize("committed", [False, True])
def test_what_the_round_selected_that_ended_the_run_is_not_removed(run: Finished, committed: bool):
    # fewer candidates than removal.min_share: the selection comes to nothing
    path = run.folder.round(3, "removed.parquet")
    write(run.folder, path, run.scored[3].head(2))
    if committed:
        # the number of a round that only put a new head on
        Ledger(run.folder).commit(Round(3, 115, 0, 0, 0, {}, ended="what is left no longer looks wrong"))
    assert results.write_acted_on(run.folder, "removed", [3], CLASSES) == 0
    found = pq.read_table(run.folder.path("removed.parquet"))
    assert found.num_rows == 0
    # its columns are there for whoever reads the file
    assert found["sample_id"].type == pq.read_schema(path).field("sample_id").type
    assert {"label", "loo_margin", "suggested_name"} <= set(found.column_names)


def test_issues_csv_has_every_sample_once_in_the_columns_of_cleanlab(run: Finished):
    count = results.write_issues(run.folder, [1, 2], run.last_scores, run.live, CLASSES)
    found = pd.read_csv(run.folder.path("issues.csv"))
    live = run.scored[3]
    right = 1 / (1 + np.exp(np.array([*run.removed["mislabel_odds"], *live["mislabel_odds"]])))
    expected = pd.DataFrame(
        {
            "sample_id": [*run.removed["sample_id"], *live["sample_id"]],
            "is_label_issue": [True] * 5 + [False] * 115,
            "label_quality": right,
            "label_score": right,
            "given_label": named(run.removed["label"]) + named(live["label"]),
            "predicted_label": named(run.removed["predicted_label"]) + named(live["predicted_label"]),
            "suggested_label": named(run.removed["suggested_label"]) + named(live["suggested_label"]),
            "self_confidence": [*run.removed["self_confidence"], *live["self_confidence"]],
        }
    )
    assert count == 120
    assert sorted(found["sample_id"]) == sorted(run.scored[1]["sample_id"])
    pd.testing.assert_frame_equal(found, expected, check_dtype=False, rtol=1e-6)


@pytest.mark.parametrize("last", [2, 3])
def test_issues_csv_lists_relabelled_samples_once_under_the_label_that_was_given(relabelling: Finished, last: int):
    # the scores of round 3 know the new labels, those of round 2 do not
    run, scores = relabelling, relabelling.folder.round(last, "scores.parquet")
    count = results.write_issues(run.folder, [1, 2], scores, run.live, CLASSES)
    found = pd.read_csv(run.folder.path("issues.csv"))
    taken = [at for number in (1, 2) for at in (*REMOVED_IN[number], *RELABELLED_IN[number])]
    first = scored_samples(1, run.text)
    assert count == len(found) == 120
    assert sorted(found["sample_id"]) == sorted(first["sample_id"])
    assert found["sample_id"][:8].tolist() == first["sample_id"][taken].tolist()
    assert found["is_label_issue"].tolist() == [True] * 8 + [False] * 112
    assert found["given_label"][:8].tolist() == named(first["label"][taken])
    assert found["suggested_label"][:8].tolist() == named(first["suggested_label"][taken])
    live = run.scored[last].drop(index=taken, errors="ignore")
    assert found["given_label"][8:].tolist() == named(live["label"])
    assert found["self_confidence"][8:].tolist() == pytest.approx(live["self_confidence"].tolist(), rel=1e-6)


def test_scores_of_the_last_committed_round_do_not_bring_its_removals_back(run: Finished):
    # max_rounds reached: no later round has scored what is left
    scores_of_2 = run.folder.round(2, "scores.parquet")
    assert results.write_issues(run.folder, [1, 2], scores_of_2, run.live, CLASSES) == 120
    found = pd.read_csv(run.folder.path("issues.csv"))
    assert found["sample_id"].is_unique
    assert set(found["sample_id"][found["is_label_issue"]]) == set(run.removed["sample_id"])


def test_the_manifest_lists_what_is_kept_with_its_given_label(run: Finished):
    assert results.write_manifest(run.folder, run.folder.round(2, "scores.parquet"), run.live) == 115
    found = pq.read_table(run.folder.path("manifest.parquet")).to_pandas()
    gone = [i for positions in REMOVED_IN.values() for i in positions]
    expected = run.scored[1].drop(index=gone).reset_index(drop=True)
    assert found.columns.tolist() == ["sample_id", "label"]
    for column in found:
        assert found[column].tolist() == expected[column].tolist()


@pytest.mark.parametrize("last", [2, 3])
def test_the_manifest_lists_relabelled_samples_with_their_new_label(relabelling: Finished, last: int):
    # the scores of round 3 know the new labels, those of round 2 do not
    run, scores = relabelling, relabelling.folder.round(last, "scores.parquet")
    assert results.write_manifest(run.folder, scores, run.live) == 115
    found = pq.read_table(run.folder.path("manifest.parquet")).to_pandas()
    gone = [at for positions in REMOVED_IN.values() for at in positions]
    changed = [at for positions in RELABELLED_IN.values() for at in positions]
    expected = scored_samples(1, run.text).drop(index=gone)
    expected.loc[changed, "label"] = expected["suggested_label"]
    assert found.columns.tolist() == ["sample_id", "label"]
    for column in found:
        assert found[column].tolist() == expected[column].tolist()


def test_a_manifest_without_scores_is_empty(run: Finished):
    assert results.write_manifest(run.folder, None, run.live) == 0
    assert pq.read_table(run.folder.path("manifest.parquet")).column_names == ["sample_id", "label"]


def test_live_rows_are_those_whose_partition_and_row_are_not_excluded(run: Finished):
    table = pa.Table.from_pandas(run.scored[1], preserve_index=False)
    assert results.live_rows(table, Live(120)).equals(table)
    left = results.live_rows(table, run.live).to_pandas()
    gone = sorted(i for positions in REMOVED_IN.values() for i in positions)
    pd.testing.assert_frame_equal(left, run.scored[1].drop(index=gone).reset_index(drop=True))
    assert results.live_rows(table.slice(0, 0), run.live).num_rows == 0


def test_every_removal_has_a_reason_in_words(run: Finished):
    table = run.folder.read_table(run.folder.round(1, "removed.parquet"))
    of = {"confidence": [0.974, 0.5, 1.0], "mislabel_odds": [math.log(0.996 / 0.004), 0.0, math.inf]}
    for name, values in of.items():
        table = table.set_column(table.column_names.index(name), name, [values])
    assert results.reason(table, "loo_margin", 1, CLASSES).to_pylist() == [
        f"label {said}; among the highest loo_margin of round 1"
        for said in (
            "cat is wrong with a probability of over 99 %; most likely class instead: dog (97 %)",
            "dog is wrong with a probability of 50 %; most likely class instead: hen (50 %)",
            "hen is wrong with a probability of over 99 %; most likely class instead: cat (over 99 %)",
        )
    ]


def test_a_removal_of_the_control_says_that_it_was_drawn(run: Finished):
    table = run.folder.read_table(run.folder.round(2, "removed.parquet"))
    assert set(results.reason(table, "random", 2, CLASSES).to_pylist()) == {"sampled at random in round 2 (control)"}


def test_neither_a_spreadsheet_nor_a_terminal_takes_a_cell_of_issues_csv_for_a_command(tmp_path: Path) -> None:
    folder = RunFolder(str(tmp_path))
    names = ["=cmd|' /C calc'!A0", "+1", "-1", "@SUM(A1)", "\t=1", "cat/\x1b[2J.png", "a=b-c", "plain"]
    samples = scored_samples(1, text=True).iloc[: len(names)].assign(sample_id=names)
    path = folder.round(1, "scores.parquet")
    folder.write_table(path, pa.Table.from_pandas(samples, preserve_index=False))
    results.write_issues(folder, [], path, Live(120), ("=1+1", "dog", "\x1bhen"))
    found = pd.read_csv(tmp_path / "issues.csv")
    safe = ["'=cmd|' /C calc'!A0", "'+1", "'-1", "'@SUM(A1)", "'\\t=1", "cat/\\x1b[2J.png", "a=b-c", "plain"]
    assert list(found["sample_id"]) == safe
    assert set(found["given_label"]) == {"'=1+1", "dog", "\\x1bhen"}
    numbers = scored_samples(1, text=False)
    folder.write_table(path, pa.Table.from_pandas(numbers, preserve_index=False))
    results.write_issues(folder, [], path, Live(120), CLASSES)
    assert list(pd.read_csv(tmp_path / "issues.csv")["sample_id"]) == list(numbers["sample_id"])  # -5 is a number
