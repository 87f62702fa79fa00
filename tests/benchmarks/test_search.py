from __future__ import annotations

from typing import Any

import pytest

from pipelines.benchmarks.search import report


def found(again: float = 0.75) -> dict[str, Any]:
    trials = [
        {"number": 0, "how": "ended", "rounds": 6, "validation_accuracy": 0.7, "live": 90},
        {"number": 1, "how": "stopped", "rounds": 2, "validation_accuracy": None, "live": 95},
        {"number": 2, "how": "ended", "rounds": 4, "validation_accuracy": 0.75, "live": 80},
    ]
    runs = [{"summary": {"rounds": 6, "validation_accuracy_after": 0.7}, "seconds": 20.0} for _ in trials]
    return {
        "search": {"best": 2, "trials": trials},
        "seconds": 30.0,
        "best": {"validation_accuracy_after": again, "live": 80},
        "best_seconds": 21.0,
        "runs": runs,
        "hardware": "a machine",
    }


def test_the_report_holds_the_search_beside_the_sum_of_the_separate_runs():
    text = report(found(), "a command")
    assert "`posttrain tune` 30.0 s" in text and "the other 60.0 s; ratio 0.50" in text
    assert "(trial 2) repeats" in text and "75.00 %, 80 live" in text
    assert [line[:5] for line in text.splitlines() if line.startswith("|")][2:] == ["| 0 |", "| 1 |", "| 2 |"]


def test_a_best_recipe_that_does_not_repeat_its_figure_is_no_result():
    with pytest.raises(ValueError, match=r"best\.yaml ends at 0\.74, the search's trial 2"):
        report(found(again=0.74), "a command")
