from __future__ import annotations

import io
from typing import Any

from rich.console import Console

from posttrain.report.summary import print_summary

SUMMARY: dict[str, Any] = {
    "run": "runs/digits",
    "rounds": 3,
    "live": 900,
    "removed": 100,
    "relabelled": 0,
    "quarantined": 0,
    "leakage": {},
    "validation_accuracy_before": 0.7,
    "validation_accuracy_after": 0.75,
    "test_accuracy_before": 0.8,
    "test_accuracy_after": 0.95,
    "test_accuracy_refit": 0.9,
    "test_accuracy_boundary": 0.93,
    "removal_precision": None,
    "removal_recall": None,
    "relabel_accuracy": None,
    "noise": None,
    "boundary": None,
    "seconds": 3.0,
    "steps": {"score": 1.0},
    "ended": "what is left no longer looks wrong",
    "undelivered": None,
    "files": {},
}


def printed(summary: dict[str, Any]) -> list[str]:
    stream = io.StringIO()
    print_summary(Console(file=stream), summary)
    return stream.getvalue().splitlines()


def test_in_a_pipe_no_line_is_padded_or_broken() -> None:
    steps = {f"a step with quite a long name, number {number}": 10.0 - number for number in range(4)}
    files = {"what was removed": "a/removed.parquet", "how to build the model": "a/model.yaml"}
    lines = printed({**SUMMARY, "steps": steps, "files": files})
    assert all(line == line.rstrip() for line in lines)
    [last] = [line for line in lines if "seconds" in line]
    assert last.endswith(", ".join(f"{name} {seconds:.1f}" for name, seconds in steps.items()))
    # what the files are is one column, and their paths another
    assert [line.index("a/") for line in lines if "a/" in line] == [26, 26]


def test_the_removal_is_shown_beside_its_controls() -> None:
    lines = printed(SUMMARY)
    at = next(number for number, line in enumerate(lines) if "test accuracy" in line)
    for line, figures in zip(lines[at : at + 3], ("95.0 %", "93.0 %", "90.0 %"), strict=True):
        assert f"80.0 % -> {figures}" in line
    assert "nothing removed" in lines[at + 1] and lines[at + 1].rstrip().endswith("the removal itself: +2.0 points")
    assert "new head alone" in lines[at + 2]


def test_without_test_labels_there_is_no_control() -> None:
    unknown = {key: None for key in SUMMARY if key.startswith("test_accuracy")}
    assert not any("test accuracy" in line or "control" in line for line in printed({**SUMMARY, **unknown}))


def test_the_removal_is_compared_where_all_else_is_the_same() -> None:
    def offered(name: str, loss: float, test: float, delivered: bool = False) -> dict[str, Any]:
        figures = {"validation_corrected_loss": loss, "test_accuracy": test}
        return {"name": name, "delivered": delivered, "seconds": 2.0, **figures}

    boundary = offered("the boundary on what is left", 0.9, 0.94)
    again = offered("the network trained again on what is left", 0.8, 0.95, delivered=True)
    lines = printed({**SUMMARY, "alternatives": [boundary, again]})
    # with 93 % where nothing is removed: what is delivered is better by the training, too
    assert any(line.endswith("the removal itself: +1.0 points") for line in lines)
    other = printed({**SUMMARY, "alternatives": [boundary, again], "bases": 1})
    assert any(line.endswith("removal and training again together: +1.0 points") for line in other)
    [other], [delivered] = ([line for line in lines if one["name"] in line] for one in (boundary, again))
    assert other.split("left")[1].split() == ["0.900", "2", "s,", "test", "94.0", "%"]
    assert delivered.split("left")[1].split() == ["0.800", "delivered;", "2", "s,", "test", "95.0", "%"]
