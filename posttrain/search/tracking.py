"""A search in MLflow: a run per trial beneath the search's own, the trial's rounds beneath these."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from posttrain.search.trial import Trial
    from posttrain.store.outbox import Outbox


class SearchTracking:
    """Tells MLflow of the trials; what it was told of once is not told again."""

    def __init__(self, search: Outbox) -> None:
        self.search = search
        self._trials: dict[int, Outbox] = {}
        self._rounds: dict[int, int] = {}
        self._ended: set[int] = set()

    def catch_up(self, trial: Trial) -> None:
        """Tell of all that the trial's folder holds and MLflow does not know yet."""
        history, number = trial.ledger.rounds(), trial.number
        end = trial.ended()
        if not history and not end:
            return
        if number not in self._trials:
            varied = {name: dict(getattr(trial.config, name)) for name in ("probe", "removal", "refine")}
            self._trials[number] = self.search.nested(
                f"trial {number:04d}", params=varied, tags={"posttrain.trial": str(number)}
            )
        told = self._trials[number]
        for done in history[self._rounds.get(number, 0) :]:
            told.log_round(done.number, params={}, metrics=done.figures, figures={}, artifacts=[])
        self._rounds[number] = len(history)
        if end and number not in self._ended:
            self._ended.add(number)
            told.log_tags({"posttrain.ended": f"{end['how']}: {end['why']}"})
            told.finish("FAILED" if end["how"] == "failed" else "FINISHED")


def round_sentence(number: int, figures: Mapping[str, Any], metric: str) -> str:
    """What is said of a round of a trial while the search runs."""
    from posttrain.runs.commit import counts_sentence

    parts = [f"trial {number}, {counts_sentence(figures['round'], figures)}"]
    if metric == "validation_loss":
        parts.append(f"validation loss {figures['validation_loss']:.4f}")
    return ", ".join(parts)
