"""How far the probes' leave-one-out word can be taken: calibration, share of wrong labels, which are likely wrong.

Everything is estimated from sums over the held-out samples (which the network has not seen, and whose labels are as
noisy as the rest, or better) and over the live samples (leave-one-out). No clean label is used. Notation: z_i are
logits, for live samples leave-one-out ones; y_i the given label; t, b and the noise rate are what is estimated here.
T, the noise transition matrix, is that of `transition`, whose rate is the one estimated here.

    t   inverse temperature: softmax(t z) has the lowest cross-entropy on the held-out labels
    b   memorisation: what the given label's logit of a live sample is too high, because the network's features
        have seen that label. With it the live samples' labels are as probable on average as the held-out ones
"""

# torch.linalg, Tensor.norm and Tensor.split carry no complete types
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from posttrain.influence import noise_matrix

Source = Literal["held-out", "live", "comparison"]
Doubt = Literal["few", "chance"]
"""Why the held-out labels say nothing: they are fewer than the surest that would be looked at; the boundary agrees with
them no more often than by chance."""

_OFFSETS = 257
_LARGEST_OFFSET = 16.0
_SHIFTS = 65
_LARGEST_SHIFT = 4.0
_BINS = 4096
_DEEPEST = 16.0
"""Confidences are binned by -log(1 - confidence), up to this: e^-16 is what float32 can still tell from 1."""

CONFIDENT_SHARE = 0.02
LEAST_CONFIDENT = 50
MOST_CONFIDENT = 2000
CLEAN = 0.01
"""Wrong labels among the most confident up to this share are what a clean set shows, too."""
COMPARED = 0.1
"""Held-out and live samples are compared by how many lie in the tail that holds this share of the held-out ones."""
TOLD_APART = 0.2
"""Only where wrong labels would lie in that tail more often by this much."""
GUESSES = 0.01
"""How often a boundary that only guesses may pass for one that does not: one-sided 99 %."""
BEYOND_CHANCE = Fraction("2.326")
"""The same in standard errors."""
MISTAKEN = 0.1
"""Up to this share of the boundary's overall held-out error, its own errors are found among the most confident."""


@dataclass(frozen=True)
class CalibrationSums:
    """Sums over samples, which may be added over blocks."""

    count: Tensor
    support: Float[Tensor, " offsets"]
    """Sum of the given label's probability, for each offset b of the grid."""
    votes: Float[Tensor, "classes classes"]
    """Those of `transition`, with q for p."""
    confident: Float[Tensor, " bins"]
    """Samples by the confidence of their likeliest class."""
    disagreeing: Float[Tensor, " bins"]
    """Of these, the ones with another label."""
    rivals: Float[Tensor, " bins"]
    """Samples by the distance, in t z, between the two likeliest classes other than the given label: it is large where
    the label is wrong, since then the right class is one of them, and memory of the given label has no part in it."""
    strangers: Float[Tensor, " bins"]
    """The same had each sample been given one of the other labels, all equally likely: what wrong labels look like."""
    labels: Float[Tensor, " classes"]
    """Samples by the label they were given."""
    predicted: Float[Tensor, " classes"]
    """Samples by their likeliest class."""

    def sums(self) -> tuple[Tensor, ...]:
        confident = self.confident, self.disagreeing, self.rivals, self.strangers
        return self.count, self.support, self.votes, *confident, self.labels, self.predicted


@dataclass(frozen=True)
class NoiseEstimate:
    """Share of wrong labels among the live samples."""

    rate: float
    """0 where none were found."""
    low: float
    high: float
    """95 % interval."""
    most: float
    """Largest share that may be removed: with 99.9 % confidence no more are wrong. 0 where none were found.

    A wide bound on purpose: what goes is decided sample by sample, and 50 held-out samples can carry half of the
    wrong labels that they should (measured: 4 of 50 at a rate of 0.2).
    """
    disagreeing: int
    counted: int
    found: bool
    """Whether there are more wrong labels than a clean set shows."""
    source: Source = "held-out"
    """`held-out`: the share of other labels among the held-out samples of which the probes are most confident, with
    the exact interval (Clopper & Pearson 1934). `live`: the same of live samples, where these are clearly worse, as
    where somebody has looked through the held-out labels. `comparison`: held-out and live samples by their `rivals`,
    where these alone tell that the live ones are worse, as in a network that has memorised their labels; it tends to
    be too low then (measured: half of the true share)."""
    doubt: Doubt | None = None
    """Why the estimate is none: then `most` is 0, and it counts only where the user says how many may be removed."""


