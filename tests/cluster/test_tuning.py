from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from ray.tune.schedulers import TrialScheduler
from scipy import stats

from posttrain.cluster.tuning import Halving, PerTrial, Schedule, Scheduler, sample_values, search
from posttrain.config import Distribution, RunFile
from posttrain.store.folder import RunFolder


def sampled(distribution: Distribution, count: int = 2000) -> list[Any]:
    return [values["removal.budget"] for values in sample_values({"removal.budget": distribution}, count + 1, 3)[1:]]


@pytest.mark.parametrize(
    ("distribution", "cumulative"),
    [
        (Distribution(uniform=(0.2, 0.7)), stats.uniform(0.2, 0.5).cdf),
        (Distribution(loguniform=(0.001, 0.1)), stats.loguniform(0.001, 0.1).cdf),
    ],
)
def test_numbers_have_the_distribution_that_is_named_within_its_bounds(distribution: Distribution, cumulative: Any):
    values = sampled(distribution)
    low, high = distribution.uniform or distribution.loguniform or (0, 0)
    assert low <= min(values) and max(values) <= high
    assert stats.kstest(values, cumulative).pvalue > 0.01


@pytest.mark.parametrize(
    ("distribution", "possible"),
    [
        (Distribution(integers=(2, 5)), [2, 3, 4, 5]),
        (Distribution(choice=("auto", ["head", "input"], None, 0.5)), ["auto", ["head", "input"], None, 0.5]),
    ],
)
def test_whole_numbers_and_choices_are_equally_likely_both_ends_included(
    distribution: Distribution, possible: list[Any]
):
    values = sampled(distribution)
    assert all(value in possible and type(value) in map(type, possible) for value in values)
    assert stats.chisquare([values.count(value) for value in possible]).pvalue > 0.01


def test_the_same_seed_gives_the_same_trials_and_more_of_them_change_none():
    space = RunFile().search.space
    eight = sample_values(space, 8, 5)
    assert eight == sample_values(space, 8, 5) == sample_values(space, 12, 5)[:8]
    assert eight != sample_values(space, 8, 6)
    one_key_less = {key: distribution for key, distribution in space.items() if key != "removal.score"}
    assert [v | {"removal.score": 0} for v in sample_values(one_key_less, 8, 5)[1:]] == [
        v | {"removal.score": 0} for v in eight[1:]
    ]


def test_the_first_trial_is_the_run_file_as_it_is_and_every_other_a_valid_one():
    space = RunFile().search.space
    first, *others = sample_values(space, 50, 0)
    assert first == {}
    for values in others:
        assert list(values) == list(space)
        RunFile().with_values(values)


RULE = Halving("validation_accuracy", True, 1, 2, 10, frozenset({0}))


def decisions(scheduler: Any, reports: list[tuple[int, int, float]]) -> list[bool]:
    """Whether each report (trial, round, accuracy) has its trial stopped."""
    found = []
    for number, at, accuracy in reports:
        trial = SimpleNamespace(config={"number": number})
        if at == 1:
            scheduler.on_trial_add(None, trial)
        told = {"round": at, "final": False, "validation_accuracy": accuracy}
        found.append(scheduler.on_trial_result(None, trial, told) == TrialScheduler.STOP)
    return found


def test_the_worse_half_is_stopped_at_each_milestone_but_never_the_trial_that_is_kept():
    reports = [(1, 1, 0.7), (2, 1, 0.6), (3, 1, 0.8), (0, 1, 0.1), (3, 2, 0.9), (1, 2, 0.8), (0, 2, 0.1)]
    assert decisions(Scheduler(RULE, {}), reports) == [False, True, False, False, False, True, False]


def test_a_lower_loss_is_better():
    rule = Halving("validation_accuracy", False, 1, 2, 10, frozenset({0}))
    assert decisions(Scheduler(rule, {}), [(1, 1, 0.7), (2, 1, 0.6), (3, 1, 0.8)]) == [False, False, True]


def test_a_report_at_its_own_end_stops_no_trial():
    scheduler: Any = Scheduler(RULE, {})
    decisions(scheduler, [(1, 1, 0.9)])
    trial = SimpleNamespace(config={"number": 2})
    scheduler.on_trial_add(None, trial)
    told = {"round": 2, "final": True, "validation_accuracy": 0.1}
    assert scheduler.on_trial_result(None, trial, told) == TrialScheduler.CONTINUE


def test_a_search_of_which_no_trial_is_left_ends_at_once(tmp_path: Path):
    """It was killed between the end of its last trial and its summary."""
    nothing: Any = None
    schedule = Schedule([], {}, RULE, None)
    folder = RunFolder(str(tmp_path))
    assert search(nothing, nothing, schedule, PerTrial(1, 0), folder=folder, listener=nothing, verbose=False) == {}


def test_a_search_that_goes_on_decides_as_if_it_had_not_been_interrupted():
    generator = np.random.default_rng(0)
    rounds = [1, 2, 3, 4, 5, 8]
    reports = [(number, at, float(generator.random())) for at in rounds for number in range(6)]
    whole = decisions(Scheduler(RULE, {}), reports)
    for interrupted in (6, 15, 20):
        known: dict[int, list[dict[str, Any]]] = {}
        for number, at, accuracy in reports[:interrupted]:
            known.setdefault(number, []).append({"round": at, "final": False, "validation_accuracy": accuracy})
        again: Any = Scheduler(RULE, known)
        for number in range(6):
            again.on_trial_add(None, SimpleNamespace(config={"number": number}))
        assert decisions(again, [r for r in reports[interrupted:]]) == whole[interrupted:]
