"""How far a run may go: how many samples it acts on, what each class keeps, when the fitted boundary becomes the head.

Numbers in, numbers out: a run on a cluster and one in memory decide by the same rules.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np

from posttrain.schema import Round

Scope = Literal["auto", "head", "network", "both"]
"""`refine.scope`."""


def standard_error(accuracy: float, samples: int) -> float:
    """Of an accuracy measured on so many samples, by the plus-four estimate (Agresti & Coull 1998).

    Unlike the plain one it is above 0 for an accuracy of 0 or 1.
    """
    n = samples + 4
    share = (accuracy * samples + 2) / n
    return math.sqrt(share * (1 - share) / n)


def acted_on(history: Sequence[Round]) -> int:
    """Samples removed or relabelled so far."""
    return sum(done.removed + done.relabelled for done in history)


def changed_features(done: Round) -> bool:
    """Whether the round changed nothing but the network whose features the rounds take, in a run that keeps it else."""
    return done.number > 0 and not done.ended and not acted_on([done])


def of_base(history: Sequence[Round]) -> Sequence[Round]:
    """The rounds since the features last changed; the first of them is the one that changed them, or round 0."""
    first = max((at for at, done in enumerate(history) if changed_features(done)), default=0)
    return history[first:]


def rounds_that_acted(history: Sequence[Round]) -> int:
    """Rounds that removed or relabelled something; one that only changed the model does not count."""
    return sum(done.removed + done.relabelled > 0 for done in history)


def allowance(
    history: Sequence[Round], share: float, *, previously_removed: int = 0, previously_relabelled: int = 0
) -> int:
    """Samples that may still be removed or relabelled, in this and all later rounds, so that they stay below `share`.

    The share is of all samples that were live in round 0 or removed by previous runs of the same job; what these runs
    acted on counts towards it.
    """
    of = history[0].live + previously_removed
    return max(0, int(share * of) - acted_on(history) - previously_removed - previously_relabelled)


def largest_share(history: Sequence[Round], most: float, max_share: float | Literal["estimated"]) -> float:
    """The share of all samples that the rounds together may act on, for `allowance`.

    `most`: the share that may be wrong by this round's estimate. It counts only where `max_share` is `estimated`.
    """
    if max_share != "estimated":
        return max_share
    # the validation labels stay as noisy as they are: a later, lower estimate is chance
    return max([most, *(done.metrics.get("noise_most", 0.0) for done in history)])


def candidate_scores(scores: np.ndarray, mislabel_odds: np.ndarray, min_log_odds: float | None) -> np.ndarray:
    """float32 [n]: the scores, -inf where the label does not look wrong; without `min_log_odds` all may be selected."""
    scores = scores.astype(np.float32)
    if min_log_odds is not None:
        scores[mislabel_odds <= min_log_odds] = -np.inf
    return scores


def in_one_round(live: int, budget: float) -> int:
    """Most samples to act on in one round: a share of the live ones, at least one."""
    return max(1, int(budget * live))


def caps(live: np.ndarray, samples: np.ndarray, class_floor: float) -> np.ndarray:
    """int64 [classes]: how many samples each class may lose, so that it keeps a share of all its samples, or one.

    `live` and `samples` are counts by class, of those that take part and of all.
    """
    floors = np.maximum(np.ceil(class_floor * samples), samples > 0).astype(np.int64)
    return np.maximum(live - floors, 0)


def boundary_may_become_head(scope: Scope, rounds: int) -> bool:
    """Whether the fitted boundary may become the head after the last of so many rounds.

    With `both` always; with `head`, where every round makes it the head, only if there was no round.
    """
    return scope == "both" or (scope == "head" and rounds == 0)


def boundary_becomes_head(scope: Scope, rounds: int, before: float, after: float, samples: int) -> bool:
    """Whether the boundary becomes the head, by the validation accuracies of the model (`before`) and of it (`after`).

    With `both`, after at least one round, unless the accuracy falls: the rounds have changed the network anyway.
    Without a round only if it rises by more than two standard errors of a difference: a network that is not known to be
    worse stays as it is.
    """
    if scope == "both" and rounds:
        return after >= before
    return _exceeds(after, before, samples)


def first_model_stays(first: float, last: float, samples: int) -> bool:
    """Whether the run gives back the model as it came, by its validation accuracy and that of the last model.

    Only if it is higher by more than two standard errors of a difference. What was removed stays removed.
    """
    return _exceeds(first, last, samples)


def probes_become_head(rounds: int, before: float, after: float, samples: int) -> bool:
    """Whether probes become the head of a network that stays as it is, as a run with the scope `head` decides it.

    `before` and `after` are the validation accuracies of the model and of the probes, `rounds` those that removed.
    """
    if rounds:
        return not first_model_stays(before, after, samples)
    return boundary_becomes_head("head", 0, before, after, samples)


def _exceeds(accuracy: float, other: float, samples: int) -> bool:
    return accuracy - other > 2 * math.sqrt(2) * standard_error(other, samples)
