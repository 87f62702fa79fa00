from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from posttrain.jobs.gate import NO_DATA, BatchCounts, ClassCounts, Decision, alarm, compare

CHAMPION = ClassCounts((100, 100, 10), (80, 90, 9))
QUIET = {"quiet": BatchCounts(300, 60, 70)}
GATE: dict[str, Any] = {"margin": 0.0, "class_drop": 0.05, "class_samples": 20, "classes": ("cat", "dog", "owl")}


def decision(
    champion: ClassCounts | None,
    challenger: ClassCounts,
    new_data: Mapping[str, BatchCounts] = QUIET,
    older: BatchCounts = NO_DATA,
    **settings: Any,
) -> Decision:
    raised = alarm(new_data, older, alarm_share=0.5, alarm_samples=20, alarm_older_share=0.2)
    return raised or compare(champion, challenger, **{**GATE, **settings})


@pytest.mark.parametrize(
    ("correct", "settings", "verdict"),
    [
        ((80, 90, 9), {}, "promoted"),  # as good is good enough without a margin
        ((81, 90, 9), {}, "promoted"),
        ((80, 89, 9), {}, "not promoted"),
        ((80, 89, 9), {"margin": -0.01}, "promoted"),
        ((82, 90, 9), {"margin": 0.01}, "not promoted"),  # 2 of 210 are 0.95 points
        ((83, 90, 9), {"margin": 0.01}, "promoted"),
        ((85, 85, 9), {}, "promoted"),  # dog loses 5 points, and may
        ((90, 84, 9), {}, "not promoted"),  # and 6, which it may not, though the whole is better
        ((90, 84, 9), {"class_drop": 0.06}, "promoted"),
        ((90, 90, 0), {}, "promoted"),  # 10 owls are too few to look at them alone
        ((90, 90, 0), {"class_samples": 10}, "not promoted"),
    ],
)
def test_the_gate_by_accuracy_in_all_and_of_each_class(
    correct: tuple[int, ...], settings: dict[str, Any], verdict: str
) -> None:
    assert decision(CHAMPION, replace(CHAMPION, correct=correct), **settings).verdict == verdict


def test_a_class_that_loses_is_named_with_its_numbers() -> None:
    found = decision(CHAMPION, ClassCounts(CHAMPION.samples, (100, 80, 9)))
    assert "class dog 80 of 100 are right where the champion has 90: a loss of 10.0 points" in found.reason


@pytest.mark.parametrize(
    ("new_data", "verdict"),
    [
        (BatchCounts(100, 50, 0), "promoted"),
        (BatchCounts(100, 51, 0), "alarm"),
        (BatchCounts(100, 0, 51), "alarm"),  # taken out later, round by round
        (BatchCounts(100, 30, 30), "promoted"),  # the same samples: shares do not add up
        (BatchCounts(19, 19, 19), "promoted"),  # too few to tell
        (BatchCounts(0, 0, 0), "promoted"),
    ],
)
def test_an_alarm_where_too_many_of_the_new_samples_look_wrong(new_data: BatchCounts, verdict: str) -> None:
    better = ClassCounts(CHAMPION.samples, (100, 100, 10))
    assert decision(CHAMPION, better, {"a": new_data}).verdict == verdict
    assert decision(None, better, {"a": new_data}).verdict == verdict


def test_a_poisoned_file_among_many_good_ones_raises_the_alarm_by_its_name() -> None:
    good = {f"good {i}": BatchCounts(1000, 100, 100) for i in range(9)}
    poisoned = {"x/poisoned": BatchCounts(50, 40, 30), "x/also": BatchCounts(50, 10, 26)}
    better = ClassCounts(CHAMPION.samples, (100, 100, 10))
    assert decision(CHAMPION, better, good) == replace(decision(CHAMPION, better), alarming=())
    found = decision(CHAMPION, better, {**good, **poisoned})
    assert (found.verdict, found.alarming) == ("alarm", ("x/also", "x/poisoned"))
    assert found.reason.startswith(
        "56.0 % of the 100 new samples of x/also, x/poisoned look wrong (50 in the first round, 56 were taken out"
    )


@pytest.mark.parametrize(("files", "verdict"), [(3, "promoted"), (4, "alarm")])
def test_files_too_small_to_be_checked_alone_are_checked_together(files: int, verdict: str) -> None:
    new_data = {f"small {i}": BatchCounts(5, 4, 4) for i in range(files)} | {"none": BatchCounts(0, 0, 0)}
    found = decision(None, CHAMPION, {**new_data, "large": BatchCounts(20, 0, 0)})
    assert found.verdict == verdict
    assert found.alarming == (tuple(sorted(new_data))[1:] if verdict == "alarm" else ())


def test_many_alarming_files_are_counted_and_three_are_named() -> None:
    found = decision(None, CHAMPION, {f"f{i}": BatchCounts(20, 20, 0) for i in range(7)})
    assert "140 new samples of f0, f1, f2 and 4 more look wrong" in found.reason


@pytest.mark.parametrize(
    ("older", "verdict"),
    [(BatchCounts(100, 0, 20), "promoted"), (BatchCounts(100, 0, 21), "alarm"), (BatchCounts(19, 0, 19), "promoted")],
)
def test_an_alarm_where_too_much_goes_of_what_previous_runs_kept(older: BatchCounts, verdict: str) -> None:
    found = decision(CHAMPION, ClassCounts(CHAMPION.samples, (100, 100, 10)), older=older)
    assert (found.verdict, found.alarming) == (verdict, ())
    if verdict == "alarm":
        assert "21 of the 100 samples that previous runs had kept were taken out (21.0 %)" in found.reason


def test_without_a_champion_any_model_is_promoted() -> None:
    assert decision(None, ClassCounts((10, 10, 10), (0, 0, 0))).verdict == "promoted"


def test_models_measured_on_other_samples_are_not_compared() -> None:
    with pytest.raises(ValueError, match="other samples"):
        decision(CHAMPION, ClassCounts((100, 100, 11), (80, 90, 9)))


@given(
    st.lists(st.tuples(st.integers(1, 60), st.integers(0, 60), st.integers(0, 60)), min_size=3, max_size=3),
    st.sampled_from([0.0, 0.02, 0.1]),
    st.sampled_from([0.0, 0.05, 0.3]),
)
def test_the_gate_is_what_its_definition_says(
    rows: list[tuple[int, int, int]], margin: float, class_drop: float
) -> None:
    from fractions import Fraction

    samples = tuple(n for n, _, _ in rows)
    before, after = (tuple(min(row[at], row[0]) for row in rows) for at in (1, 2))
    better = Fraction(sum(after) - sum(before), sum(samples)) >= Fraction(str(margin))
    worst = max((Fraction(b - a, n) for n, b, a in zip(samples, before, after, strict=True) if n >= 20), default=0)
    expected = "promoted" if better and worst <= Fraction(str(class_drop)) else "not promoted"
    found = decision(ClassCounts(samples, before), ClassCounts(samples, after), margin=margin, class_drop=class_drop)
    assert found.verdict == expected
