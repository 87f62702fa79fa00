"""The loop with plain functions for steps: a model is a number, the commits a list."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from posttrain.rounds import REFERENCE, Cut, Limits, Outcome, State, Steps, clean, limit_reached
from posttrain.schema import Round

ESTIMATE = "of 50 samples, 5 have another label"
STEPS = ("embed", "fit", "score", "select", "count", "refine", "evaluate", "commit")
NO_LIMIT = Limits(max_rounds=100, minimum=0.0, patience=100)


def start(*accuracies: float, live: int = 100, samples: int = 1000) -> State[int]:
    """A state after a round for each accuracy; the model is the number of the last."""
    rounds = tuple(Round(i, live, 0, 0, 0, {"validation_accuracy": a}) for i, a in enumerate(accuracies))
    return State(rounds, len(rounds) - 1, samples)


class DiedError(Exception):
    """What a step dies of in these tests."""


@dataclass
class Fakes:
    """Steps that find `wrong` wrong samples, of which each round takes `budget`, and all rounds `in_all`."""

    wrong: int = 10
    budget: int = 3
    in_all: int = 1000
    relabels: int = 0
    """Of those taken in a round, at most this many get another label; the others go."""
    accuracies: Sequence[float] = (0.9,) * 100
    dies_in: tuple[int, str] | None = None
    """(round, step)"""
    calls: list[tuple[Any, ...]] = field(default_factory=list)
    committed: list[tuple[Round, int]] = field(default_factory=list)
    """What would be on disk: each round, and the model after it."""

    def _called(self, step: str, number: int, *arguments: Any) -> None:
        self.calls.append((step, *arguments))
        if self.dies_in == (number, step):
            raise DiedError(step)

    def steps(self) -> Steps[str, str, str, Cut, int]:
        done = sum(r.removed + r.relabelled for r, _ in self.committed)
        left = {"wrong": self.wrong - done, "in_all": self.in_all - done}

        def embed(state: State[int]) -> str:
            self._called("embed", state.number + 1, state.model)
            return f"features {state.model}"

        def fit(state: State[int], features: str) -> str:
            self._called("fit", state.number + 1, features)
            return f"probe on {features}"

        def score(state: State[int], features: str, probe: str) -> str:
            self._called("score", state.number + 1, features, probe)
            return f"scores of {features}"

        def select(state: State[int], scores: str) -> Cut:
            self._called("select", state.number + 1, scores)
            taken = min(left["wrong"], left["in_all"], self.budget)
            relabelled = min(taken, self.relabels)
            exhausted = left["in_all"] == 0
            return Cut(state.live, left["wrong"], taken - relabelled, relabelled, ESTIMATE, exhausted)

        def count(removal: Cut) -> Cut:
            self.calls.append(("count", removal))
            return removal

        def refine(state: State[int], features: str, removal: Cut, probe: str) -> int:
            self._called("refine", state.number + 1, features, removal, probe)
            return state.model + 1

        def evaluate(state: State[int], model: int) -> dict[str, float]:
            self._called("evaluate", state.number + 1, model)
            return {"validation_accuracy": self.accuracies[state.number + 1]}

        def commit(state: State[int], removal: Cut, model: int, done: Round) -> Round:
            self._called("commit", state.number + 1, removal, model, done)
            for what in left:
                left[what] -= removal.taken
            done = replace(done, seconds={"commit": 1.0})
            self.committed.append((done, model))
            return done

        return Steps(embed, fit, score, select, count, refine, evaluate, commit)

    def go_on(self, state: State[int], limits: Limits = NO_LIMIT) -> Outcome[int]:
        """Once more from what is committed."""
        if self.committed:
            rounds = tuple(r for r, _ in self.committed)
            state = State((*state.history, *rounds), self.committed[-1][1], state.validation_samples)
        return clean(state, self.steps(), limits)


def names(calls: list[tuple[Any, ...]]) -> list[str]:
    return [call[0] for call in calls]


def test_a_round_takes_its_steps_in_order_and_hands_each_what_the_earlier_ones_gave():
    fakes = Fakes()
    outcome = clean(start(0.9), fakes.steps(), replace(NO_LIMIT, max_rounds=1))
    cut = Cut(100, 10, 3, 0, ESTIMATE, False)
    done = Round(1, 97, 10, 3, 0, {"validation_accuracy": 0.9})
    assert fakes.calls == [
        ("embed", 0),
        ("fit", "features 0"),
        ("score", "features 0", "probe on features 0"),
        ("select", "scores of features 0"),
        ("count", cut),
        ("refine", "features 0", cut, "probe on features 0"),
        ("evaluate", 1),
        ("commit", cut, 1, done),
    ]
    assert outcome.state.model == 1


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
    assert outcome.state.history[1:] == tuple(r for r, _ in fakes.committed)
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
    assert outcome.state.history[1:] == tuple(r for r, _ in fakes.committed)
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
    assert names(fakes.calls) == ["embed", "fit", "score", "select", "count"]
    assert outcome.state == start(0.9)
    assert "7 samples look wrong" in outcome.reason and "class floors" in outcome.reason


def test_a_run_without_a_sign_of_wrong_labels_leaves_everything_as_it_was():
    fakes = Fakes(wrong=7, in_all=0)
    outcome = clean(start(0.9), fakes.steps(), NO_LIMIT)
    assert names(fakes.calls) == ["embed", "fit", "score", "select", "count"]
    assert outcome.state == start(0.9)
    assert outcome.reason == f"no sample goes: {ESTIMATE}"


@pytest.mark.parametrize("relabels", [0, 2])
def test_a_run_ends_when_as_many_samples_are_dealt_with_as_may_be_in_all(relabels: int):
    fakes = Fakes(wrong=70, in_all=8, relabels=relabels)
    outcome = clean(start(0.9), fakes.steps(), NO_LIMIT)
    assert [r.removed + r.relabelled for r in outcome.state.history] == [0, 3, 3, 2]
    assert outcome.reason == f"8 samples are dealt with, as many as may be wrong; {ESTIMATE}"


def test_a_run_that_is_exhausted_and_started_again_says_the_same():
    fakes = Fakes(wrong=70, in_all=8, relabels=1)
    first = fakes.go_on(start(0.9))
    assert fakes.go_on(start(0.9)) == first
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


@pytest.mark.parametrize("step", [step for step in STEPS if step != "count"])
def test_a_run_interrupted_in_any_step_goes_on_from_its_last_commit_to_the_same_end(step: str):
    whole = Fakes()
    expected = clean(start(0.9), whole.steps(), NO_LIMIT)
    fakes = Fakes(dies_in=(2, step))
    with pytest.raises(DiedError, match=step):
        fakes.go_on(start(0.9))
    assert [r.number for r, _ in fakes.committed] == [1]
    fakes.dies_in = None
    outcome = fakes.go_on(start(0.9))
    assert outcome == expected
    assert fakes.committed == whole.committed


def test_a_run_that_has_ended_and_is_started_again_commits_nothing_twice():
    fakes = Fakes()
    first = fakes.go_on(start(0.9))
    again = fakes.go_on(start(0.9))
    assert again == first
    assert [r.number for r, _ in fakes.committed] == [1, 2, 3, 4]
    assert sum(r.removed for r, _ in fakes.committed) == 10


def test_a_perfect_validation_accuracy_has_a_standard_error_too():
    limits = replace(NO_LIMIT, patience=2)
    assert limit_reached(start(1.0, 0.99, 0.99, samples=100), limits) is None
    assert limit_reached(start(1.0, 0.8, 0.8, samples=100), limits) is not None
