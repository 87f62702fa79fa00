"""Whether a new model, the challenger, takes the place of the champion: first `alarm`, then `compare`. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

Verdict = Literal["promoted", "not promoted", "alarm"]

# shares are quotients of counts: what is equal on paper may differ in the last bit
_ROUNDING = 1e-9


@dataclass(frozen=True)
class ClassCounts:
    """How a model does on the held-out set (test, or else validation), by class."""

    samples: tuple[int, ...]
    correct: tuple[int, ...]

    @property
    def accuracy(self) -> float:
        """Of all samples; 0 where there is none."""
        return sum(self.correct) / max(1, sum(self.samples))


@dataclass(frozen=True)
class BatchCounts:
    """What a run found in a batch of training samples, such as those of a new file."""

    samples: int
    candidates: int
    """That looked wrong in the first round."""
    acted_on: int
    """That were removed or relabelled in the end."""

    @property
    def suspect_share(self) -> float:
        """The share that looks wrong: by the first round or by the end, whichever is more; 0 without samples."""
        return max(self.candidates, self.acted_on) / self.samples if self.samples else 0.0


NO_DATA = BatchCounts(0, 0, 0)


def combined(batches: Iterable[BatchCounts]) -> BatchCounts:
    """Several batches as one."""
    parts = [(batch.samples, batch.candidates, batch.acted_on) for batch in batches]
    return BatchCounts(*(sum(column) for column in zip(*parts, strict=True))) if parts else NO_DATA


@dataclass(frozen=True)
class Decision:
    """What becomes of the challenger, and why, in words and numbers."""

    verdict: Verdict
    reason: str
    alarming: tuple[str, ...] = ()
    """Names of the batches whose new samples look wrong."""


def alarm(
    new_data: Mapping[str, BatchCounts],
    older: BatchCounts,
    *,
    alarm_share: float,
    alarm_samples: int,
    alarm_older_share: float,
) -> Decision | None:
    """An alarm where too much of the new data looks wrong, or too much of the older data was acted on; else None.

    new data: more than `alarm_share` of a batch looks wrong; `new_data` has them by name. Batches with fewer than
    `alarm_samples` count as one, if that has as many. older data: the samples of previous runs; more than
    `alarm_older_share` of them was removed or relabelled.
    """
    if alarming := _alarming(new_data, alarm_share, alarm_samples):
        found = combined(new_data[name] for name in alarming)
        return Decision(
            "alarm",
            f"{100 * found.suspect_share:.1f} % of the {found.samples:,} new samples of {_listed(alarming)} look wrong "
            f"({found.candidates:,} in the first round, {found.acted_on:,} were taken out in the end), "
            f"and gate.alarm_share allows {100 * alarm_share:g} %",
            alarming,
        )
    if older.samples >= alarm_samples and older.acted_on > alarm_older_share * older.samples + _ROUNDING:
        return Decision(
            "alarm",
            f"{older.acted_on:,} of the {older.samples:,} samples that previous runs had kept were taken out "
            f"({100 * older.suspect_share:.1f} %), and gate.alarm_older_share allows {100 * alarm_older_share:g} %: "
            "has data.validation changed, or the model?",
        )
    return None


def compare(
    champion: ClassCounts | None,
    challenger: ClassCounts,
    *,
    margin: float,
    class_drop: float,
    class_samples: int,
    classes: Sequence[str],
) -> Decision:
    """Whether the challenger is promoted; without a champion it always is.

    Not promoted: its accuracy is less than the champion's plus `margin`, or that of a class with at least
    `class_samples` held-out samples is lower by more than `class_drop`. Raises ValueError where the two were not
    measured on the same samples.
    """
    after = f"{100 * challenger.accuracy:.2f} % of {sum(challenger.samples):,} held-out samples right"
    if champion is None:
        return Decision("promoted", f"there was no champion yet; {after}")
    if champion.samples != challenger.samples:
        raise ValueError(f"measured on other samples: {champion.samples} and {challenger.samples} by class")
    before = f"the champion {100 * champion.accuracy:.2f} %"
    if challenger.accuracy < champion.accuracy + margin - _ROUNDING:
        wanted = f", and gate.margin asks for {100 * margin:g} points more" if margin else ""
        return Decision("not promoted", f"{after}, {before}{wanted}")
    losses = [
        ((own - new) / count, name, own, new, count)
        for name, count, own, new in zip(classes, champion.samples, champion.correct, challenger.correct, strict=True)
        if count >= class_samples and (own - new) / count > class_drop + _ROUNDING
    ]
    if losses:
        _, name, own, new, count = max(losses)
        more = f" (and {len(losses) - 1} more)" if len(losses) > 1 else ""
        return Decision(
            "not promoted",
            f"{after}, {before}, but of class {name}{more} {new} of {count} are right where the champion has {own}: "
            f"a loss of {100 * (own - new) / count:.1f} points, and gate.class_drop allows {100 * class_drop:g}",
        )
    return Decision("promoted", f"{after}, {before}")


def _alarming(new_data: Mapping[str, BatchCounts], share: float, samples: int) -> tuple[str, ...]:
    large = [[name] for name, found in new_data.items() if found.samples >= samples]
    # or many small files would never raise an alarm
    small = [name for name, found in new_data.items() if 0 < found.samples < samples]
    groups = [(group, combined(new_data[name] for name in group)) for group in (*large, small)]
    return tuple(
        sorted(name for group, of in groups if of.samples >= samples and of.suspect_share > share for name in group)
    )


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(names[:3])
    return f"{shown} and {len(names) - 3:,} more" if len(names) > 3 else shown
