"""`removal.action: relabel`: what is certain enough stays, under another label, everywhere."""

from __future__ import annotations

import csv
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from small_data import NETWORK, Digits, assert_same_result, interrupted_after, relabelled, removed_ids, rounds

from posttrain.cluster import training

pytestmark = pytest.mark.ray

Run = Callable[..., dict[str, Any]]

# a share of one's own: three rounds, whatever is estimated
RELABEL = {"action": "relabel", "relabel_above": 0.8, "max_share": 0.2, "max_rounds": 3}


@pytest.fixture(scope="session")
def relabelling(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, Any]]:
    """The summary of a run that relabels, by its `refine.scope`."""
    summaries: dict[str, dict[str, Any]] = {}

    def get(scope: str = "head") -> dict[str, Any]:
        if scope not in summaries:
            path = tmp_path_factory.mktemp("relabelling") / scope
            summaries[scope] = run(path, removal=RELABEL, refine=NETWORK if scope == "network" else {})
        return summaries[scope]

    return get


def test_the_certain_stay_under_another_label_and_the_others_go(
    relabelling: Callable[..., dict[str, Any]], digits: Digits
) -> None:
    summary = relabelling()
    folder = Path(summary["run"])
    changed, removed = pq.read_table(folder / "relabelled.parquet"), pq.read_table(folder / "removed.parquet")
    assert changed.num_rows > 0 and removed.num_rows > 0
    assert changed.column_names == removed.column_names
    assert min(changed["confidence"].to_pylist()) >= 0.8 > max(removed["confidence"].to_pylist())
    ids = changed["sample_id"].to_numpy()
    assert (changed["label"].to_numpy() == digits.given[ids]).all()
    assert (changed["suggested_label"].to_numpy() != digits.given[ids]).all()
    right = float((changed["suggested_label"].to_numpy() == digits.true[ids]).mean())
    assert right >= 0.9
    assert summary["relabel_accuracy"] == pytest.approx(right)


def test_a_relabelled_sample_is_kept_once_and_the_counts_add_up(
    relabelling: Callable[..., dict[str, Any]], digits: Digits
) -> None:
    summary = relabelling()
    new, removed = relabelled(summary["run"]), removed_ids(summary["run"])
    assert (summary["relabelled"], summary["removed"]) == (len(new), len(removed))
    assert summary["live"] + summary["removed"] == 900
    assert not set(new) & set(removed)
    history = rounds(summary["run"])
    assert sum(done["relabelled"] for done in history) == len(new)
    assert [done["live"] for done in history] == [900 - sum(d["removed"] for d in history[: n + 1]) for n in range(4)]
    # what a round takes in all is what the budget of 5 % of its live samples allows
    assert all(
        done["removed"] + done["relabelled"] <= int(0.05 * before["live"])
        for before, done in itertools.pairwise(history)
    )


def test_the_clean_data_set_and_its_manifest_carry_the_new_labels(
    relabelling: Callable[..., dict[str, Any]], digits: Digits
) -> None:
    folder = Path(relabelling()["run"])
    new, removed = relabelled(folder), set(removed_ids(folder))
    expected = {i: new.get(i, int(digits.given[i])) for i in digits.splits["train"] if i not in removed}
    manifest = pq.read_table(folder / "manifest.parquet")
    assert dict(zip(manifest["sample_id"].to_pylist(), manifest["label"].to_pylist(), strict=True)) == expected
    parts = pa.concat_tables([pq.read_table(path) for path in sorted((folder / "cleaned").glob("part-*.parquet"))])
    assert dict(zip(parts["id"].to_pylist(), parts["label"].to_pylist(), strict=True)) == expected
    assert parts["class_name"].to_pylist() == [str(label) for label in parts["label"].to_pylist()]


def test_issues_list_every_sample_once_the_relabelled_under_the_label_they_came_with(
    relabelling: Callable[..., dict[str, Any]], digits: Digits
) -> None:
    folder = Path(relabelling()["run"])
    with (folder / "issues.csv").open() as stream:
        issues = {int(row["sample_id"]): row for row in csv.DictReader(stream)}
    assert sorted(issues) == list(digits.splits["train"])
    taken = {*relabelled(folder), *removed_ids(folder)}
    assert {i for i, row in issues.items() if row["is_label_issue"] == "true"} == taken
    assert all(int(row["given_label"]) == digits.given[i] for i, row in issues.items())


