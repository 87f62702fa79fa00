"""The share of wrong labels, with its interval, and whether the validation labels can tell it at all.

Three sources, in this order of preference:

    validation   how often the label differs from the likeliest class, among the validation samples of which the
                 ensemble is most confident
    live         the same of live samples, where these are clearly worse, as where somebody has corrected the
                 validation labels
    comparison   live against validation samples by their top-2 gaps, where only these show that the live labels are
                 worse, as in a network that has memorised them

Intervals are exact (Clopper & Pearson 1934).
"""

# Tensor.tolist and scipy carry no complete types
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from posttrain.influence.calibration import CalibrationSums

Source = Literal["validation", "live", "comparison"]
Doubt = Literal["few", "sparse", "chance"]
"""Why the labels tell nothing: there are fewer than `MIN_CONFIDENT` validation samples; half of the live samples or
more are of classes with fewer than `MIN_CLASS_SAMPLES`; the ensemble's predictions agree with the validation labels no
more often than by chance."""

CONFIDENT_SHARE = 0.02
MIN_CONFIDENT = 50
MAX_CONFIDENT = 2000
MIN_CLASS_SAMPLES = 5
"""A sample with a wrong label leaves all others of its class to speak for that class; one with a right label is missing
itself. Where there are few, the most confident predictions are those that contradict the label. Measured on well
separated clusters with 20 % of wrong labels: of 3 samples in each of 200 classes, 57 % of the most confident
predictions contradict it."""
CLEAN_RATE = 0.01
"""A share of wrong labels among the most confident samples that a clean set shows, too: up to it, none are found."""
MODEL_ERROR_SHARE = 0.1
"""Up to this share of the ensemble's error rate on all validation samples, disagreement among the most confident ones
is put down to the ensemble."""
TAIL_SHARE = 0.1
"""Validation and live samples are compared by how many top-2 gaps lie in the tail that holds this share of the
validation samples' gaps."""
MIN_TAIL_CONTRAST = 0.2
"""They are compared only where the tail would hold this much more of the samples if all labels were wrong."""
CHANCE_LEVEL = 0.01
"""How often an ensemble that guesses may pass as better than chance: one-sided 99 %."""
CHANCE_QUANTILE = Fraction("2.326")
"""The same in standard errors."""


@dataclass(frozen=True)
class NoiseEstimate:
    """The share of wrong labels among the live samples."""

    rate: float
    """0 where none were found."""
    low: float
    high: float
    """95 % interval."""
    most: float
    """Largest share that may be removed: with 99.9 % confidence no more are wrong. 0 where none were found.

    A wide bound on purpose: each sample is judged by its own odds, and 50 validation samples may show half of the
    wrong labels that they should (measured: 4 of 50 at a rate of 0.2).
    """
    disagreeing: int
    counted: int
    found: bool
    """Whether there are more wrong labels than a clean set shows."""
    source: Source = "validation"
    """See the head of the module. `comparison` tends to be too low (measured: half of the true share)."""
    doubt: Doubt | None = None
    """Why nothing can be estimated: `most` is 0 then, and the rest counts only where the user says how many labels may
    be removed."""


@dataclass(frozen=True)
class NoiseRates:
    """The shares of wrong labels in both sets."""

    live: NoiseEstimate
    validation: float
    excess: float
    """What the comparison of top-2 gaps shows: (live - validation) / (1 - validation). 0 without it."""


def estimate(
    validation: CalibrationSums, live: CalibrationSums, *, known_rate: float = 0.0, is_fixed: bool = False
) -> NoiseRates:
    """The shares of wrong labels among the live and the validation samples.

    `known_rate` is the validation labels' share as a previous round found it. It holds where it `is_fixed`; else it
    serves where this round finds none.
    """
    of_validation, of_live = _count_most_confident(validation), _count_most_confident(live)
    samples = float(validation.count)
    error = float(validation.disagreeing.sum()) / samples if samples else 0.0
    found, live_found = (
        _lower_bound(*counts) > max(CLEAN_RATE, MODEL_ERROR_SHARE * error) for counts in (of_validation, of_live)
    )
    noise = _estimate_of_counts(*of_validation, found=found, source="validation")
    rate = known_rate if is_fixed else noise.rate or known_rate
    # corrected validation labels say nothing of the live ones; memorisation can only hide wrong live labels
    if live_found and (not found or _interval(*of_live)[0] > noise.high):
        noise = _estimate_of_counts(*of_live, found=True, source="live")
    excess, error = compare_top2_gaps(validation, live)
    compared, low, high, most = (
        min(max(rate + (1 - rate) * (excess + z * error), 0.0), 1.0) if excess else 0.0
        for z in (0.0, -1.96, 1.96, 3.09)
    )
    # one-sided 99 %; where the live labels show it themselves, they show it better
    if excess <= 2.326 * error or (noise.source == "live" and low <= noise.high):
        return NoiseRates(noise, rate, 0.0)
    noise = NoiseEstimate(compared, low, high, most, *of_validation, found=True, source="comparison")
    return NoiseRates(noise, rate, excess)


