"""The label noise of a run in figures and in a sentence, for the summary and MLflow."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from posttrain.influence.noise_rate import MIN_CLASS_SAMPLES, MIN_CONFIDENT, NoiseEstimate


def noise_metrics(noise: NoiseEstimate) -> dict[str, float]:
    """The estimate of the share of wrong labels as metrics of a round."""
    return {
        "noise_rate": noise.rate,
        "noise_low": noise.low,
        "noise_high": noise.high,
        "noise_found": float(noise.found),
        "noise_known": float(noise.doubt is None),
        "noise_most": noise.most,
        "noise_of_validation": float(noise.source == "validation"),
    }


def noise_summary(rounds: Iterable[Mapping[str, float]]) -> dict[str, float | bool | None] | None:
    """The share of wrong labels in the data as they came, by the metrics of the first round that scored them.

    {rate, low, high, found, known}: its 95 % interval, and whether it is more than a clean set shows. Where the
    validation labels say nothing, `known` is False and the figures are None. None: no round has scored.
    """
    for metrics in rounds:
        if "noise_rate" in metrics:
            found, known = (bool(metrics[f"noise_{name}"]) for name in ("found", "known"))
            figures = {name: metrics[f"noise_{name}"] if known else None for name in ("rate", "low", "high")}
            return {**figures, "found": found and known, "known": known}
    return None


@dataclass(frozen=True)
class Wording:
    """What whoever reads of an estimate knows the samples by, and what can be done where nothing can be estimated."""

    validation: str
    """Of the samples that were counted, as it follows their number."""
    live: str
    comparison: str
    """Which labels are contradicted more often than which."""
    few: str
    """What tells nothing and what helps, where there are too few samples."""
    chance: str
    """Which labels agree with the boundary by chance alone, and what to ask then."""


OF_RUN = Wording(
    "validation samples with the most confident predictions",
    "live samples with the most confident predictions",
    "the live labels are contradicted more often than the validation labels",
    "validation samples tell nothing of the labels; name a larger data.validation, or raise data.validation_share "
    "(better 500 samples)",
    "validation labels no more often than by chance: do they mean the same classes as those of data.train, and has the "
    "model learnt anything?",
)
"""Readers of a run, who have a run file."""

_GIVEN = f"give at least {MIN_CONFIDENT} samples, better 500"

OF_VALIDATION_SET = Wording(
    "validation samples with the most confident predictions",
    "samples with the most confident leave-one-out predictions",
    "the labels are contradicted more often than the validation labels",
    f"validation samples tell nothing of the labels; {_GIVEN}",
    "validation labels no more often than by chance: do they mean the same classes as the training labels, and do the "
    "features tell these apart?",
)
"""Readers in Python, who gave a validation set."""

OUT_OF_FOLD = Wording(
    "samples with the most confident out-of-fold predictions",
    "samples with the most confident leave-one-out predictions",
    "the labels are contradicted more often by leave-one-out than by out-of-fold predictions",
    f"samples tell nothing of their labels; {_GIVEN}",
    "labels no more often than by chance: do the features tell the classes apart?",
)
"""Readers in Python, who gave no validation set."""


def noise_sentence(noise: NoiseEstimate, wording: Wording) -> str:
    """The estimate of the share of wrong labels, as a clause."""
    if noise.doubt == "few":
        return f"fewer than {MIN_CONFIDENT} {wording.few}"
    if noise.doubt == "sparse":
        return (
            f"classes of fewer than {MIN_CLASS_SAMPLES} samples tell nothing of their labels, and at least half of the "
            "samples are of such classes; give more samples of each class"
        )
    if noise.doubt is not None:
        return f"the boundary agrees with the {wording.chance}"
    interval = f"{100 * noise.rate:.0f} %, between {100 * noise.low:.0f} and {100 * noise.high:.0f} %"
    if noise.source == "comparison":
        return f"{wording.comparison} ({interval})"
    of = wording.live if noise.source == "live" else wording.validation
    seen = f"of the {noise.counted} {of}, {noise.disagreeing} have another label"
    return f"{seen} ({interval})" if noise.found else f"{seen}, no more than in a clean set"
