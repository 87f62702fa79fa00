"""Score: how likely each label is wrong, by probes that did not see it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import torch

from posttrain import policy
from posttrain.arrow_compute import pc
from posttrain.cluster.network import Network
from posttrain.errors import DataError, StepError
from posttrain.influence.noise_model import UNKNOWN, NoiseModel, Prior
from posttrain.influence.noise_rate import NoiseEstimate
from posttrain.influence.score_round import PreviousRemovals, RoundScores, score_round
from posttrain.rounds import State
from posttrain.runs.context import Run
from posttrain.runs.fit import Fitted
from posttrain.runs.noise_report import noise_metrics
from posttrain.schema import LABEL, SELF_CONFIDENCE, Round, stream_seed


@dataclass(frozen=True)
class Scored:
    """The scores of a round, in `scores.parquet`."""

    path: str
    class_counts: np.ndarray
    """Live samples of each class."""
    noise_model: NoiseModel
    metrics: dict[str, float]
    """What fitting and scoring found out."""

    @property
    def noise(self) -> NoiseEstimate:
        return self.noise_model.noise


def score(run: Run, state: State[Network, Fitted], backbone: str, fitted: Fitted) -> Scored:
    """Every score of every live sample, streamed to the round's `scores.parquet`."""
    number = state.number + 1
    prior = prior_of(run, state.history)
    scored = round_scores(
        run,
        replace(fitted, samples=replace(fitted.samples, round_scored=number)),
        seed=stream_seed("control", run.config.run.seed, state.number),
        previous=_previous_removals(run, state),
        prior=prior,
    )
    noise_model, boundary = scored.noise_model, fitted.ensemble
    if prior.confident_joint is None and noise_model.prior.confident_joint is not None:
        run.ledger.keep_confident_joint(number, noise_model.prior.confident_joint.numpy())
    path = run.folder.round(number, "scores.parquet")
    counts = _write_scores(run, scored.tables, boundary.probes[0].count, path)
    metrics = {
        "probe_validation_loss": boundary.loss,
        "probe_validation_accuracy": boundary.accuracy,
        "curvature_is_exact": float(all(kind == "exact" for kind in scored.kinds)),
        **{f"probe_l2_{layer.replace('.', '_')}": l2 for layer, l2 in boundary.members},
        "temperature": noise_model.temperature,
        "memorisation": noise_model.memorisation_offset,
        **noise_metrics(noise_model.noise),
        "live_noise": noise_model.live_noise_rate,
        "validation_noise": noise_model.validation_noise_rate,
    }
    return Scored(path, counts, noise_model, metrics)


def round_scores(
    run: Run, fitted: Fitted, *, seed: int, previous: PreviousRemovals, prior: Prior = UNKNOWN
) -> RoundScores[pa.Table]:
    """`score_round` by the run's settings."""
    settings = run.config.probe
    return score_round(
        fitted.samples,
        fitted.validation,
        fitted.ensemble,
        seed=seed,
        curvature_kind=settings.curvature,
        exact_limit=settings.exact_limit,
        previous=previous,
        prior=prior,
        step=run.progress.step,
    )


def _previous_removals(run: Run, state: State[Network, Fitted]) -> PreviousRemovals:
    """What the rounds of this run and previous runs of its job removed or relabelled."""
    by_rounds = sum(done.metrics.get("acted_on_self_confidence", 0.0) for done in state.history)
    by_runs = run.previous.self_confidence
    return PreviousRemovals(
        policy.acted_on(state.history) + by_runs.num_rows,
        by_rounds + (pc.sum(by_runs[SELF_CONFIDENCE]).as_py() or 0.0),
    )


def prior_of(run: Run, history: Sequence[Round]) -> Prior:
    """What the first of these rounds that found wrong labels estimated."""
    # of the rounds on these features alone: others may show more
    found = first_finding(run, policy.of_base(history))
    if found is None:
        return Prior(validation_noise_rate=run.previous.validation_noise)
    done, joint = found
    rate, validation_rate = (done.metrics[name] for name in ("live_noise", "validation_noise"))
    held = done.metrics["noise_of_validation"]
    return Prior(joint, rate if held else None, validation_rate)


def first_finding(run: Run, history: Sequence[Round]) -> tuple[Round, torch.Tensor] | None:
    """The first of these rounds that found wrong labels, and its `NoiseModel.confident_joint`."""
    for done in history[1:]:
        joint = run.ledger.confident_joint(done.number)
        if joint is not None:
            return done, torch.tensor(joint)
    return None


def _write_scores(run: Run, scored: Iterator[pa.Table], samples: int, path: str) -> np.ndarray:
    """Write `scores.parquet` of so many samples; the live samples of each class."""
    classes = run.inputs.classes
    counts = np.zeros(len(classes), np.int64)
    with run.progress.step("score") as tell:

        def tables() -> Iterator[pa.Table]:
            for table in scored:
                yield table
                counts[:] += np.bincount(table[LABEL].to_numpy(), minlength=len(classes))
                tell(int(counts.sum()), samples)
            if not counts.any():
                raise StepError("no sample is left to score; the run folder's quarantine.parquet says why")
            if np.count_nonzero(counts) == 1:
                raise DataError(
                    f"data.train = {run.config.data.train}: only one class ({classes[int(counts.argmax())]}) is left, "
                    "and at least two are needed; quarantine.parquet in the run folder says what was left out, and "
                    "why: mend that, and name another run.path"
                )

        run.folder.write_row_groups(path, tables())
    return counts
