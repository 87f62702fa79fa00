"""What a start takes over of the leaks that an earlier one, which was killed, wrote down."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest
from rich.console import Console

from posttrain.config import RunFile
from posttrain.errors import DataError
from posttrain.report.progress import StepLog
from posttrain.runs import leakage
from posttrain.runs.leakage import Leaks
from posttrain.store.folder import RunFolder
from posttrain.store.ledger import Ledger

FINGERPRINT = {"files": "0" * 16, "train": "1" * 16, "validation": "2" * 16}
MODEL = {"factory": "posttrain.vision.models:mlp", "channels": 1, "image_size": 8}
SPLITS: Any = {"train": SimpleNamespace(rows=10), "validation": SimpleNamespace(rows=10)}


def run_file(path: Path, **data: Any) -> RunFile:
    data = {"source": "parquet", "train": "train.parquet", "validation": "validation.parquet", **data}
    return RunFile.model_validate({"run": {"path": str(path)}, "data": data, "model": MODEL})


def pairs(other_id: int) -> pa.Table:
    """One image of the training set that is also in the validation set."""
    place = {"partition": pa.array([0], pa.int32()), "row": pa.array([1], pa.int32()), "sample_id": [1], "file": ["t"]}
    other = {"split": ["validation"], "other_partition": pa.array([0], pa.int32())}
    other |= {"other_row": pa.array([2], pa.int32()), "other_id": [other_id], "other_file": ["v"]}
    alike = {"same_label": [True], "identical": [True], "mirrored": [False], "difference": pa.array([0], pa.float32())}
    return pa.table({**place, **other, **alike})


@pytest.fixture
def found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The leaks by a run file; each search finds the pair with the number of the search."""
    searches: list[int] = []

    def search(*_: Any) -> tuple[pa.Table, list[Any]]:
        searches.append(len(searches))
        return pairs(searches[-1]), []

    monkeypatch.setattr(leakage.leakage, "find", search)
    ledger = Ledger(RunFolder(str(tmp_path / "run")))
    quiet = StepLog(Console(quiet=True))

    def found(begin: bool = False, **data: Any) -> Leaks:
        config = run_file(tmp_path / "run", **data)
        leaks = leakage.find(config, SPLITS, None, FINGERPRINT, ledger, quiet)
        if begin:
            ledger.start(config, FINGERPRINT)
            leakage.record(leaks, ledger)
        return leaks

    return found


def other_id(leaks: Leaks) -> int:
    assert leaks.pairs is not None
    return leaks.pairs["other_id"][0].as_py()


def test_the_same_data_are_not_searched_again(found: Any) -> None:
    assert other_id(found(begin=True, leakage="report")) == other_id(found(leakage="report")) == 0


def test_identical_images_that_were_reported_are_refused_once_the_run_file_says_so(found: Any) -> None:
    found(begin=True, leakage="report")
    with pytest.raises(DataError, match=r"data\.validation = .* 1 of 10 images are in the training set, too"):
        found(leakage="refuse")


def test_the_images_of_another_column_are_searched_anew(found: Any) -> None:
    found(begin=True, leakage="report")
    assert other_id(found(leakage="report", image="thumbnail")) == 1


def test_kept_pairs_are_refused_as_found_ones_are(found: Any, tmp_path: Path) -> None:
    ledger = Ledger(RunFolder(str(tmp_path / "run")))
    ledger.start(run_file(tmp_path / "run", leakage="refuse"), FINGERPRINT)
    leakage.record(Leaks(pairs(0), "refuse"), ledger)
    with pytest.raises(DataError, match="in the training set, too"):
        found(leakage="refuse")
