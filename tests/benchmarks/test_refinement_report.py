"""What the refinement benchmark says of its findings."""

from __future__ import annotations

import statistics
from dataclasses import replace

import pytest

from pipelines.benchmarks.cases import Case
from pipelines.benchmarks.in_memory import Estimate, Mode
from pipelines.benchmarks.refinement_findings import (
    AFTER_FOLDS,
    CHOSEN,
    EMA,
    MODES,
    ROWS,
    THEN_BOUNDARY,
    UNTOUCHED,
    Cleaning,
    Finding,
    Row,
)
from pipelines.benchmarks.refinement_report import compared, report


def finding(
    noise: str = "pair 40",
    seed: int = 0,
    *,
    validation: str = "head",
    others: dict[str, float] | None = None,
    **ours: float,
) -> Finding:
    """A finding with these test accuracies of the modes and of other rows, else 0.5.

    The mode `validation` has the best validation accuracy; cleanlab's rows are there where they are named.
    """
    named = {**{f"posttrain, {mode}": accuracy for mode, accuracy in ours.items()}, **(others or {})}
    given = {**dict.fromkeys(ROWS, 0.5), **named}
    wrong = 0 if noise == "clean" else 40
    removed = 0 if noise == "clean" else 30
    rows = tuple(
        Row(
            name,
            accuracy,
            0.9 if name == f"posttrain, {validation}" else 0.6,
            0,
            100 - removed * name.startswith("posttrain"),
            wrong - removed * 24 // 30 * name.startswith("posttrain"),
        )
        for name, accuracy in given.items()
        if name not in AFTER_FOLDS or name in named
    )
    estimates = (Estimate(0.4, 0.3, 0.5, True), Estimate(0.2, 0.1, 0.3, True))
    cleaning = Cleaning("removal.max_rounds = 4 reached", False, (10, 10, 10), (), (0.5, 0.6, 0.7), estimates)
    if noise == "clean":
        nothing = (Estimate(0.0, 0.0, 0.07, False),)
        cleaning = Cleaning("nothing is removed: no sign", False, (), (), (), nothing)
    cleanings: dict[Mode, Cleaning] = {mode: cleaning for mode in MODES}
    cleanings["both"] = replace(cleaning, new_boundary=noise != "clean")
    case = Case("digits", noise, "memorised", seed)
    return Finding(case, 100, wrong, cleanings, rows, "a machine", 1, {})


def test_the_best_control_is_that_of_each_seed_and_the_best_mode_that_of_the_validation_labels():
    findings = [
        finding(seed=0, head=0.80, network=0.70, both=0.60, validation="head", others={CHOSEN: 0.76, EMA: 0.79}),
        finding(seed=1, head=0.80, network=0.70, both=0.90, validation="network", others={UNTOUCHED: 0.77, EMA: 0.60}),
        finding(seed=2, head=0.80, network=0.70, both=0.95, validation="both", others={THEN_BOUNDARY: 0.81}),
    ]
    [head] = compared(findings, "head")
    # a boundary without removal is posttrain's own: no control
    assert head.differences == pytest.approx([0.01, 0.03, 0.30])
    assert [name for name, _ in head.controls] == [EMA, UNTOUCHED, UNTOUCHED]
    [network] = compared(findings, "network")
    assert network.differences == pytest.approx([-0.09, -0.07, 0.20])
    [best] = compared(findings, "best")
    assert best.ours == (0.80, 0.70, 0.95)
    assert best.controls == ((EMA, 0.79), (UNTOUCHED, 0.77), (UNTOUCHED, 0.5))
    # the standard error of the mean of paired differences, by hand
    differences = [0.01, -0.07, 0.45]
    mean = sum(differences) / 3
    error = (sum((d - mean) ** 2 for d in differences) / 2 / 3) ** 0.5
    assert best.difference == pytest.approx(mean) and best.error == pytest.approx(error)
    assert not best.above and not best.below


def test_the_report_counts_what_is_above_and_lists_what_is_not():
    findings = [
        *(finding("pair 40", seed, head=0.70 + 0.01 * seed, network=0.50 - 0.01 * seed) for seed in range(3)),
        *(finding("symmetric 40", seed, head=0.45 + 0.05 * seed, network=0.46 + 0.01 * seed) for seed in range(3)),
    ]
    text = report(findings, "command")
    assert "95 % interval would ask for 4.3 standard errors" in text
    assert (
        "**posttrain, head**: above the best control by more than 2 standard errors on 1 of 2 settings, not on 1; "
        "below it by more than that on 0. Not above:\n\n- digits, symmetric 40, memorised: +0.0 ± 2.9\n" in text
    )
    assert (
        "**posttrain, network**: above the best control by more than 2 standard errors on 0 of 2 settings, not on 2; "
        "below it by more than that on 1. Not above:\n\n- digits, symmetric 40, memorised: -3.0 ± 0.6 (below)\n"
        "- digits, pair 40, memorised: -1.0 ± 0.6\n" in text
    )
    row = "| digits | pair 40 | memorised | 3 | **+21.0 ± 0.6** | -1.0 ± 0.6 | +0.0 ± 0.0 | **+21.0 ± 0.6** |"
    assert row in text
    deviation = 100 * statistics.stdev([0.70, 0.71, 0.72])
    assert f"| posttrain, head | 50.0 ± 5.0 | 71.0 ± {deviation:.1f} |" in text
    removal = "| digits | pair 40 | memorised | network | 40.0 ± 0.0 | 40.0 ± 0.0 (30.0 to 50.0) | 20.0 ± 0.0 |"
    assert f"{removal} 3, 3, 3 | 30.0 ± 0.0 | 80.0 ± 0.0 | 60.0 ± 0.0 | rounds 3 | 3 |" in text
    assert "## Clean data" not in text
