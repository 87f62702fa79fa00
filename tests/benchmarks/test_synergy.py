"""posttrain with other methods: what the report makes of the findings, and a case on digits."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pytest

from pipelines.benchmarks import cases, synergy
from pipelines.benchmarks.cases import Case
from pipelines.benchmarks.synergy_report import (
    ALIKE,
    AUTO,
    BEST,
    CLEANLAB,
    HEAD,
    LAST,
    NETWORK,
    OFFERED,
    OTHER,
    RANDOM,
    RIGHT,
    SCRATCH,
    SCRATCH_OTHERS,
    SMALL_LOSS,
    VARIANTS,
    differences,
    report,
)


def record(test: dict[str, float], noise: str = "symmetric 40", seed: int = 0, method: str = "gce") -> dict[str, Any]:
    """A finding with these test accuracies, else 0.5."""
    clean = noise == "clean"
    removed = (0.02, 0.0, None) if clean else (0.3, 0.8, 0.6)
    return {
        "noise": noise,
        "method": method,
        "seed": seed,
        "wrong": 0.0 if clean else 0.4,
        "estimated": 0.0 if clean else 0.35,
        "fitted": 0.75,
        "best_epoch": 3,
        "rounds": 4,
        "steps": 94,
        "rows": {name: {"test": test.get(name, 0.5), "validation": 0.1} for name in VARIANTS},
        "removed": dict.fromkeys((HEAD, NETWORK, RANDOM, SMALL_LOSS, CLEANLAB), removed),
        "seconds": {"training": 4.0, HEAD: 1.5, NETWORK: 2.5, CLEANLAB: 5.0},
    }


def cells(text: str, after: str, name: str) -> list[str]:
    """Of the first row of this name behind a piece of text."""
    lines = text[text.index(after) :].splitlines()
    line = next(line for line in lines if line.startswith(f"| {name} |"))
    return [cell.strip() for cell in line.strip("|").split("|")][1:]


def test_a_difference_is_positive_where_posttrain_is_better():
    one = record({LAST: 0.5, BEST: 0.56, HEAD: 0.6, RANDOM: 0.45, SMALL_LOSS: 0.57, SCRATCH_OTHERS[CLEANLAB]: 0.63})
    assert differences([one], HEAD, LAST) == pytest.approx([0.1])
    assert differences([one], HEAD, BEST) == pytest.approx([0.04])
    assert differences([one], HEAD, OTHER) == pytest.approx([-0.03])
    assert differences([one], HEAD, ALIKE) == pytest.approx([0.03])
    assert differences([one], SCRATCH, ALIKE) == pytest.approx([-0.13])


def test_the_report_pairs_the_noisy_cases_of_a_method():
    records = [
        record({LAST: 0.5, HEAD: 0.6, NETWORK: 0.48}, seed=0),
        record({LAST: 0.4, HEAD: 0.54, NETWORK: 0.39}, seed=1),
        # neither of another method nor of clean labels
        record({LAST: 0.9, HEAD: 0.1}, "clean"),
        record({AUTO: 0.7, HEAD: 0.7, NETWORK: 0.6, SCRATCH: 0.6}, method="mixup"),
    ]
    text = report(records, "command", "hardware")
    # +10 and +14 points: 12 on average, standard error 2
    assert cells(text, f"Minus `{LAST}`", "gce") == ["+5.0 ± 5.0", "**+12.0 ± 2.0**", "**-1.5 ± 0.5**", "+5.0 ± 5.0"]
    assert cells(text, f"Minus `{LAST}`", "mixup") == ["+20.0", "+20.0", "+10.0", "+10.0"]
    assert cells(text, "## Mean over the noisy labels", "gce")[0] == "45.0 ± 5.0"
    assert cells(text, "## clean", "gce")[0] == "90.0"
    removed = [HEAD, "35.0 ± 0.0", "30.0 ± 0.0", "80.0 ± 0.0", "60.0 ± 0.0", "2.0"]
    assert cells(text, "## What is removed", "gce") == removed
    assert text.count("does not improve") == 2, "the heading, and a sentence on gce"
    assert f"- gce: posttrain does not improve the mean of `{LAST}` ({NETWORK} -1.5 ± 0.5), nor of `{BEST}`" in text


def test_all_is_measured_of_a_case(monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("cleanlab", reason="needs cleanlab: pip install 'posttrain[benchmark]'")
    digits = cases.DATASETS["digits"]
    short = replace(digits.training["augmented"], epochs=3, method="co_teaching")
    both = {"co_teaching": short, "cross_entropy": replace(short, method="cross_entropy")}
    monkeypatch.setitem(cases.DATASETS, "digits", replace(digits, training=both))
    monkeypatch.setattr(synergy, "REMOVAL", synergy.REMOVAL.model_copy(update={"max_rounds": 2}))
    found = synergy.measured(Case("digits", "symmetric 40", "co_teaching", 0))
    assert set(found.rows) == set(VARIANTS)
    assert found.rows[RIGHT]["test"] > found.rows[LAST]["test"]
    lowest = min(OFFERED, key=lambda name: found.rows[name]["loss"])
    assert found.rows[AUTO] == found.rows[lowest]
    assert found.steps and found.rounds and 1 <= found.best_epoch <= 3
    share, precision, recall = found.removed[NETWORK]
    assert precision is not None and recall is not None
    # of `wrong` labels a share `recall` goes
    assert share * precision == pytest.approx(found.wrong * recall)
    assert found.removed[RANDOM][0] == pytest.approx(share) == found.removed[SMALL_LOSS][0]
    assert np.isfinite([row["test"] for row in found.rows.values()]).all()
    assert report([asdict(found)], "command", "hardware").startswith("# posttrain with every method")
