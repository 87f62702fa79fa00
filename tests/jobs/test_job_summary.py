from __future__ import annotations

import pytest

from posttrain.jobs.summary import print_summary

COUNTS = {"live": 90, "removed": 10, "previously_removed": 0, "relabelled": 0, "quarantined": 0, "embedded": {}}


@pytest.mark.parametrize(
    ("held_back", "said"),
    [
        ([], ["look at data.validation and the model, or raise gate.alarm_older_share"]),
        (["a.pq"], ["held back until changed, or let in by posttrain retrain --accept: 1 training file", "a.pq"]),
    ],
)
def test_an_alarm_says_the_way_out_that_there_is(
    capsys: pytest.CaptureFixture[str], held_back: list[str], said: list[str]
) -> None:
    job = {"job": "photos", "outcome": "alarm", "reason": "too many", "champion": "1", "version": None, "run": "runs/1"}
    print_summary({**job, **COUNTS, "held_back": held_back})
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    assert lines[3:] == [*said, "run: runs/1"]