def test_what_was_relabelled_is_scored_under_its_new_label_and_not_touched_again(
    relabelling: Callable[..., dict[str, Any]], digits: Digits
) -> None:
    folder = Path(relabelling()["run"])
    earlier: dict[int, int] = {}
    for number in (1, 2, 3):
        scores = pq.read_table(folder / "rounds" / f"{number:04d}" / "scores.parquet")
        labels = dict(zip(scores["sample_id"].to_pylist(), scores["label"].to_pylist(), strict=True))
        assert earlier.items() <= labels.items()
        assert all(labels[i] == digits.given[i] for i in labels.keys() - earlier.keys())
        changed, removed = (
            pq.read_table(folder / "rounds" / f"{number:04d}" / f"{name}.parquet") for name in ("relabelled", "removed")
        )
        assert not earlier.keys() & {*changed["sample_id"].to_pylist(), *removed["sample_id"].to_pylist()}
        earlier |= dict(zip(changed["sample_id"].to_pylist(), changed["suggested_label"].to_pylist(), strict=True))
    assert earlier == relabelled(folder)


@pytest.mark.long
def test_the_network_is_trained_on_the_new_labels(
    run: Run, digits: Digits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[dict[int, int]] = []
    fit = training.fit_network

    def noting(model: Any, images: Any, *arguments: Any, **options: Any) -> Any:
        # one epoch without augmentation holds every live image once
        step, pixels, labels = options["live"] // 8, [], []
        for batch in images.batches(8, step + 1, 0):
            pixels += [image.numpy().tobytes() for image in batch.pixels]
            labels += batch.labels.tolist()
        ids = {digits.images[i].tobytes(): i for i in digits.splits["train"]}
        seen.append({ids[image]: label for image, label in zip(pixels, labels, strict=True) if image in ids})
        return fit(model, images, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(training, "fit_network", noting)
        summary = run(tmp_path / "run", removal=RELABEL, refine=NETWORK)
    assert len(seen) == summary["rounds"] >= 2
    new: dict[int, int] = {}
    gone: set[int] = set()
    for number, trained_on in enumerate(seen, start=1):
        folder = tmp_path / "run" / "rounds" / f"{number:04d}"
        changed = pq.read_table(folder / "relabelled.parquet")
        new |= dict(zip(changed["sample_id"].to_pylist(), changed["suggested_label"].to_pylist(), strict=True))
        gone |= set(pq.read_table(folder / "removed.parquet")["sample_id"].to_pylist())
        expected = {i: new.get(i, int(digits.given[i])) for i in digits.splits["train"] if i not in gone}
        assert trained_on == expected


@pytest.mark.parametrize(
    ("scope", "step"),
    [
        *[("head", step) for step in ("fit", "select", "refine", "commit")],
        ("network", "refine"),
    ],
)
@pytest.mark.long
def test_a_run_that_relabels_keeps_the_new_labels_over_an_interruption(
    run: Run,
    relabelling: Callable[[str], dict[str, Any]],
    tmp_path: Path,
    scope: str,
    step: str,
) -> None:
    refine = NETWORK if scope == "network" else {}
    with interrupted_after(step, call=2):
        run(tmp_path / "run", removal=RELABEL, refine=refine)
    assert len(rounds(tmp_path / "run")) == (3 if step == "commit" else 2)
    again, whole = run(tmp_path / "run", removal=RELABEL, refine=refine), relabelling(scope)
    assert_same_result(tmp_path / "run", whole["run"])
    for key in ("relabelled", "removed", "live", "relabel_accuracy", "ended", "noise"):
        assert again[key] == whole[key]
    manifests = [pq.read_table(Path(r) / "manifest.parquet") for r in (tmp_path / "run", whole["run"])]
    assert manifests[0].equals(manifests[1])


@pytest.mark.long
def test_where_all_selected_are_certain_none_goes(run: Run, digits: Digits, tmp_path: Path) -> None:
    summary = run(tmp_path / "run", removal={**RELABEL, "relabel_above": 1e-6, "max_rounds": 2})
    assert summary["removed"] == 0 and summary["live"] == 900
    assert summary["relabelled"] == len(relabelled(tmp_path / "run")) == 45 + 45
    assert pq.read_table(tmp_path / "run" / "removed.parquet").num_rows == 0
    assert np.isfinite(summary["relabel_accuracy"])
    # what is relabelled counts as found
    changed, train = list(relabelled(tmp_path / "run")), list(digits.splits["train"])
    found, wrong = (int((digits.given[ids] != digits.true[ids]).sum()) for ids in (changed, train))
    assert summary["removal_precision"] == pytest.approx(found / 90)
    assert summary["removal_recall"] == pytest.approx(found / wrong)
