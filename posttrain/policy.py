"""What a run allows itself: how many samples go, what each class keeps, when a new boundary becomes the head.

Numbers in, numbers out: a run on a cluster and the benchmarks in memory decide by the same rules.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np

from posttrain.schema import Round

Scope = Literal["head", "network", "both"]
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


def allowance(history: Sequence[Round], share: float, *, removed_before: int = 0, relabelled_before: int = 0) -> int:
    """Samples that may still be dealt with, in this and all later rounds: `share` is of those live in round 0.

    What former runs of the same job dealt with counts along: relabelled samples are live, removed ones are not.
    """
    of = history[0].live + removed_before
    return max(0, int(share * of) - acted_on(history) - removed_before - relabelled_before)


def in_one_round(live: int, budget: float) -> int:
    """Most samples to deal with in one round: a share of the live ones, at least one."""
    return max(1, int(budget * live))


def caps(live: np.ndarray, samples: np.ndarray, class_floor: float) -> np.ndarray:
    """int64 [classes]: how many samples each class may lose, so that it keeps a share of all its samples, or one.

    `live` and `samples` are counts by class, of those that take part and of all.
    """
    floors = np.maximum(np.ceil(class_floor * samples), samples > 0).astype(np.int64)
    return np.maximum(live - floors, 0)


def boundary_is_due(scope: Scope, rounds: int) -> bool:
    """Whether the boundary may become the head after the last of so many rounds.

    Of `both` always; of `head`, which has drawn it in every round, where there was none.
    """
    return scope == "both" or (scope == "head" and rounds == 0)


def boundary_is_taken(scope: Scope, rounds: int, before: float, after: float, samples: int) -> bool:
    """Whether the boundary becomes the head, by the validation accuracies `before` (the model's) and `after`.

    Of `both`, after any round, unless the accuracy falls: its network has been trained on, and is another one anyway.
    Without a round only if it rises by more than two standard errors of a difference: a network that is not known to
    be worse stays.
    """
    if scope == "both" and rounds:
        return after >= before
    return _exceeds(after, before, samples)


def first_is_taken_back(first: float, last: float, samples: int) -> bool:
    """Whether the model as it came is handed back, by its validation accuracy and that of what became of it.

    Only if it is higher by more than two standard errors of a difference: what was removed stays removed.
    """
    return _exceeds(first, last, samples)


def _exceeds(accuracy: float, other: float, samples: int) -> bool:
    return accuracy - other > 2 * math.sqrt(2) * standard_error(other, samples)