def doubt(validation: CalibrationSums, live: CalibrationSums) -> Doubt | None:
    """Why nothing can be concluded from the labels; None where it can.

    The errors of an ensemble that guesses would be taken for wrong labels. How often its predictions agree with the
    labels by chance is how often they would with the same labels in any other order, whose mean and variance are known
    (Hoeffding 1951). `compare_top2_gaps` does not show that validation labels are worse than live ones: where the
    network has memorised its labels, live ones look better, by up to ten standard errors for a probe on the last layer.
    """
    n = int(validation.count)
    if n < MIN_CONFIDENT:
        return "few"
    if 2 * float(live.labels[live.labels < MIN_CLASS_SAMPLES].sum()) >= float(live.labels.sum()) > 0:
        return "sparse"
    given, predicted = ([int(samples) for samples in c.tolist()] for c in (validation.labels, validation.predicted))
    return "chance" if agrees_by_chance(n - int(validation.disagreeing.sum()), n, given, predicted) else None


def agrees_by_chance(agreeing: int, n: int, given: Sequence[int], predicted: Sequence[int]) -> bool:
    """Whether as many of n > 2 predictions agree with their labels by chance, from the count of each class in both.

    In whole numbers and fractions throughout: where all predictions, or all labels, are of one class, the variance is
    0, the agreement is exactly that of a guess, and a rounding error would pass for more. With g_c labels and p_c
    predictions of class c, S = sum_c g_c p_c, d_cq = n^2 [c = q] - n p_c - n g_q + S, M_k = sum_cq g_c p_q d_cq^k,

        mean = S / n,    variance = M_2 / (n^4 (n - 1)),    third central moment = M_3 / (n^5 (n - 1) (n - 2)).

    The limit is the quantile by Cornish & Fisher (1938), plus half a sample as continuity correction. Without the
    third moment one lucky sample would be enough where few are expected to agree, as of predictions that are nearly all
    of one class. With two classes the distribution itself is known (Fisher's exact test).
    """
    total = sum(g * p for g, p in zip(given, predicted, strict=True))
    by_row, by_column = [total - n * p for p in predicted], [-n * g for g in given]

    def moment(k: int) -> int:
        # over all pairs of classes as if none were equal, then what the equal ones add: linear in the classes
        different = (
            math.comb(k, j)
            * sum(g * u**j for g, u in zip(given, by_row, strict=True))
            * sum(p * v ** (k - j) for p, v in zip(predicted, by_column, strict=True))
            for j in range(k + 1)
        )
        rows = zip(given, predicted, by_row, by_column, strict=True)
        return sum(different) + sum(g * p * ((n * n + u + v) ** k - (u + v) ** k) for g, p, u, v in rows)

    second = moment(2)
    if not second:
        return True
    occurring = [(g, p) for g, p in zip(given, predicted, strict=True) if g + p]
    if len(occurring) == 2:
        from scipy.stats import hypergeom  # pyright: ignore[reportMissingTypeStubs]  takes half a second

        g, p = occurring[0]
        # h samples of the first class agree, and n - g - p + h of the second
        return float(hypergeom.sf((agreeing - n + g + p) // 2 - 1, n, g, p)) > CHANCE_LEVEL
    skewness_term = (CHANCE_QUANTILE**2 - 1) / 6 * Fraction(max(0, moment(3)), n * (n - 2) * second)
    excess = agreeing - Fraction(total, n) - Fraction(1, 2) - skewness_term
    return excess <= 0 or excess**2 * n**4 * (n - 1) <= CHANCE_QUANTILE**2 * second


def compare_top2_gaps(validation: CalibrationSums, live: CalibrationSums) -> tuple[float, float]:
    """(r_l - r_v) / (1 - r_v) for the shares r of wrong live and validation labels, and its standard error.

        (l - v) / (w - v)

    with l, v and w the shares of live samples, of validation samples, and of validation samples under wrong labels
    (`top2_gaps_if_wrong`) whose top-2 gap lies beyond a threshold. (0, infinity) where that is not known.
    """
    n, m = float(validation.count), float(live.count)
    if not (n and m) or not float(validation.top2_gaps_if_wrong.sum()):
        return 0.0, math.inf
    histograms = validation.top2_gaps, live.top2_gaps, validation.top2_gaps_if_wrong
    tails = [histogram.flip(0).cumsum(0).tolist() for histogram in histograms]
    at = bisect.bisect_left(tails[0], TAIL_SHARE * n)
    v, l, w = tails[0][at] / n, tails[1][at] / m, tails[2][at] / n  # noqa: E741
    if w - v < MIN_TAIL_CONTRAST:
        return 0.0, math.inf
    variance = v * (1 - v) / n + l * (1 - l) / m
    return (l - v) / (w - v), math.sqrt(variance) / (w - v)


def _estimate_of_counts(disagreeing: int, counted: int, *, found: bool, source: Source) -> NoiseEstimate:
    low, high = _interval(disagreeing, counted)
    if not found:
        return NoiseEstimate(0.0, 0.0, high, 0.0, disagreeing, counted, False, source)
    most = _upper_bound(disagreeing, counted)
    return NoiseEstimate(disagreeing / counted, low, high, most, disagreeing, counted, True, source)


def _count_most_confident(sums: CalibrationSums) -> tuple[int, int]:
    """(disagreeing, counted) among the most confident samples, over as many as disagree at the same rate.

    Begins with `CONFIDENT_SHARE` and doubles the number, up to half of all samples, as long as the less confident ones
    that are added do not disagree more often, by half a standard error: then it is the labels that are wrong and not
    the ensemble, whose errors become more frequent with less confidence. Bins are taken whole.
    """
    count = int(sums.count)
    start = min(count, max(MIN_CONFIDENT, min(MAX_CONFIDENT, int(CONFIDENT_SHARE * count))))
    if not start:
        return 0, 0
    confident, disagreeing = (part.flip(0).cumsum(0).tolist() for part in (sums.confidences, sums.disagreeing))

    def among(number: int) -> tuple[int, int]:
        last = bisect.bisect_left(confident, number)
        return int(disagreeing[last]), int(confident[last])

    counted = among(start)
    while 2 * counted[1] <= count / 2:
        more = among(2 * counted[1])
        if more[1] > count / 2:
            break
        added = more[1] - counted[1]
        first, second = counted[0] / counted[1], (more[0] - counted[0]) / added
        pooled = more[0] / more[1]
        error = math.sqrt(pooled * (1 - pooled) * (1 / counted[1] + 1 / added))
        if second > first + error / 2:
            break
        counted = more
    return counted


def _lower_bound(disagreeing: int, counted: int) -> float:
    """One-sided 95 % bound from below on a share."""
    from scipy.stats import beta  # pyright: ignore[reportMissingTypeStubs]  takes half a second: not at the top

    return float(beta.ppf(0.05, disagreeing, counted - disagreeing + 1)) if disagreeing else 0.0


def _upper_bound(disagreeing: int, counted: int) -> float:
    """One-sided 99.9 % bound from above on a share."""
    from scipy.stats import beta  # pyright: ignore[reportMissingTypeStubs]

    return float(beta.ppf(0.999, disagreeing + 1, counted - disagreeing)) if disagreeing < counted else 1.0


def _interval(disagreeing: int, counted: int) -> tuple[float, float]:
    """95 % interval of a share."""
    from scipy.stats import beta  # pyright: ignore[reportMissingTypeStubs]

    if not counted:
        return 0.0, 1.0
    low = float(beta.ppf(0.025, disagreeing, counted - disagreeing + 1)) if disagreeing else 0.0
    high = float(beta.ppf(0.975, disagreeing + 1, counted - disagreeing)) if disagreeing < counted else 1.0
    return low, high
