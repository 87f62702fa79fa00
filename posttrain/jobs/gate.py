"""The gate: whether a newly made model takes the place of the one that serves. Numbers in, a decision out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

Verdict = Literal["promoted", "not promoted", "alarm"]

# shares are quotients of counts: what is equal on paper may differ in the last bit
_ROUNDING = 1e-9


@dataclass(frozen=True)
class HeldOut:
    """What a model makes of the held-out set, by class."""

    samples: tuple[int, ...]
    correct: tuple[int, ...]

    @property
    def accuracy(self) -> float:
        """Of all samples; 0 where there is none."""
        return sum(self.correct) / max(1, sum(self.samples))


@dataclass(frozen=True)
class Arrivals:
    """What the run made of training samples that are new since the last one: those of one file, or of several."""

    samples: int
    candidates: int
    """That looked wrong in the first round."""
    taken: int
    """That were removed or relabelled in the end."""

    @property
    def suspect(self) -> float:
        """The share that looks wrong, by whichever of both is more; 0 where nothing is new."""
        return max(self.candidates, self.taken) / self.samples if self.samples else 0.0


def together(arrivals: Iterable[Arrivals]) -> Arrivals:
    """The samples of several files as those of one."""
    parts = [(part.samples, part.candidates, part.taken) for part in arrivals]
    return Arrivals(*(sum(column) for column in zip(*parts, strict=True))) if parts else Arrivals(0, 0, 0)


@dataclass(frozen=True)
class Decision:
    """What becomes of the challenger, and why, in words and numbers."""

    verdict: Verdict
    reason: str
    alarming: tuple[str, ...] = ()
    """Names of the files whose new samples look wrong."""


def decide(
    champion: HeldOut | None,
    challenger: HeldOut,
    arrivals: Mapping[str, Arrivals],
    older: Arrivals,
    *,
    margin: float,
    class_drop: float,
    class_samples: int,
    alarm_share: float,
    alarm_samples: int,
    alarm_older_share: float,
    classes: Sequence[str],
) -> Decision:
    """First the alarm, then the gate; without a champion there is no gate.

    alarm: more than `alarm_share` of the new samples of a file looks wrong; `arrivals` has them by the file's name.
    Files with fewer than `alarm_samples` are judged together, if they have as many together. Or more than
    `alarm_older_share` of the samples that were there before was taken out. not promoted: the
    accuracy is less than the champion's plus `margin`, or that of a class with at least `class_samples` held-out
    samples is lower by more than `class_drop`. Raises ValueError where the two were not measured on the same samples.
    """
    if alarming := _alarming(arrivals, alarm_share, alarm_samples):
        found = together(arrivals[name] for name in alarming)
        return Decision(
            "alarm",
            f"{100 * found.suspect:.1f} % of the {found.samples:,} new samples of {_listed(alarming)} look wrong "
            f"({found.candidates:,} in the first round, {found.taken:,} were taken out in the end), "
            f"and gate.alarm_share allows {100 * alarm_share:g} %",
            alarming,
        )
    if older.samples >= alarm_samples and older.taken > alarm_older_share * older.samples + _ROUNDING:
        return Decision(
            "alarm",
            f"{older.taken:,} of the {older.samples:,} samples that former runs had let pass were taken out "
            f"({100 * older.suspect:.1f} %), and gate.alarm_older_share allows {100 * alarm_older_share:g} %: has "
            "data.validation changed, or the model?",
        )
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


def _alarming(arrivals: Mapping[str, Arrivals], share: float, samples: int) -> tuple[str, ...]:
    alone = [name for name, found in arrivals.items() if found.samples >= samples]
    # or many small files would never raise an alarm
    small = [name for name, found in arrivals.items() if 0 < found.samples < samples]
    groups = [*([name] for name in alone), small]
    found = ((group, together(arrivals[name] for name in group)) for group in groups)
    return tuple(sorted(name for group, of in found if of.samples >= samples and of.suspect > share for name in group))


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(names[:3])
    return f"{shown} and {len(names) - 3:,} more" if len(names) > 3 else shown