@dataclass(frozen=True)
class Prior:
    """What a former round found out about the labels as they came; the first one that found any wrong.

    How many are wrong, and which way they went, is of the data and not of the boundary. A later round sees what is
    left, by a boundary that follows from what was removed.
    """

    votes: Float[Tensor, "classes classes"] | None = None
    """Its `NoiseModel.votes`; None before any round found wrong labels."""
    live_rate: float | None = None
    """Its `NoiseModel.live_rate`, which holds; None where it has to be estimated anew, as from live samples alone."""
    held_out_rate: float = 0.0
    """Its `NoiseModel.held_out_rate`. Where `live_rate` is known this one holds, too; else it serves where the few held-out
    samples that a round is surest of show no wrong labels: these labels stay what they are."""

    def joined(self, votes: Float[Tensor, "classes classes"], count: float) -> Float[Tensor, "classes classes"]:
        """`NoiseModel.votes` where so many live samples have these votes: half what they say, half what the prior does.

        Of what is left alone, a direction fades as the labels that went it are removed. Held as it was, it goes on
        being looked for where it is used up. Measured after four rounds of 10 % on 16 networks with pair flips and
        instance-dependent noise of 40 % (Fashion-MNIST and CIFAR-10N, two seeds), mean test accuracy: 62.7 by what is
        left, 63.4 by the first round, 63.7 by half of each.
        """
        total, number = float(votes.sum()), count if self.votes is None else float(self.votes.sum())
        own = votes * (number / total) if total else votes
        return own if self.votes is None else (self.votes.to(own) + own) / 2


UNKNOWN = Prior()


@dataclass(frozen=True)
class NoiseModel:
    """What was estimated."""

    temperature: float
    """t."""
    offset: float
    """b, at least 0."""
    noise: NoiseEstimate
    held_out_rate: float
    """Share of wrong labels among the held-out samples, on which the logits are calibrated."""
    live_rate: float
    """Share of wrong labels among the live samples before any was removed: how likely any one of them was wrong. As
    they are removed it would fall, and the last of them would no longer look wrong."""
    left: float
    """Share of wrong labels among the samples that are live now, as it should be by the same count."""
    transition: Float[Tensor, "classes classes"]
    """T of the live samples, at `live_rate`."""
    held_out_transition: Float[Tensor, "classes classes"]
    """T of the held-out samples: noise of the same directions, at their rate. The unit matrix where they have none."""
    votes: Float[Tensor, "classes classes"]
    """V, from which both are estimated; scaled, so that its sum is the number of samples. 0 where nothing was found."""
    sharpness: float = 1.0
    """How much surer of a sample's class one can be than p is: with it T^T p foretells the held-out labels best."""
    shift: float = 0.0
    """What the log odds of a wrong label are raised by, so that on average as many are wrong as `left` says: probes
    that are not sure of a class are not sure that a label is wrong either. Measured on the first rounds of 61
    networks, means over ten kinds of noise: 76 % of the wrong labels have odds above 0, without a shift 69 %; of the
    labels with such odds 81 and 85 % are wrong; Brier score 0.0957 and 0.0967."""

    @property
    def prior(self) -> Prior:
        """What later rounds go on from, where this is the first that found wrong labels.

        The rates hold where they are those of the held-out labels, of which no round removes any. Measured on digits
        with a fifth of the labels wrong, three seeds, four rounds of 10 %: of what goes 99, 95 and 97 % is wrong, and
        92, 95 and 92 % where they are estimated anew in each round.
        """
        if not (self.noise.found or self.held_out_rate):
            return UNKNOWN
        return Prior(self.votes, self.live_rate if self.noise.source == "held-out" else None, self.held_out_rate)

    def with_votes(self, votes: Tensor) -> NoiseModel:
        """The same with T estimated from these votes, in samples."""
        return replace(
            self,
            transition=noise_matrix.estimate(votes, self.live_rate),
            held_out_transition=noise_matrix.estimate(votes, self.held_out_rate),
            votes=votes,
        )

    def probabilities(
        self, logits: Float[Tensor, "batch classes"], labels: Int[Tensor, " batch"]
    ) -> Float[Tensor, "batch classes"]:
        """q: what label a sample like this would be given, softmax(t z - b at the given label).

        Calibrated on the held-out labels.
        """
        scaled = self.temperature * logits
        return scaled.scatter_add(1, labels[:, None], scaled.new_full((len(labels), 1), -self.offset)).softmax(dim=1)

    def judge(self, logits: Float[Tensor, "batch classes"], labels: Int[Tensor, " batch"]) -> Posterior:
        """What is to be said of samples with these logits, which were given these labels."""
        q = self.probabilities(logits.double(), labels)
        p = noise_matrix.noise_corrected(q, self.held_out_transition) if self.held_out_rate else q
        log_p = noise_matrix.log_sharpened(p, self.sharpness)
        joint = noise_matrix.joint_log(log_p, labels, self.transition)
        joint = joint.scatter_add(1, labels[:, None], joint.new_full((len(labels), 1), -self.shift))
        return Posterior(log_p, joint, labels)


