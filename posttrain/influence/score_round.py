"""The mathematics of one round, composed in one place: from a fitted ensemble to the scores of every live sample.

    curvature          of each member, exact where it is small enough
    leave-one-out      logits of every live sample, computed once
    calibration        temperature and sums on the validation samples, sums on the live ones
    noise model        noise rate, memorisation offset, noise transition matrix
    scores             with the suggested labels, block by block

Nothing here knows where the samples are: `influence.in_memory` holds them in memory, `cluster.scoring` in the
feature store of a run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Generic, Literal, Protocol, TypeVar, runtime_checkable

from torch import Tensor

from posttrain.influence import curvature
from posttrain.influence.calibration import CalibrationSums, calibration_sums, validation_sums
from posttrain.influence.curvature import Curvature, Kind
from posttrain.influence.ensemble import ProbeEnsemble, Samples
from posttrain.influence.noise_model import (
    UNKNOWN,
    NoiseModel,
    PosteriorSums,
    Prior,
    estimate_noise_model,
    posterior_sums,
    with_transition,
)
from posttrain.influence.scores import Evidence, LeaveOneOut, joint_evidence, leave_one_out

Table = TypeVar("Table", covariant=True)

BlockSums = Callable[[Tensor, Tensor], tuple[Tensor, ...]]
"""(leave-one-out logits [b, classes], labels [b]) -> tensors that may be added over blocks."""


@dataclass(frozen=True)
class ScoringPlan:
    """All that determines the leave-one-out logits of a sample, and its random control score."""

    ensemble: ProbeEnsemble
    curvatures: tuple[Curvature, ...]
    """Of each member."""
    seed: int
    """Of the random control score."""

    def evidence(self, features: Tensor, labels: Tensor, uniform: Tensor) -> Evidence:
        """The evidence on a batch: the members' standardised features side by side, labels, random numbers."""
        parts = self.ensemble.parts(features)
        members = [
            (own, fitted.weights.to(features), measured)
            for own, fitted, measured in zip(parts, self.ensemble.probes, self.curvatures, strict=True)
        ]
        return joint_evidence(members, labels, uniform.to(features))

    def leave_one_out(self, features: Tensor, labels: Tensor, uniform: Tensor) -> LeaveOneOut:
        """The part of the evidence on a batch that a round keeps."""
        return leave_one_out(self.evidence(features, labels, uniform))


@runtime_checkable
class LeaveOneOutPass(Protocol[Table]):
    """The leave-one-out logits of all live samples under one plan; they are computed at most once where memory
    suffices."""

    def sums(self, fn: BlockSums) -> tuple[Tensor, ...]:
        """Sums of `fn` over the live samples that still have the label they came with."""
        ...

    def tables(self, noise_model: NoiseModel) -> Iterator[Table]:
        """`scores.score_columns` of every live sample, block by block."""
        ...


@runtime_checkable
class LiveSamples(Samples, Protocol[Table]):
    """The live samples of a round, with the features of several layers."""

    def leave_one_out(self, plan: ScoringPlan) -> LeaveOneOutPass[Table]: ...


@dataclass(frozen=True)
class PreviousRemovals:
    """What previous rounds removed or relabelled; without it the estimated noise rate would be too low."""

    count: int = 0
    self_confidence: float = 0.0
    """Sum of the given labels' probabilities when they were removed."""


@dataclass(frozen=True)
class RoundScores(Generic[Table]):
    """What a round knows of its live samples."""

    plan: ScoringPlan
    kinds: tuple[Kind, ...]
    """Of each member's curvature."""
    noise_model: NoiseModel
    tables: Iterator[Table]
    """Scores and suggestions, block by block; computed as they are read, and to be read once."""


def score_round(
    live: LiveSamples[Table],
    validation: Samples,
    ensemble: ProbeEnsemble,
    *,
    seed: int,
    curvature_kind: Kind | Literal["auto"] = "auto",
    exact_limit: int = 2048,
    previous: PreviousRemovals = PreviousRemovals(),
    prior: Prior = UNKNOWN,
    step: Callable[[str], AbstractContextManager[object]] = nullcontext,
) -> RoundScores[Table]:
    """The noise model and the scores of all live samples, given an ensemble that was fitted on them.

    `curvature_kind` "auto" is exact up to `exact_limit` parameters of a probe. `prior` is what the first round that
    found wrong labels estimated. `step` is entered as "curvature" and as "calibrate", for progress and timing.
    Raises SingularCurvatureError where the curvature of a member is not positive definite.
    """
    kinds: list[Kind] = []
    measured: list[Curvature] = []
    with step("curvature"):
        for layer, standardizer, fitted in zip(ensemble.layers, ensemble.standardizers, ensemble.probes, strict=True):
            exact = fitted.weights.numel() <= exact_limit
            kinds.append(("exact" if exact else "ekfac") if curvature_kind == "auto" else curvature_kind)
            measured.append(curvature.measure(live.standardised((layer,), (standardizer,)), fitted, kinds[-1]))
    plan = ScoringPlan(ensemble, tuple(measured), seed)
    logits = live.leave_one_out(plan)
    with step("calibrate"):
        noise_model = _noise_model(logits, validation, ensemble, previous, prior)
    return RoundScores(plan, tuple(kinds), noise_model, logits.tables(noise_model))


def _noise_model(
    logits: LeaveOneOutPass[object],
    validation: Samples,
    ensemble: ProbeEnsemble,
    previous: PreviousRemovals,
    prior: Prior,
) -> NoiseModel:
    reduce = validation.standardised(ensemble.layers, ensemble.standardizers)
    of_validation, temperature = validation_sums(reduce, ensemble.weights)
    of_live = CalibrationSums(*logits.sums(partial(calibration_sums, temperature=temperature)))
    first = estimate_noise_model(
        of_validation,
        of_live,
        temperature,
        removed=previous.count,
        removed_self_confidence=previous.self_confidence,
        prior=prior,
    )

    def sums_under(model: NoiseModel) -> PosteriorSums:
        return PosteriorSums(*logits.sums(partial(posterior_sums, model)))

    return with_transition(first, reduce, ensemble.weights, sums_under, prior)
