from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import yaml

from posttrain.config import RunFile, load
from posttrain.errors import RunFolderError
from posttrain.schema import Round
from posttrain.store.folder import RunFolder
from posttrain.store.ledger import Ledger

DATA = {"train": "0011223344556677", "validation": "8899aabbccddeeff"}


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(RunFolder(str(tmp_path / "run")))


def a_round(number: int, removed: int = 0, relabelled: int = 0) -> Round:
    metrics = {"validation_accuracy": 0.8 + number / 100, "test_loss": 1 / 3}
    return Round(number, 100 - number, removed + 1, removed, relabelled, metrics, {"embed": 0.25})


def started(ledger: Ledger, **sections: Any) -> dict[str, Any]:
    """The record of a run that was begun with these settings, as it is read back."""
    ledger.start(RunFile.model_validate(sections), DATA)
    record = ledger.started()
    assert record is not None
    return record


def test_a_new_folder_holds_no_run(ledger: Ledger):
    assert ledger.started() is None
    ledger.folder.local.mkdir()
    assert ledger.started() is None
    assert ledger.rounds() == () and ledger.finished() is None


def test_a_folder_with_something_else_in_it_is_refused(ledger: Ledger):
    ledger.folder.local.mkdir()
    (ledger.folder.local / "thesis.tex").write_text("")
    with pytest.raises(RunFolderError, match=r"run\.path = .*not empty and holds no run.*name a new folder"):
        ledger.started()
    assert [p.name for p in ledger.folder.local.iterdir()] == ["thesis.tex"]


def test_run_yaml_holds_settings_seeds_versions_and_the_datas_fingerprint(ledger: Ledger):
    record = started(ledger, run={"seed": 17})
    assert record == yaml.safe_load((ledger.folder.local / "run.yaml").read_text())
    assert record["config"]["run"]["seed"] == 17
    assert record["data"] == DATA
    assert {"python", "posttrain", "torch", "ray", "mlflow", "pyarrow"} <= set(record["versions"])
    assert RunFile.model_validate(record["config"]) == RunFile.model_validate({"run": {"seed": 17}})


def test_a_run_goes_on_with_the_same_settings_and_data(ledger: Ledger):
    record = started(ledger, probe={"l2": [0.1, 1.0]}, data={"noise": {"rate": 0.3}})
    same = RunFile.model_validate({"probe": {"l2": [0.1, 1.0]}, "data": {"noise": {"rate": 0.3}}})
    ledger.refuse_other_settings(record, same)
    ledger.refuse_other_data(record, dict(DATA))


def test_a_run_with_other_settings_is_refused_and_told_what_differs(ledger: Ledger):
    record = started(ledger)
    other = RunFile.model_validate({"removal": {"budget": 0.2}, "run": {"seed": 3}, "ray": {"workers": 2}})
    with pytest.raises(RunFolderError) as caught:
        ledger.refuse_other_settings(record, other)
    message = str(caught.value)
    assert "removal.budget: 0.05 -> 0.2" in message and "run.seed: 0 -> 3" in message
    assert "ray" not in message.split("(", 1)[1]
    assert "name another run.path" in message


@pytest.mark.parametrize(
    "sections",
    [
        {"ray": {"workers": 7}},
        {"ray": {"address": "auto", "train_workers": 2, "cpus_per_worker": 4}},
        {"tracking": {"uri": "http://tracking:5000", "experiment": "other", "log_model": False}},
        {"run": {"path": "moved/elsewhere"}},
    ],
)
def test_where_a_run_computes_and_whom_it_tells_may_differ(ledger: Ledger, sections: dict[str, Any]):
    ledger.refuse_other_settings(started(ledger), RunFile.model_validate(sections))


def test_a_run_on_other_data_is_refused_and_told_which(ledger: Ledger):
    record = started(ledger)
    with pytest.raises(RunFolderError, match=r"train: 0011223344556677 -> ffff\); name another") as caught:
        ledger.refuse_other_data(record, {**DATA, "train": "ffff"})
    assert "validation" not in str(caught.value)