@dataclass(frozen=True)
class Posterior:
    """What an noise_model says of samples with given labels y."""

    log_p: Float[Tensor, "batch classes"]
    joint: Float[Tensor, "batch classes"]
    """log (p_c T[c, y]), less the shift at c = y."""
    labels: Int[Tensor, " batch"]

    @property
    def class_probabilities(self) -> Float[Tensor, "batch classes"]:
        """p: which class a sample like this belongs to, q with the noise of the held-out labels taken out."""
        return self.log_p.exp()

    @property
    def posterior(self) -> Float[Tensor, "batch classes"]:
        """Which class this sample belongs to, given that it was labelled y: exp(joint), scaled to sum 1."""
        return self.joint.softmax(dim=1)

    @property
    def mislabel_odds(self) -> Float[Tensor, " batch"]:
        """Log odds that the given label is wrong: log sum_{c != y} p_c T[c, y] - log p_y T[y, y] + shift."""
        return log_odds_of_others(self.joint, self.labels)


@dataclass(frozen=True)
class PosteriorSums:
    """Sums over live samples by the word of an noise_model, which may be added over blocks."""

    count: Tensor
    votes: Float[Tensor, "classes classes"]
    """Those of `transition`."""
    expected: Float[Tensor, " shifts"]
    """Expected number of wrong labels, for each shift of the grid on top of the noise_model's own."""


def posterior_sums(
    noise_model: NoiseModel, logits: Float[Tensor, "batch classes"], labels: Int[Tensor, " batch"]
) -> tuple[Tensor, Tensor, Tensor]:
    """The sums of a `PosteriorSums` over a batch."""
    judged = noise_model.judge(logits, labels)
    votes = noise_matrix.votes(judged.class_probabilities, labels)
    expected = torch.sigmoid(judged.mislabel_odds[:, None] + _shifts().to(votes)).sum(dim=0)
    return torch.tensor(float(len(labels)), dtype=torch.float64, device=votes.device), votes, expected


def shifted(noise_model: NoiseModel, posterior_sums: PosteriorSums) -> NoiseModel:
    """The noise_model whose odds come to `left` on average; as it is where they come to more."""
    wanted = noise_model.left * float(posterior_sums.count)
    shift = _crossing(_shifts().tolist(), posterior_sums.expected.tolist(), wanted)
    return replace(noise_model, shift=noise_model.shift + shift)


def log_odds_of_others(
    logits: Float[Tensor, "batch classes"], labels: Int[Tensor, " batch"]
) -> Float[Tensor, " batch"]:
    """log sum_{c != y} exp z_c - z_y: the log odds, under the softmax, that it is not the given label."""
    given = labels[:, None]
    return logits.scatter(1, given, -torch.inf).logsumexp(dim=1) - logits.gather(1, given)[:, 0]


