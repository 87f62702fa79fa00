"""Score: how likely each label is wrong, by probes that did not see it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute
import torch

from posttrain import policy
from posttrain.cluster.workers import Network, Verdict, scores_key
from posttrain.errors import DataError, StepError
from posttrain.influence import calibration, curvature
from posttrain.influence.calibration import NoiseEstimate
from posttrain.influence.ensemble import validation_sums, with_transition
from posttrain.rounds import State
from posttrain.runs.context import Run
from posttrain.runs.fit import Fitted
from posttrain.runs.noise_report import noise_metrics
from posttrain.schema import LABEL, SELF_CONFIDENCE, stream_seed
from posttrain.store.scores import ScoreShards

# pyarrow makes these functions when it is imported: a type checker sees none of them
pc = cast(Any, pyarrow.compute)


@dataclass(frozen=True)
class Scored:
    """The scores of a round, in `scores.parquet`."""

    path: str
    class_counts: np.ndarray
    """Live samples of each class."""
    noise: NoiseEstimate
    metrics: dict[str, float]
    """What fitting and scoring found out."""


def score(run: Run, state: State[Network, Fitted], backbone: str, fitted: Fitted) -> Scored:
    """Every score of every live sample, streamed to the round's `scores.parquet`."""
    kinds, verdict = _plan(run, state, fitted)
    with run.progress.step("calibrate"):
        noise_model = _noise_model(run, state, fitted, verdict)
    verdict = replace(verdict, noise_model=noise_model)
    path = run.folder.round(state.number + 1, "scores.parquet")
    counts = _write_scores(run, state, fitted, verdict, path)
    boundary = fitted.ensemble
    metrics = {
        "probe_validation_loss": boundary.loss,
        "probe_validation_accuracy": boundary.accuracy,
        "curvature_is_exact": float(all(kind == "exact" for kind in kinds)),
        **{f"probe_l2_{layer.replace('.', '_')}": l2 for layer, l2 in boundary.members},
        "temperature": noise_model.temperature,
        "memorisation": noise_model.offset,
        **noise_metrics(noise_model.noise),
        "live_noise": noise_model.live_rate,
        "validation_noise": noise_model.held_out_rate,
    }
    return Scored(path, counts, noise_model.noise, metrics)


def _plan(run: Run, state: State[Network, Fitted], fitted: Fitted) -> tuple[list[curvature.Kind], Verdict]:
    boundary, probes = fitted.ensemble, run.config.probe
    kinds: list[curvature.Kind] = []
    curvatures = []
    with run.progress.step("curvature"):
        for layer, standardizer, probe in zip(boundary.layers, boundary.standardizers, boundary.probes, strict=True):
            fits = probe.weights.numel() <= probes.exact_limit
            kind = ("exact" if fits else "ekfac") if probes.curvature == "auto" else probes.curvature
            reduce = fitted.samples.standardised((layer,), (standardizer,))
            curvatures.append(curvature.measure(reduce, probe, kind))
            kinds.append(kind)
    return kinds, Verdict(boundary, tuple(curvatures), stream_seed("control", run.config.run.seed, state.number))


def _noise_model(run: Run, state: State[Network, Fitted], fitted: Fitted, verdict: Verdict) -> calibration.NoiseModel:
    boundary, previous = fitted.ensemble, run.previous.self_confidence
    held_out = run.workers.reducer(fitted.validation_view)
    of_held_out, temperature = validation_sums(held_out, boundary.weights)
    as_given = fitted.view
    if len(state.live.relabelled):
        # corrected labels would be mistaken for memorised ones
        as_given = replace(as_given, live=state.live.as_given(), key=f"{as_given.key} as given")
    of_live = run.workers.calibration_sums(as_given, verdict, temperature)
    acted_on = sum(done.metrics.get("acted_on_self_confidence", 0.0) for done in state.history)
    prior = _prior(run, state)
    noise_model = calibration.estimate(
        of_held_out,
        of_live,
        temperature,
        removed=policy.acted_on(state.history) + previous.num_rows,
        removed_support=acted_on + (pc.sum(previous[SELF_CONFIDENCE]).as_py() or 0.0),
        prior=prior,
    )
    noise_model = with_transition(
        noise_model,
        held_out,
        boundary.weights,
        lambda by: run.workers.posterior_sums(as_given, replace(verdict, noise_model=by)),
        prior,
    )
    if prior.votes is None and noise_model.prior.votes is not None:
        run.ledger.keep_confident_joint(state.number + 1, noise_model.prior.votes.numpy())
    return noise_model


def _prior(run: Run, state: State[Network, Fitted]) -> calibration.Prior:
    """What the first round that found wrong labels saw of them."""
    for done in state.history[1:]:
        joint = run.ledger.confident_joint(done.number)
        if joint is not None:
            rate, validation_rate = (done.metrics[name] for name in ("live_noise", "validation_noise"))
            held = done.metrics["noise_of_validation"]
            return calibration.Prior(torch.tensor(joint), rate if held else None, validation_rate)
    return calibration.Prior(held_out_rate=run.previous.validation_noise)


def _write_scores(run: Run, state: State[Network, Fitted], fitted: Fitted, verdict: Verdict, path: str) -> np.ndarray:
    """Write `scores.parquet`; the live samples of each class."""
    classes = run.inputs.classes
    counts = np.zeros(len(classes), np.int64)
    kept = ScoreShards(run.folder, state.number + 1, scores_key(fitted.view, verdict))
    with run.progress.step("score") as tell:

        def tables() -> Iterator[pa.Table]:
            for table in run.workers.score(fitted.view, verdict, kept):
                yield table
                counts[:] += np.bincount(table[LABEL].to_numpy(), minlength=len(classes))
                tell(int(counts.sum()), fitted.ensemble.probes[0].count)
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
