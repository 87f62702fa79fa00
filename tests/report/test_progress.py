from __future__ import annotations

import io

import pytest
from rich.console import Console

from posttrain.report.progress import StepLog


@pytest.mark.parametrize("count, counted", [(1, "1 sample"), (2, "2 samples"), (1000, "1,000 samples")])
def test_a_step_is_one_line_that_counts_one_sample_or_several_samples(count: int, counted: str):
    stream = io.StringIO()
    with StepLog(Console(file=stream)).step("select") as tell:
        tell(count, count)
    [line] = stream.getvalue().splitlines()
    assert line[:41].split() == ["select", *counted.split()]
    assert line.endswith(" s") and "/s " in line[41:]