def calibration_sums(
    logits: Float[Tensor, "batch classes"], labels: Int[Tensor, " batch"], temperature: float
) -> tuple[Tensor, ...]:
    """The sums of a `CalibrationSums` over a batch."""
    scaled = temperature * logits.double()
    p = scaled.softmax(dim=1)
    # sigmoid(u - b) is the given label's probability after its logit was lowered by b
    u = -log_odds_of_others(scaled, labels)
    support = torch.sigmoid(u[:, None] - _offsets().to(u)).sum(dim=0)
    confidence, likeliest = p.max(dim=1)
    depth = -torch.log1p(-confidence.clamp_max(1 - math.exp(-_DEEPEST)))
    bins = (depth * (_BINS / _DEEPEST)).long().clamp_max(_BINS - 1)
    confident = torch.bincount(bins, minlength=_BINS).double()
    disagreeing = torch.bincount(bins[likeliest != labels], minlength=_BINS).double()
    count = torch.tensor(float(len(labels)), dtype=torch.float64, device=p.device)
    by_class = [torch.bincount(of, minlength=p.shape[1]).double() for of in (labels, likeliest)]
    distances = _distances(scaled, labels)
    return count, support, noise_matrix.votes(p, labels), confident, disagreeing, *distances, *by_class


def calibration_sums_of_block(
    features: Tensor, labels: Tensor, weights: Tensor, temperature: Tensor
) -> tuple[Tensor, ...]:
    """`calibration_sums` of a block of features under a linear head [classes, d]; `temperature` is a number in a tensor."""
    return calibration_sums(features @ weights.to(features).T, labels, float(temperature))