def test_rounds_come_back_as_they_were_committed(ledger: Ledger):
    rounds = tuple(a_round(number, removed=2 * number, relabelled=number) for number in range(3))
    rounds = (*rounds, replace(a_round(3), ended="nothing looks wrong"))
    for done in rounds:
        ledger.commit(done)
    assert ledger.rounds() == rounds


def test_half_done_work_is_no_round(ledger: Ledger):
    ledger.commit(a_round(0))
    ledger.folder.write_table(ledger.folder.round(1, "removed.parquet"), pa.table({"partition": [0], "row": [1]}))
    ledger.folder.write_bytes(ledger.folder.checkpoint(1), b"weights")
    ledger.folder.write_bytes(ledger.folder.round(1, "round.json.0a1b2c3d.tmp"), b"{")
    assert ledger.rounds() == (a_round(0),)
    assert ledger.excluded(ledger.rounds()) == {}


def test_rounds_end_at_the_first_gap(ledger: Ledger):
    for number in (0, 1, 3):
        ledger.commit(a_round(number))
    assert [r.number for r in ledger.rounds()] == [0, 1]
    ledger.commit(a_round(2))
    assert [r.number for r in ledger.rounds()] == [0, 1, 2, 3]


def test_a_round_that_is_committed_again_is_one_round(ledger: Ledger):
    for _ in range(2):
        ledger.commit(a_round(0))
    assert ledger.rounds() == (a_round(0),)


def test_what_committed_rounds_removed_is_excluded(ledger: Ledger):
    removed = {1: ([0, 2, 0], [7, 1, 3]), 2: ([2, 5], [0, 4]), 3: ([9], [9])}
    for number, (partitions, rows) in removed.items():
        table = pa.table({"partition": pa.array(partitions, pa.int32()), "row": pa.array(rows, pa.int32())})
        ledger.folder.write_table(ledger.folder.round(number, "removed.parquet"), table)
    for done in (a_round(0), a_round(1, removed=3), a_round(2, removed=2)):
        ledger.commit(done)
    excluded = ledger.excluded(ledger.rounds())
    assert {b: rows.tolist() for b, rows in excluded.items()} == {0: [3, 7], 2: [0, 1], 5: [4]}
    assert all(rows.dtype == np.int32 for rows in excluded.values())


def relabel(ledger: Ledger, number: int, partitions: list[int], rows: list[int], labels: list[int]) -> None:
    """Write what a round relabelled, in its own order of rows and among other columns."""
    columns = {
        "sample_id": pa.array([f"x{row}.png" for row in rows]),
        "partition": pa.array(partitions, pa.int32()),
        "row": pa.array(rows, pa.int32()),
        "label": pa.array([9] * len(rows), pa.int32()),
        "suggested_label": pa.array(labels, pa.int32()),
    }
    ledger.folder.write_table(ledger.folder.round(number, "relabelled.parquet"), pa.table(columns))


def test_what_committed_rounds_relabelled_has_its_new_label(ledger: Ledger):
    relabel(ledger, 1, [0, 2, 0], [7, 1, 3], [4, 5, 6])
    relabel(ledger, 3, [2, 5], [0, 4], [1, 2])
    relabel(ledger, 4, [9], [9], [9])
    # round 2 only removed, round 4 is not committed
    done = (a_round(0), a_round(1, relabelled=3), a_round(2, removed=2), a_round(3, removed=1, relabelled=2))
    for each in done:
        ledger.commit(each)
    found = ledger.relabelled(ledger.rounds())
    assert {partition: (rows.tolist(), labels.tolist()) for partition, (rows, labels) in found.items()} == {
        0: ([3, 7], [6, 4]),
        2: ([0, 1], [1, 5]),
        5: ([4], [2]),
    }
    assert all(array.dtype == np.int32 for pair in found.values() for array in pair)
    assert ledger.relabelled(ledger.rounds()[:1]) == {}


