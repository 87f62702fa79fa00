"""What a run leaves behind, against plain pandas on the same rounds."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from posttrain.schema import Excluded, excluded_rows
from posttrain.store import results
from posttrain.store.folder import RunFolder

CLASSES = ("cat", "dog", "hen")
REMOVED_IN = {1: [3, 40, 41], 2: [7, 99]}  # round -> positions among the 120 samples


@dataclass(frozen=True)
class Finished:
    """A run of two rounds that removed five of 120 samples; round 3 scored the rest and removed nothing."""

    folder: RunFolder
    scored: dict[int, pd.DataFrame]
    """Round -> all samples that it scored."""
    removed: pd.DataFrame
    excluded: Excluded

    @property
    def last_scores(self) -> str:
        return self.folder.round(3, "scores.parquet")


def scored_samples(number: int, text: bool) -> pd.DataFrame:
    """120 samples in three buckets, in the columns of scores.parquet."""
    draw = np.random.default_rng(number)
    at = np.arange(120)
    return pd.DataFrame(
        {
            "sample_id": [f'x/{i}, "{i}".png' for i in at] if text else at * 11 - 5,
            "bucket": (at // 40).astype(np.int32),
            "row": (at % 40).astype(np.int32),
            "label": (at % 3).astype(np.int32),
            "loo_margin": draw.normal(size=120).astype(np.float32),
            "predicted_label": draw.integers(0, 3, 120).astype(np.int32),
            "self_confidence": draw.random(120).astype(np.float32),
            "suggested_label": ((at + 1) % 3).astype(np.int32),
            "confidence": draw.random(120).astype(np.float32),
        }
    )


@pytest.fixture(params=[False, True], ids=["int ids", "string ids"])
def run(tmp_path: Path, request: pytest.FixtureRequest) -> Finished:
    folder = RunFolder(str(tmp_path))
    gone: list[int] = []
    excluded: Excluded = {}
    scored, parts = {}, []
    for number in (1, 2, 3):
        live = scored_samples(number, request.param).drop(index=gone)
        scored[number] = live
        with folder.writing(folder.round(number, "scores.parquet")) as stream:
            pq.write_table(pa.Table.from_pandas(live, preserve_index=False), stream, row_group_size=50)
        if number in REMOVED_IN:
            part = live.loc[REMOVED_IN[number]].assign(round=np.int32(number), reason="because")
            folder.write_table(
                folder.round(number, "removed.parquet"), pa.Table.from_pandas(part, preserve_index=False)
            )
            excluded = excluded_rows(part["bucket"].to_numpy(), part["row"].to_numpy(), excluded)
            gone += REMOVED_IN[number]
            parts.append(part)
    return Finished(folder, scored, pd.concat(parts, ignore_index=True), excluded)


def named(labels: Any) -> list[str]:
    return [CLASSES[label] for label in labels]


def test_removed_parquet_holds_every_removed_sample_in_the_order_of_the_rounds(run: Finished):
    assert results.write_removed(run.folder, [1, 2], CLASSES) == 5
    found = pq.read_table(run.folder.path("removed.parquet")).to_pandas()
    expected = run.removed.drop(columns=["bucket", "row"])
    expected["label_name"] = named(expected["label"])
    expected["suggested_name"] = named(expected["suggested_label"])
    pd.testing.assert_frame_equal(found, expected, check_dtype=False)


def test_a_run_that_removed_nothing_leaves_a_removed_parquet_without_rows(run: Finished):
    assert results.write_removed(run.folder, [], CLASSES) == 0
    assert pq.read_table(run.folder.path("removed.parquet")).num_rows == 0


def test_issues_csv_has_every_sample_once_in_the_columns_of_cleanlab(run: Finished):
    count = results.write_issues(run.folder, [1, 2], run.last_scores, run.excluded, CLASSES)
    found = pd.read_csv(run.folder.path("issues.csv"))
    live = run.scored[3]
    expected = pd.DataFrame(
        {
            "sample_id": [*run.removed["sample_id"], *live["sample_id"]],
            "is_label_issue": [True] * 5 + [False] * 115,
            "label_quality": [*run.removed["self_confidence"], *live["self_confidence"]],
            "label_score": [*run.removed["self_confidence"], *live["self_confidence"]],
            "given_label": named(run.removed["label"]) + named(live["label"]),
            # a removed sample is labelled what the others say, never what it was given
            "predicted_label": named(run.removed["suggested_label"]) + named(live["predicted_label"]),
        }
    )
    assert count == 120
    assert sorted(found["sample_id"]) == sorted(run.scored[1]["sample_id"])
    pd.testing.assert_frame_equal(found, expected, check_dtype=False, rtol=1e-6)


def test_scores_of_the_last_committed_round_do_not_bring_its_removals_back(run: Finished):
    # max_rounds reached: no later round has scored what is left
    scores_of_2 = run.folder.round(2, "scores.parquet")
    assert results.write_issues(run.folder, [1, 2], scores_of_2, run.excluded, CLASSES) == 120
    found = pd.read_csv(run.folder.path("issues.csv"))
    assert found["sample_id"].is_unique
    assert set(found["sample_id"][found["is_label_issue"]]) == set(run.removed["sample_id"])


def test_the_manifest_lists_what_is_kept_with_its_given_label(run: Finished):
    assert results.write_manifest(run.folder, run.folder.round(2, "scores.parquet"), run.excluded) == 115
    found = pq.read_table(run.folder.path("cleaned", "manifest.parquet")).to_pandas()
    gone = [i for positions in REMOVED_IN.values() for i in positions]
    expected = run.scored[1].drop(index=gone).reset_index(drop=True)
    assert found.columns.tolist() == ["sample_id", "label"]
    for column in found:
        assert found[column].tolist() == expected[column].tolist()


def test_live_rows_are_those_whose_bucket_and_row_are_not_excluded(run: Finished):
    table = pa.Table.from_pandas(run.scored[1], preserve_index=False)
    assert results.live_rows(table, {}).equals(table)
    left = results.live_rows(table, run.excluded).to_pandas()
    gone = sorted(i for positions in REMOVED_IN.values() for i in positions)
    pd.testing.assert_frame_equal(left, run.scored[1].drop(index=gone).reset_index(drop=True))
    assert results.live_rows(table.slice(0, 0), run.excluded).num_rows == 0


def test_every_removal_has_a_reason_in_words(run: Finished):
    table = run.folder.read_table(run.folder.round(1, "removed.parquet"))
    table = table.set_column(table.column_names.index("confidence"), "confidence", [[0.974, 0.5, 1.0]])
    assert results.reason(table, "loo_margin", 1, CLASSES).to_pylist() == [
        "the others label it dog (97 %) not cat (among the highest loo_margin of round 1)",
        "the others label it hen (50 %) not dog (among the highest loo_margin of round 1)",
        "the others label it cat (100 %) not hen (among the highest loo_margin of round 1)",
    ]


def test_a_removal_of_the_control_says_that_it_was_drawn(run: Finished):
    table = run.folder.read_table(run.folder.round(2, "removed.parquet"))
    assert set(results.reason(table, "random", 2, CLASSES).to_pylist()) == {"drawn at random in round 2 (control)"}