def temperature_moments(
    features: Tensor, labels: Tensor, weights: Tensor, temperature: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Sums over a block of: 1, and the first and second derivative of the cross-entropy by t."""
    logits = (features @ weights.to(features).T).double()
    p = (temperature.to(logits) * logits).softmax(dim=1)
    mean = (p * logits).sum(dim=1)
    slope = mean - logits.gather(1, labels[:, None])[:, 0]
    curve = (p * (logits - mean[:, None]).square()).sum(dim=1)
    return torch.tensor(float(len(labels)), dtype=torch.float64), slope.sum(), curve.sum()


def fitted_temperature(moments: Callable[[Tensor], tuple[Tensor, ...]], *, steps: int = 50) -> float:
    """The t > 0 with the lowest cross-entropy (convex in t), within 1/20 and 20.

    `moments(t)` are the sums of `temperature_moments`. Newton steps, each at most by a factor of 2.
    """
    t = 1.0
    for _ in range(steps):
        _, slope, curve = (float(part) for part in moments(torch.tensor(t, dtype=torch.float64)))
        wanted = t - slope / curve if curve > 0 else (20.0 if slope < 0 else 0.05)
        following = min(max(wanted, t / 2, 0.05), 2 * t, 20.0)
        if abs(following - t) <= 1e-5 * t:
            return following
        t = following
    return t


def estimate(
    held_out: CalibrationSums,
    live: CalibrationSums,
    temperature: float,
    *,
    removed: int = 0,
    removed_support: float = 0.0,
    prior: Prior = UNKNOWN,
) -> NoiseModel:
    """The estimates from both surveys, which were made at this temperature.

    `removed`: samples that were live and have been taken out as wrong, and the sum of their labels' probabilities
    when they were. They count along: without them the live labels would be the better ones, and b would take
    that for memory.

    `prior`: what a former round found.
    """
    noise, shown, more = _noise(held_out, live, prior)
    if prior.votes is None and (doubt := _doubt(held_out)) is not None:
        noise = replace(noise, most=0.0, doubt=doubt)
    wanted, classes = float(held_out.support[0] / held_out.count), len(live.votes)
    if not shown or noise.source == "comparison":
        # live and removed labels together are wrong this much more often than the held-out ones
        count = float(live.count)
        wrong = ((shown + (1 - shown) * more) * count + removed) / (count + removed) if count + removed else 0.0
        beyond = max(0.0, (wrong - shown) / (1 - shown)) if shown < 1 else 0.0
        wanted = (1 - beyond) * wanted + beyond * (1 - wanted) / max(1, classes - 1)
    count, all_of_them = float(live.count), float(live.count) + removed
    before = prior.live_rate
    if before is None:
        # where none were found, as many may be wrong as a clean set shows
        before = max(noise.rate, prior.held_out_rate, CLEAN)
        if noise.source != "held-out" and noise.found:
            before = (before * count + removed) / all_of_them
    left = max(0.0, before * all_of_them - removed) / count if count else 0.0
    unit = torch.eye(classes, dtype=torch.float64)
    offset = _offset(live, wanted, removed, removed_support)
    votes = prior.joined(live.votes, count)
    if not (noise.found or shown) and prior.votes is None:
        # without noise there is no direction to it: that some classes are taken for others more often than the other
        # way round would fill the small rate. Measured on human labels in which none were found (CIFAR-10N, random1,
        # augmented, two seeds): average precision 0.51 with directions, 0.58 without
        votes = torch.zeros_like(votes)
    return NoiseModel(temperature, offset, noise, shown, before, left, unit, unit, votes).with_votes(votes)


def _doubt(held_out: CalibrationSums) -> Doubt | None:
    """Why nothing is to be concluded from these labels; None where it may be.

    Of a boundary that only guesses, its own errors would be taken for wrong labels. By chance is how often the same
    predictions would agree with the same labels in any other order, of which mean and variance are known (Hoeffding
    1951). That held-out labels are worse than live ones, `_compared` does not tell: by a network that has memorised
    its labels live ones look better, by up to ten standard errors where the last layer draws the boundary.
    """
    n = int(held_out.count)
    if n < LEAST_CONFIDENT:
        return "few"
    given, predicted = ([int(samples) for samples in of.tolist()] for of in (held_out.labels, held_out.predicted))
    return "chance" if _agree_by_chance(n - int(held_out.disagreeing.sum()), n, given, predicted) else None


def _agree_by_chance(agreeing: int, n: int, given: Sequence[int], predicted: Sequence[int]) -> bool:
    """Whether so many of n > 2 samples agree by chance, with so many labels and predictions of each class.

    In whole numbers and fractions throughout: where all predictions, or all labels, are of one class, the variance is
    0, the agreement exactly that of a guess, and a difference by rounding would pass for more. With S = sum_c g_c p_c,
    d_cq = n^2 [c = q] - n p_c - n g_q + S, and M_k = sum_cq g_c p_q d_cq^k,

        mean = S / n,    variance = M_2 / (n^4 (n - 1)),    third central moment = M_3 / (n^5 (n - 1) (n - 2)).

    The limit is the quantile by Cornish & Fisher (1938), half a sample further since counts are whole: where few are to
    be expected, as of predictions that are nearly all of one class, one lucky sample would else be enough. Of two
    classes the distribution itself is known (Fisher's exact test).
    """
    total = sum(g * p for g, p in zip(given, predicted, strict=True))
    by_row, by_column = [total - n * p for p in predicted], [-n * g for g in given]

    def moment(k: int) -> int:
        # over all pairs of classes as if none were equal, and what the equal ones add: linear in the classes
        apart = (
            math.comb(k, j)
            * sum(g * u**j for g, u in zip(given, by_row, strict=True))
            * sum(p * v ** (k - j) for p, v in zip(predicted, by_column, strict=True))
            for j in range(k + 1)
        )
        rows = zip(given, predicted, by_row, by_column, strict=True)
        return sum(apart) + sum(g * p * ((n * n + u + v) ** k - (u + v) ** k) for g, p, u, v in rows)

    second = moment(2)
    if not second:
        return True
    occurring = [(g, p) for g, p in zip(given, predicted, strict=True) if g + p]
    if len(occurring) == 2:
        from scipy.stats import hypergeom  # pyright: ignore[reportMissingTypeStubs]  takes half a second

        g, p = occurring[0]
        # h samples of the first class agree, and n - g - p + h of the second
        return float(hypergeom.sf((agreeing - n + g + p) // 2 - 1, n, g, p)) > GUESSES
    skewed = (BEYOND_CHANCE**2 - 1) / 6 * Fraction(max(0, moment(3)), n * (n - 2) * second)
    beyond = agreeing - Fraction(total, n) - Fraction(1, 2) - skewed
    return beyond <= 0 or beyond**2 * n**4 * (n - 1) <= BEYOND_CHANCE**2 * second


def _noise(held_out: CalibrationSums, live: CalibrationSums, prior: Prior) -> tuple[NoiseEstimate, float, float]:
    """The estimate, the share of wrong held-out labels, and what the comparison shows of the live ones beyond it."""
    of_held_out, of_live = (_most_confident(of) for of in (held_out, live))
    samples = float(held_out.count)
    error = float(held_out.disagreeing.sum()) / samples if samples else 0.0
    found = [_lowest(*pair) > max(CLEAN, MISTAKEN * error) for pair in (of_held_out, of_live)]
    estimate = _counted(*of_held_out, found=found[0], source="held-out")
    shown = prior.held_out_rate
    if prior.live_rate is None:
        shown = estimate.rate or shown
    # held-out labels that were looked through say nothing of the live ones; memory only hides wrong live labels
    if found[1] and (not found[0] or _interval(*of_live)[0] > estimate.high):
        estimate = _counted(*of_live, found=True, source="live")
    more, deviation = _compared(held_out, live)
    rate, low, high, most = (
        min(max(shown + (1 - shown) * (more + z * deviation), 0.0), 1.0) if more else 0.0
        for z in (0.0, -1.96, 1.96, 3.09)
    )
    # one-sided 99 %; where the live labels themselves tell, they tell it better
    if more <= 2.326 * deviation or (estimate.source == "live" and low <= estimate.high):
        return estimate, shown, 0.0
    return NoiseEstimate(rate, low, high, most, *of_held_out, found=True, source="comparison"), shown, more


def _counted(disagreeing: int, number: int, *, found: bool, source: Source) -> NoiseEstimate:
    low, high = _interval(disagreeing, number)
    if not found:
        return NoiseEstimate(0.0, 0.0, high, 0.0, disagreeing, number, False, source)
    return NoiseEstimate(
        disagreeing / number, low, high, _highest(disagreeing, number), disagreeing, number, True, source
    )


def _compared(held_out: CalibrationSums, live: CalibrationSums) -> tuple[float, float]:
    """(rho_l - rho_h) / (1 - rho_h) for the shares rho of wrong labels, and its standard error; 0 where not known.

        e = (l - h) / (s - h)

    with h and l the shares of held-out and live samples whose distance lies beyond a threshold, and s the share of
    samples that would if their labels were wrong by chance.
    """
    n, m = float(held_out.count), float(live.count)
    if not (n and m) or not float(held_out.strangers.sum()):
        return 0.0, math.inf
    tails = [of.flip(0).cumsum(0).tolist() for of in (held_out.rivals, live.rivals, held_out.strangers)]
    at = bisect.bisect_left(tails[0], COMPARED * n)
    shown, found, wrong = tails[0][at] / n, tails[1][at] / m, tails[2][at] / n
    if wrong - shown < TOLD_APART:
        return 0.0, math.inf
    variance = shown * (1 - shown) / n + found * (1 - found) / m
    return (found - shown) / (wrong - shown), math.sqrt(variance) / (wrong - shown)


def _distances(scaled: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """`rivals` and `strangers` of a batch."""
    classes = scaled.shape[1]
    rivals, strangers = (torch.zeros(_BINS, dtype=torch.float64, device=scaled.device) for _ in range(2))
    # without the label, two classes have no distance from one another
    if classes < 3 or not len(labels):
        return rivals, strangers
    (first, second, third), ranks = scaled.topk(3, dim=1).values.T, scaled.topk(3, dim=1).indices
    # what is left once the first, the second, or another class is not looked at
    left = torch.stack([second - third, first - third, first - second], dim=1)
    is_label = torch.stack([ranks[:, 0] == labels, ranks[:, 1] == labels], dim=1)
    mine = torch.cat([is_label, ~is_label.any(dim=1, keepdim=True)], dim=1).double()
    others = torch.cat([torch.ones_like(mine[:, :2]), torch.full_like(mine[:, :1], classes - 2)], dim=1) - mine
    bins = (left * (_BINS / _DEEPEST)).long().clamp_max(_BINS - 1).flatten()
    rivals.index_add_(0, bins, mine.flatten())
    strangers.index_add_(0, bins, others.flatten() / (classes - 1))
    return rivals, strangers


def _offsets() -> Tensor:
    return torch.linspace(0, _LARGEST_OFFSET, _OFFSETS, dtype=torch.float64)


def _offset(live: CalibrationSums, wanted: float, removed: int, removed_support: float) -> float:
    """The b at which the live labels' mean probability falls to `wanted`; 0 where it is lower anyway."""
    means, grid = ((live.support + removed_support) / (live.count + removed)).tolist(), _offsets().tolist()
    return _crossing(grid, [-mean for mean in means], -wanted)


def _shifts() -> Tensor:
    return torch.linspace(0, _LARGEST_SHIFT, _SHIFTS, dtype=torch.float64)


def _crossing(grid: Sequence[float], rising: Sequence[float], wanted: float) -> float:
    """Where values that rise over a grid reach what is wanted: its first point where they are there at once."""
    # not a number where there are no samples: nothing is known then
    if not rising[0] < wanted:
        return grid[0]
    for k in range(1, len(grid)):
        if rising[k] >= wanted:
            share = (wanted - rising[k - 1]) / (rising[k] - rising[k - 1])
            return grid[k - 1] + share * (grid[k] - grid[k - 1])
    return grid[-1]


def _most_confident(of: CalibrationSums) -> tuple[int, int]:
    """(disagreeing, counted) among the most confident, as many as are alike.

    It begins with the wanted number and doubles it, up to half of all, as long as the less confident ones that
    are added do not disagree more often, by half a standard error: then it is the labels that are wrong and not the
    boundary, whose errors become more frequent with less confidence. Bins are taken whole.
    """
    count = int(of.count)
    wanted = min(count, max(LEAST_CONFIDENT, min(MOST_CONFIDENT, int(CONFIDENT_SHARE * count))))
    if not wanted:
        return 0, 0
    confident, disagreeing = (part.flip(0).cumsum(0).tolist() for part in (of.confident, of.disagreeing))

    def among(number: int) -> tuple[int, int]:
        last = bisect.bisect_left(confident, number)
        return int(disagreeing[last]), int(confident[last])

    taken = among(wanted)
    while 2 * taken[1] <= count / 2:
        more = among(2 * taken[1])
        if more[1] > count / 2:
            break
        added = more[1] - taken[1]
        first, second = taken[0] / taken[1], (more[0] - taken[0]) / added
        # of a share of both together
        share = more[0] / more[1]
        error = math.sqrt(share * (1 - share) * (1 / taken[1] + 1 / added))
        if second > first + error / 2:
            break
        taken = more
    return taken


def _lowest(disagreeing: int, counted: int) -> float:
    """One-sided 95 % bound from below on a share (Clopper & Pearson 1934)."""
    from scipy.stats import beta  # pyright: ignore[reportMissingTypeStubs]  takes half a second: not at the top

    return float(beta.ppf(0.05, disagreeing, counted - disagreeing + 1)) if disagreeing else 0.0


def _highest(disagreeing: int, counted: int) -> float:
    """One-sided 99.9 % bound from above on a share."""
    from scipy.stats import beta  # pyright: ignore[reportMissingTypeStubs]

    return float(beta.ppf(0.999, disagreeing + 1, counted - disagreeing)) if disagreeing < counted else 1.0


def _interval(disagreeing: int, counted: int) -> tuple[float, float]:
    from scipy.stats import beta  # pyright: ignore[reportMissingTypeStubs]

    if not counted:
        return 0.0, 1.0
    low = float(beta.ppf(0.025, disagreeing, counted - disagreeing + 1)) if disagreeing else 0.0
    high = float(beta.ppf(0.975, disagreeing + 1, counted - disagreeing)) if disagreeing < counted else 1.0
    return low, high
