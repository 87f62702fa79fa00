"""The loop with plain functions for steps: a model is a number, the commits a list."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest

from posttrain.live import Live, NewLabels, Removal, Rows
from posttrain.rounds import (
    REFERENCE,
    FinalScoring,
    Limits,
    Outcome,
    RoundCounts,
    Selected,
    State,
    Steps,
    clean,
    limit_reached,
)
from posttrain.schema import Round

ESTIMATE = "of 50 samples, 5 have another label"
STEPS = ("embed", "fit", "score", "select", "refine", "evaluate", "commit")
NO_LIMIT = Limits(max_rounds=100, minimum=0.0, patience=100)

FakeState = State[int, str]


def start(*accuracies: float, live: int = 100, samples: int = 1000) -> FakeState:
    """A state after a round for each accuracy; the model is the number of the last."""
    rounds = tuple(Round(i, live, 0, 0, 0, {"validation_accuracy": a}) for i, a in enumerate(accuracies))
    return State(rounds, Live(live), len(rounds) - 1, 0, 0, samples)


class DiedError(Exception):
    """What a step dies of in these tests."""


@dataclass
class Fakes:
    """Steps that find `wrong` wrong samples, of which each round takes `budget`, and all rounds `in_all`.

    They are the first rows of partition 0.
    """

    wrong: int = 10
    budget: int = 3
    in_all: int = 1000
    relabels: int = 0
    """Of those acted on in a round, at most this many get another label; the others go."""
    accuracies: Sequence[float] = (0.9,) * 100
    unreadable: int | None = None
    """A row that cannot be embedded."""
    dies_in: tuple[int, str] | None = None
    """(round, step)"""
    calls: list[tuple[Any, ...]] = field(default_factory=list)
    committed: list[tuple[Round, Removal, int]] = field(default_factory=list)
    """What would be on disk: each round, what it acted on, and the model after it."""

    def _called(self, step: str, number: int, *arguments: Any) -> None:
        self.calls.append((step, *arguments))
        if self.dies_in == (number, step):
            raise DiedError(step)

    def steps(self) -> Steps[str, str, str, Selected, int]:
        def embed(state: FakeState) -> tuple[str, Live]:
            self._called("embed", state.number + 1, state.model)
            unreadable = Rows() if self.unreadable is None else Rows.of(0, np.array([self.unreadable]))
            return f"features {state.model}", state.live.quarantine(unreadable)

        def fit(state: FakeState, features: str) -> str:
            self._called("fit", state.number + 1, features)
            return f"probe on {features}"

        def score(state: FakeState, features: str, probe: str) -> str:
            self._called("score", state.number + 1, features, probe)
            return f"scores of {features}"

        def select(state: FakeState, scores: str) -> Selected:
            self._called("select", state.number + 1, scores)
            done = sum(r.removed + r.relabelled for r in state.history)
            left, in_all = self.wrong - done, self.in_all - done
            acted_on = np.arange(done, done + min(left, in_all, self.budget))
            relabelled, removed = acted_on[: self.relabels], acted_on[self.relabels :]
            new = NewLabels.of(0, relabelled, np.ones(len(relabelled)))
            counts = RoundCounts(left, ESTIMATE, in_all == 0)
            return Selected(Removal(Rows.of(0, removed), new), counts, {"noise": left / 100})

        def refine(state: FakeState, features: str, probe: str, selected: Selected, live: Live) -> tuple[int, str]:
            self._called("refine", state.number + 1, features, probe, live)
            return state.model + 1, f"{probe}, again"

        def evaluate(state: FakeState, model: int) -> dict[str, float]:
            self._called("evaluate", state.number + 1, model)
            return {"validation_accuracy": self.accuracies[state.number + 1]}

        def commit(state: FakeState, selected: Selected, done: Round) -> Round:
            self._called("commit", done.number, state.model, selected, done)
            done = replace(done, seconds={"commit": 1.0})
            self.committed.append((done, selected.removal, state.model))
            return done

        return Steps(embed, fit, score, select, refine, evaluate, commit)

    def go_on(self, state: FakeState, limits: Limits = NO_LIMIT) -> Outcome[int, str]:
        """Once more from what is committed."""
        for done, removal, model in self.committed:
            state = replace(state, history=(*state.history, done), live=state.live.without(removal), model=model)
        return clean(state, self.steps(), limits)


def names(calls: list[tuple[Any, ...]]) -> list[str]:
    return [call[0] for call in calls]


def test_a_round_takes_its_steps_in_order_and_hands_each_what_the_earlier_ones_gave():
    fakes = Fakes(relabels=1)
    outcome = clean(start(0.9), fakes.steps(), replace(NO_LIMIT, max_rounds=1))
    removal = Removal(Rows.of(0, np.array([1, 2])), NewLabels.of(0, np.array([0]), np.array([1])))
    selected = Selected(removal, RoundCounts(10, ESTIMATE, False), {"noise": 0.1})
    live = Live(100).without(removal)
    done = Round(1, 98, 10, 2, 1, {"validation_accuracy": 0.9, "noise": 0.1})
    assert fakes.calls == [
        ("embed", 0),
        ("fit", "features 0"),
        ("score", "features 0", "probe on features 0"),
        ("select", "scores of features 0"),
        ("refine", "features 0", "probe on features 0", live),
        ("evaluate", 1),
        ("commit", 1, selected, done),
    ]
    assert outcome.state == replace(
        start(0.9),
        history=(*start(0.9).history, replace(done, seconds={"commit": 1.0})),
        live=live,
        model=1,
        probe="probe on features 0, again",
    )
    assert outcome.final_scoring is None


def test_the_loop_itself_takes_out_what_was_selected():
    fakes = Fakes(relabels=1)
    live = clean(start(0.9), fakes.steps(), replace(NO_LIMIT, max_rounds=3)).state.live
    assert live.rows(0, 12).tolist() == [0, 3, 6, 9, 10, 11] and live.count == 94
    assert live.labels(0, np.arange(10), np.zeros(10)).tolist() == [1, 0, 0, 1, 0, 0, 1, 0, 0, 0]


def test_what_cannot_be_embedded_leaves_the_live_set_and_is_not_counted_as_removed():
    fakes = Fakes(unreadable=50)
    outcome = clean(start(0.9), fakes.steps(), replace(NO_LIMIT, max_rounds=2))
    assert [(r.live, r.removed) for r in outcome.state.history] == [(100, 0), (96, 3), (93, 3)]
    assert len(outcome.state.live.quarantined) == 1


def test_each_round_starts_from_the_model_and_the_samples_that_the_last_one_left():
    fakes = Fakes()
    outcome = clean(start(0.9), fakes.steps(), replace(NO_LIMIT, max_rounds=3))
    assert [call[1] for call in fakes.calls if call[0] == "embed"] == [0, 1, 2]
    assert [(r.number, r.live, r.candidates, r.removed) for r in outcome.state.history] == [
        (0, 100, 0, 0),
        (1, 97, 10, 3),
        (2, 94, 7, 3),
        (3, 91, 4, 3),
    ]
    # what commit returns is what is kept, timings and all
    assert outcome.state.history[1:] == tuple(r for r, _, _ in fakes.committed)
    assert outcome.state.history[1].seconds == {"commit": 1.0}


def test_relabelled_samples_stay_and_are_counted_apart():
    fakes = Fakes(relabels=2)
    outcome = clean(start(0.9), fakes.steps(), NO_LIMIT)
    assert [(r.live, r.candidates, r.removed, r.relabelled) for r in outcome.state.history] == [
        (100, 0, 0, 0),
        (99, 10, 1, 2),
        (98, 7, 1, 2),
        (97, 4, 1, 2),
        (97, 1, 0, 1),  # a round that only relabels is a round
    ]
    assert outcome.state.history[1:] == tuple(r for r, _, _ in fakes.committed)
    assert outcome.state.model == 4
    assert "no longer looks wrong" in outcome.reason


def test_a_run_ends_at_its_last_allowed_round():
    fakes = Fakes(wrong=1000)
    outcome = clean(start(0.9), fakes.steps(), replace(NO_LIMIT, max_rounds=4))
    assert len(fakes.committed) == outcome.state.number == 4
    assert "max_rounds = 4" in outcome.reason


def test_a_run_that_is_at_its_last_allowed_round_already_takes_no_step():
    fakes = Fakes()
    outcome = clean(start(0.9, 0.9), fakes.steps(), replace(NO_LIMIT, max_rounds=1))
    assert fakes.calls == []
    assert outcome.state == start(0.9, 0.9)


@pytest.mark.parametrize(("wrong", "rounds"), [(0, 0), (1, 0), (2, 1), (3, 1)])
def test_a_run_ends_when_fewer_candidates_are_left_than_a_clean_set_gives(wrong: int, rounds: int):
    # 2 % of the 100 live samples: 2 candidates are worth a round, 1 is not
    fakes = Fakes(wrong=wrong)
    outcome = clean(start(0.9), fakes.steps(), replace(NO_LIMIT, minimum=0.02))
    assert len(fakes.committed) == rounds
    assert "no longer looks wrong" in outcome.reason
    assert "refine" not in names(fakes.calls[-5:])


def test_nothing_is_refined_or_committed_where_nothing_may_go():
    fakes = Fakes(wrong=7, budget=0)
    outcome = clean(start(0.9), fakes.steps(), NO_LIMIT)
    assert names(fakes.calls) == ["embed", "fit", "score", "select"]
    assert outcome.state == start(0.9)
    assert "7 samples look wrong" in outcome.reason and "class floors" in outcome.reason
    # what scoring the samples found is handed on: it need not be found again
    assert outcome.final_scoring == FinalScoring("probe on features 0", {"noise": 0.07})


def test_a_run_without_a_sign_of_wrong_labels_leaves_everything_as_it_was():
    fakes = Fakes(wrong=7, in_all=0)
    outcome = clean(start(0.9), fakes.steps(), NO_LIMIT)
    assert names(fakes.calls) == ["embed", "fit", "score", "select"]
    assert outcome.state == start(0.9)
    assert outcome.reason == f"nothing is removed: {ESTIMATE}"


@pytest.mark.parametrize("relabels", [0, 2])
def test_a_run_ends_when_as_many_samples_are_dealt_with_as_may_be_in_all(relabels: int):
    fakes = Fakes(wrong=70, in_all=8, relabels=relabels)
    outcome = clean(start(0.9), fakes.steps(), NO_LIMIT)
    assert [r.removed + r.relabelled for r in outcome.state.history] == [0, 3, 3, 2]
    assert outcome.reason == f"8 samples were removed or relabelled, as many as may be wrong; {ESTIMATE}"


def test_a_run_that_is_exhausted_and_started_again_says_the_same():
    fakes = Fakes(wrong=70, in_all=8, relabels=1)
    first = fakes.go_on(start(0.9))
    # but for the probe, which is fitted again
    assert fakes.go_on(start(0.9)) == replace(first, state=replace(first.state, probe=None))
    assert len(fakes.committed) == 3


def test_a_run_whose_last_round_says_why_none_follows_takes_no_step():
    fakes = Fakes()
    state = start(0.9, 0.9)
    ended = replace(state, history=(state.history[0], replace(state.history[1], ended="nothing looks wrong")))
    assert clean(ended, fakes.steps(), NO_LIMIT) == Outcome(ended, "nothing looks wrong")
    # it was decided before the limits were looked at
    assert clean(ended, fakes.steps(), replace(NO_LIMIT, max_rounds=1)).reason == "nothing looks wrong"
    assert fakes.calls == []


def test_samples_that_may_still_go_but_do_not_look_wrong_are_another_end():
    fakes = Fakes(wrong=3, in_all=100)
    outcome = clean(start(0.9), fakes.steps(), NO_LIMIT)
    assert "no longer looks wrong: 0 of 97" in outcome.reason
    assert "removal.max_share" not in outcome.reason


# best 0.9 of 900 validation samples: two standard errors, with the plus-four estimate, are
# 2 sqrt(0.8982 * 0.1018 / 904) = 0.0201
@pytest.mark.parametrize(
    ("accuracies", "ends"),
    [
        ((0.9, 0.879, 0.879), True),
        ((0.9, 0.881, 0.881), False),  # within two standard errors
        ((0.9, 0.879), False),  # one round is no row
        ((0.9, 0.879, 0.895, 0.879), False),  # not in a row
        ((0.8, 0.9, 0.879, 0.879), True),  # the best may come late
        ((0.879, 0.9), False),  # it got better
        ((0.5, 0.5, 0.5, 0.5), False),  # level is not worse
    ],
)
def test_a_run_ends_after_two_rounds_in_a_row_clearly_below_the_best(accuracies: list[float], ends: bool):
    reason = limit_reached(start(*accuracies, samples=900), replace(NO_LIMIT, patience=2))
    assert (reason is not None) == ends
    if reason is not None:
        assert "0.0201" in reason and "0.9000" in reason and "2 rounds" in reason


def test_rounds_that_put_a_new_head_on_are_judged_from_that_head_on():
    """A network at 0.95 whose new head begins at 0.88: 0.87 is no harm of the removals, 0.8 is."""
    limits = replace(NO_LIMIT, patience=2)

    def ends(*accuracies: float, **of_first: float) -> bool:
        state = start(*accuracies, samples=900)
        first = state.history[0]
        first = replace(first, metrics=first.metrics | of_first)
        return limit_reached(replace(state, history=(first, *state.history[1:])), limits) is not None

    assert ends(0.95, 0.87, 0.87)
    assert not ends(0.95, 0.87, 0.87, **{REFERENCE: 0.88})
    assert ends(0.95, 0.8, 0.8, **{REFERENCE: 0.88})


def test_few_validation_samples_make_the_patience_rule_slower_to_judge():
    falling = (0.9, 0.85, 0.85)
    limits = replace(NO_LIMIT, patience=2)
    assert limit_reached(start(*falling, samples=100), limits) is None
    assert limit_reached(start(*falling, samples=10_000), limits) is not None


def test_the_loop_ends_itself_by_patience():
    fakes = Fakes(wrong=1000, accuracies=(0.9, 0.9, 0.8, 0.8, 0.8, 0.8))
    outcome = clean(start(0.9), fakes.steps(), replace(NO_LIMIT, patience=2))
    assert len(fakes.committed) == 3
    assert "standard errors" in outcome.reason


@pytest.mark.parametrize("step", STEPS)
def test_a_run_interrupted_in_any_step_goes_on_from_its_last_commit_to_the_same_end(step: str):
    whole = Fakes()
    expected = clean(start(0.9), whole.steps(), NO_LIMIT)
    fakes = Fakes(dies_in=(2, step))
    with pytest.raises(DiedError, match=step):
        fakes.go_on(start(0.9))
    assert [r.number for r, _, _ in fakes.committed] == [1]
    fakes.dies_in = None
    outcome = fakes.go_on(start(0.9))
    assert outcome == expected
    assert fakes.committed == whole.committed


def test_a_run_that_has_ended_and_is_started_again_commits_nothing_twice():
    fakes = Fakes()
    first = fakes.go_on(start(0.9))
    again = fakes.go_on(start(0.9))
    assert again == replace(first, state=replace(first.state, probe=None))
    assert [r.number for r, _, _ in fakes.committed] == [1, 2, 3, 4]
    assert sum(r.removed for r, _, _ in fakes.committed) == 10


def test_a_perfect_validation_accuracy_has_a_standard_error_too():
    limits = replace(NO_LIMIT, patience=2)
    assert limit_reached(start(1.0, 0.99, 0.99, samples=100), limits) is None
    assert limit_reached(start(1.0, 0.8, 0.8, samples=100), limits) is not None
