"""The benchmark of the stop rule: the awkward cases, and what the table says of a run."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from scipy.stats import binomtest

from pipelines.benchmarks import cases, safety
from pipelines.benchmarks.cases import Case
from pipelines.benchmarks.safety import Found

FOUND = Found(
    "digits", "symmetric 20", "memorised", 0, 1000, 200, 0.18, 0.1, 0.3, True, 150, 144, 0.7, 0.8, 0.9, 0.92, 3, "done"
)


@pytest.mark.long
@pytest.mark.slow
def test_a_run_is_told_by_its_true_labels_and_not_done_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    case = Case("digits", "symmetric 20", "memorised", 0)
    found = safety.measured(case, tmp_path)
    given, true = (getattr(cases.load(case).train, name) for name in ("given", "true"))
    assert (found.samples, found.wrong) == (len(given), int((given != true).sum()))
    assert 0 < found.removed_wrong <= min(found.removed, found.wrong)
    assert found.low <= found.rate <= found.high and found.found
    assert found.removed <= (found.high + 0.1) * found.samples
    monkeypatch.setattr(cases, "load", lambda case: pytest.fail("it is in the folder"))
    assert safety.measured(case, tmp_path) == found


@pytest.mark.parametrize("noise", safety.HARD)
def test_the_awkward_cases_are_what_they_are_called(noise: str):
    data = cases.load(Case("digits", noise, "memorised", 0))
    wrong = data.train.given != data.train.true
    sizes = np.bincount(data.train.true, minlength=data.classes)
    kind, _, percent = noise.removeprefix(cases.CHECKED).partition(" ")
    if kind == "class":
        assert set(data.train.true[wrong]) == {3}
        assert binomtest(int(wrong.sum()), int(sizes[3]), 0.9).pvalue > 1e-3
    else:
        # instance-dependent rates scatter around theirs
        assert kind == "instance" or binomtest(int(wrong.sum()), len(wrong), int(percent) / 100).pvalue > 1e-3
    if kind == "imbalanced":
        assert sizes[0] > 10 * max(1, sizes[-1])
    if kind == "two":
        assert data.classes == 2 and set(data.test.true) == {0, 1}
    checked = (data.validation.given == data.validation.true).all()
    assert checked == (noise.startswith(cases.CHECKED) or percent == "0")
    assert not set(data.train.ids) & set(data.validation.ids)
    assert (data.test.given == data.test.true).all()


def test_the_report_is_made_of_what_is_there(tmp_path: Path):
    (tmp_path / "safety").mkdir()
    case = Case("digits", "symmetric 20", "memorised", 0)
    (tmp_path / "safety" / f"{case.key}.json").write_text(json.dumps(asdict(FOUND)))
    safety.main(["--report", "--folder", str(tmp_path), "--out", str(tmp_path)])
    text = (tmp_path / "safety.md").read_text()
    assert text.count("\n| digits |") == 1 and "18.0 % (10.0 % to 30.0 %)" in text
    assert pq.read_table(tmp_path / "safety.parquet").to_pylist() == [asdict(FOUND)]