def test_new_labels_left_by_a_round_that_was_never_committed_do_not_count(ledger: Ledger):
    ledger.commit(a_round(0))
    relabel(ledger, 1, [0], [1], [2])
    assert ledger.relabelled(ledger.rounds()) == {}
    # committed with nothing relabelled: the file is of a selection that came to nothing
    ledger.commit(a_round(1))
    assert ledger.relabelled(ledger.rounds()) == {}


def test_rounds_of_another_version_are_refused_by_name(ledger: Ledger):
    ledger.commit(a_round(0))
    path = ledger.folder.round(0, "round.json")
    record = ledger.folder.read_json(path)
    for other in ({**record, "unknown": 1}, {k: v for k, v in record.items() if k != "relabelled"}, [record]):
        ledger.folder.write_json(path, other)
        with pytest.raises(RunFolderError, match=r"0000/round\.json is not one .*name another run\.path"):
            ledger.rounds()


def test_a_run_is_finished_once_its_summary_is_there(ledger: Ledger):
    summary = {"rounds": 3, "test_accuracy_after": 0.95, "removal_precision": None}
    ledger.finish(summary)
    assert ledger.finished() == summary


def test_a_folder_holds_a_run_or_a_search_and_neither_is_taken_for_the_other(ledger: Ledger):
    search = Ledger(ledger.folder, "search")
    search.start(RunFile(), DATA)
    assert search.started() is not None and not search.is_begun()
    with pytest.raises(RunFolderError, match=r"holds a search \(of posttrain tune\) and no run"):
        ledger.started()
    search.folder.write_json(search.folder.path("trials.json"), [])
    assert search.is_begun()


def test_a_run_goes_on_whatever_is_searched_and_a_search_only_with_the_same_space(ledger: Ledger):
    record = started(ledger)
    search = Ledger(ledger.folder, "search")
    for override, may_differ in (
        ("search.max_concurrent_trials=3", True),
        ("search.trials=3", False),
        ("search.space.removal.budget={choice: [0.1]}", False),
    ):
        changed = load(None, [override])
        ledger.refuse_other_settings(record, changed)
        if may_differ:
            search.refuse_other_settings(record, changed)
        else:
            with pytest.raises(RunFolderError, match=r"holds a search with other settings \(search\."):
                search.refuse_other_settings(record, changed)


def test_no_credential_of_any_uri_is_written_down_and_none_is_a_difference(tmp_path: Path) -> None:
    config = RunFile.model_validate(
        {
            "run": {"path": str(tmp_path / "run")},
            "data": {
                "source": "parquet",
                "train": ["s3://key:hunter1@bucket/a", "s3://bucket/b?secret_key=hunter2"],
                "root": "https://u:hunter3@host/x",
            },
            "model": {"factory": "f:g", "channels": 1, "image_size": 8, "arguments": {"from": ["ftp://u:hunter4@h/"]}},
            "tracking": {"uri": "postgresql://u:hunter5@h/db"},
        }
    )
    ledger = Ledger(RunFolder(str(tmp_path / "run")))
    ledger.start(config, {"train": "0"})
    assert "hunter" not in (tmp_path / "run" / "run.yaml").read_text()
    started = ledger.started()
    assert started is not None and started["config"]["data"]["train"][0] == "s3://***@bucket/a"
    ledger.refuse_other_settings(started, config)
    other = config.data.model_copy(update={"train": ("s3://key:hunter1@bucket/c",)})
    with pytest.raises(RunFolderError) as caught:
        ledger.refuse_other_settings(started, config.model_copy(update={"data": other}))
    assert "bucket/c" in str(caught.value) and "hunter" not in str(caught.value)


def test_the_votes_of_a_round_come_back_to_the_bit(ledger: Ledger):
    assert ledger.votes(2) is None
    votes = np.random.default_rng(0).random((7, 7))
    ledger.keep_votes(2, votes)
    found = ledger.votes(2)
    assert found is not None and ledger.votes(1) is None
    np.testing.assert_array_equal(found, votes)
    table = ledger.folder.read_table(ledger.folder.round(2, "votes.parquet"))
    assert table.slice(2 * 7 + 5, 1).to_pylist() == [{"class": 2, "label": 5, "votes": votes[2, 5]}]
