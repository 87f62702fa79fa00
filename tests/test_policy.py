"""What a run allows itself, against counting by hand and against repeated draws."""

import numpy as np
import pytest

from posttrain import policy
from posttrain.schema import Round

HISTORY = (Round(0, 1000, 0, 0, 0, {}), Round(1, 960, 90, 40, 10, {}), Round(2, 940, 50, 20, 5, {}))


@pytest.mark.parametrize("accuracy", [0.55, 0.9])
def test_the_standard_error_is_the_spread_of_measured_accuracies(accuracy: float):
    drawn = np.random.default_rng(0).binomial(400, accuracy, 20_000) / 400
    assert policy.standard_error(accuracy, 400) == pytest.approx(drawn.std(), rel=0.04)


@pytest.mark.parametrize("accuracy", [0.0, 1.0])
def test_an_accuracy_without_an_error_is_not_certain(accuracy: float):
    # (0 + 2) of 24, by hand
    assert policy.standard_error(accuracy, 20) == pytest.approx((1 / 12 * 11 / 12 / 24) ** 0.5)


@pytest.mark.parametrize(("share", "left"), [(0.0, 0), (0.075, 0), (0.1, 25), (1.0, 925)])
def test_the_allowance_is_a_share_of_the_first_samples_less_what_was_dealt_with(share: float, left: int):
    assert policy.allowance(HISTORY, share) == left


def test_what_former_runs_dealt_with_counts_along():
    """By hand: 1000 live, 200 of which were relabelled, and 250 removed before; 75 removed or relabelled now."""
    assert policy.allowance(HISTORY, 0.5, previously_removed=250, previously_relabelled=200) == 625 - 75 - 450
    assert policy.allowance(HISTORY, 0.4, previously_removed=250, previously_relabelled=200) == 0


def test_the_share_is_the_users_or_the_largest_estimate_so_far():
    higher = (HISTORY[0], Round(1, 960, 90, 40, 10, {"noise_most": 0.3}), HISTORY[2])
    assert policy.largest_share(HISTORY, 0.2, "estimated") == policy.largest_share(HISTORY[:1], 0.2, "estimated") == 0.2
    assert policy.largest_share(higher, 0.2, "estimated") == 0.3
    assert policy.largest_share(higher, 0.2, 0.1) == 0.1


def test_what_does_not_look_wrong_is_no_candidate_but_of_a_control():
    scores, odds = np.array([3.0, 2.0, 1.0], np.float32), np.array([0.1, 0.0, -1.0])
    assert policy.candidate_scores(scores, odds, 0.0).tolist() == [3.0, -np.inf, -np.inf]
    assert policy.candidate_scores(scores, odds, None).tolist() == scores.tolist() == [3.0, 2.0, 1.0]


def test_a_round_that_only_changed_the_model_is_not_counted():
    relabelled, changed = Round(3, 940, 3, 0, 3, {}), Round(4, 940, 0, 0, 0, {}, ended="nothing left")
    assert policy.rounds_that_acted((*HISTORY, relabelled, changed)) == 3
    assert policy.rounds_that_acted(HISTORY[:1]) == 0


def test_a_round_takes_a_share_of_the_live_samples_but_always_one():
    assert policy.in_one_round(940, 0.05) == 47
    assert policy.in_one_round(3, 0.05) == 1


def test_every_class_keeps_its_share_of_all_its_samples():
    live, samples = np.array([100, 11, 10, 5, 0]), np.array([100, 101, 100, 100, 10])
    assert policy.caps(live, samples, 0.1).tolist() == [90, 0, 0, 0, 0]
    # without a floor one stays of each that has any
    assert policy.caps(live, samples, 0.0).tolist() == np.maximum(live - (samples > 0), 0).tolist()


@pytest.mark.parametrize(
    ("scope", "rounds", "due"),
    [
        ("head", 0, True),
        ("head", 3, False),
        ("network", 0, False),
        ("network", 3, False),
        ("both", 0, True),
        ("both", 3, True),
    ],
)
def test_when_a_boundary_may_become_the_head(scope: policy.Scope, rounds: int, due: bool):
    assert policy.boundary_may_become_head(scope, rounds) == due


def test_with_both_the_boundary_is_taken_unless_the_accuracy_falls():
    assert policy.boundary_becomes_head("both", 1, 0.8, 0.8, 500)
    assert not policy.boundary_becomes_head("both", 1, 0.8, 0.798, 500)


@pytest.mark.parametrize(("last", "taken_back"), [(0.85, False), (0.842, False), (0.83, True), (0.95, False)])
def test_the_first_model_is_taken_back_only_if_it_is_clearly_better(last: float, taken_back: bool):
    # two standard errors of a difference, around 0.84 of 500: 2 sqrt(2) sqrt(0.84 * 0.16 / 500) = 0.046
    assert policy.first_model_stays(0.88, last, 500) == taken_back


@pytest.mark.parametrize("scope", ["head", "both"])
def test_without_a_round_chance_alone_hardly_ever_replaces_the_head(scope: policy.Scope):
    draws = np.random.default_rng(0).binomial(500, 0.8, (20_000, 2)) / 500
    taken = np.mean([policy.boundary_becomes_head(scope, 0, before, after, 500) for before, after in draws])
    # beyond two standard errors on one side: 2.3 % of normal differences
    assert taken == pytest.approx(0.023, abs=0.006)
    assert not policy.boundary_becomes_head(scope, 0, 1.0, 1.0, 500)


@pytest.mark.parametrize(
    ("rounds", "after", "replaced"), [(0, 0.88, False), (0, 0.93, True), (2, 0.86, True), (2, 0.83, False)]
)
def test_probes_replace_a_head_after_rounds_unless_clearly_worse_and_without_one_only_if_clearly_better(
    rounds: int, after: float, replaced: bool
):
    # two standard errors of a difference: 0.041 around 0.88 of 500, 0.046 around 0.84
    assert policy.probes_become_head(rounds, 0.88, after, 500) == replaced
