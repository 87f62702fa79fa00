from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from posttrain.gate import Arrivals, Decision, HeldOut, decide

CHAMPION = HeldOut((100, 100, 10), (80, 90, 9))
QUIET = Arrivals(300, 60, 70)
SETTINGS: dict[str, Any] = {
    "margin": 0.0,
    "class_drop": 0.05,
    "class_samples": 20,
    "alarm_share": 0.5,
    "alarm_samples": 20,
    "classes": ("cat", "dog", "owl"),
}


def decision(champion: HeldOut | None, challenger: HeldOut, arrivals: Arrivals = QUIET, **settings: Any) -> Decision:
    return decide(champion, challenger, arrivals, **{**SETTINGS, **settings})


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
    found = decision(CHAMPION, HeldOut(CHAMPION.samples, (100, 80, 9)))
    assert "class dog 80 of 100 are right where the champion has 90: a loss of 10.0 points" in found.reason


@pytest.mark.parametrize(
    ("arrivals", "verdict"),
    [
        (Arrivals(100, 50, 0), "promoted"),
        (Arrivals(100, 51, 0), "alarm"),
        (Arrivals(100, 0, 51), "alarm"),  # taken out later, round by round
        (Arrivals(100, 30, 30), "promoted"),  # the same samples: shares do not add up
        (Arrivals(19, 19, 19), "promoted"),  # too few to tell
        (Arrivals(0, 0, 0), "promoted"),
    ],
)
def test_an_alarm_where_too_many_of_the_new_samples_look_wrong(arrivals: Arrivals, verdict: str) -> None:
    better = HeldOut(CHAMPION.samples, (100, 100, 10))
    assert decision(CHAMPION, better, arrivals).verdict == verdict
    assert decision(None, better, arrivals).verdict == verdict


def test_without_a_champion_any_model_is_promoted() -> None:
    assert decision(None, HeldOut((10, 10, 10), (0, 0, 0))).verdict == "promoted"


def test_models_measured_on_other_samples_are_not_compared() -> None:
    with pytest.raises(ValueError, match="other samples"):
        decision(CHAMPION, HeldOut((100, 100, 11), (80, 90, 9)))


@given(
    st.lists(st.tuples(st.integers(1, 60), st.integers(0, 60), st.integers(0, 60)), min_size=3, max_size=3),
    st.sampled_from([0.0, 0.02, 0.1]),
    st.sampled_from([0.0, 0.05, 0.3]),
)
def test_the_gate_is_what_its_definition_says(
    drawn: list[tuple[int, int, int]], margin: float, class_drop: float
) -> None:
    from fractions import Fraction

    samples = tuple(n for n, _, _ in drawn)
    before, after = (tuple(min(row[at], row[0]) for row in drawn) for at in (1, 2))
    better = Fraction(sum(after) - sum(before), sum(samples)) >= Fraction(str(margin))
    worst = max((Fraction(b - a, n) for n, b, a in zip(samples, before, after, strict=True) if n >= 20), default=0)
    expected = "promoted" if better and worst <= Fraction(str(class_drop)) else "not promoted"
    found = decision(HeldOut(samples, before), HeldOut(samples, after), margin=margin, class_drop=class_drop)
    assert found.verdict == expected
