"""Select: which samples are removed or relabelled in a round."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from posttrain import policy
from posttrain.arrow_compute import pc
from posttrain.errors import StepError
from posttrain.influence.noise_model import noise_left
from posttrain.influence.noise_rate import NoiseEstimate
from posttrain.influence.selection import select as selected_by
from posttrain.live import Live, NewLabels, Removal, Rows
from posttrain.report.figures import ScoreHistogram
from posttrain.rounds import RoundCounts, Selected, State
from posttrain.runs.context import Run
from posttrain.runs.noise_report import OF_RUN, noise_sentence
from posttrain.runs.score import Scored
from posttrain.schema import LABEL, PARTITION, ROW, SAMPLE_ID, SELF_CONFIDENCE
from posttrain.store.results import reason
from posttrain.vision.losses import Noise

_BINS = 60

Quota = Sequence[int] | None
"""Samples to act on in each round instead of the budget: for controls."""


@dataclass(frozen=True)
class Choice(Selected):
    """What a round removes, in its `removed.parquet`, and what it relabels, in its `relabelled.parquet`."""

    histogram: ScoreHistogram
    self_confidence: float
    """Sum over all these samples."""
    noise: Noise
    """Of the samples that stay."""


def select(run: Run, state: State[Any, Any], scored: Scored, *, quota: Quota = None) -> Choice:
    """The samples that most likely have a wrong label, as far as budget, estimate and class floors allow."""
    settings, number = run.config.removal, state.number + 1
    still = _still_allowed(run, state, scored.noise, quota)
    at_most = (
        policy.in_one_round(int(scored.class_counts.sum()), settings.budget) if quota is None else quota[number - 1]
    )
    with run.progress.step("select") as tell:
        selection = selected_by(
            lambda: _candidates(run, state.live, scored.path, quota),
            classes=len(run.inputs.classes),
            at_most=min(at_most, still),
            caps=policy.caps(scored.class_counts, run.splits["train"].class_counts, settings.class_floor),
            threshold=-np.inf,
        )
        edges = _edges(run, scored.path)
        kept, gone = np.zeros(_BINS, np.int64), np.zeros(_BINS, np.int64)
        parts = []
        for table, (ids, labels, scores) in zip(
            run.folder.row_groups(scored.path), _candidates(run, state.live, scored.path, quota), strict=True
        ):
            mask = selection.mask(ids, labels, scores)
            values = table[settings.score].to_numpy()
            kept += np.histogram(values[~mask], edges)[0]
            gone += np.histogram(values[mask], edges)[0]
            parts.append(table.filter(pa.array(mask)))
        acted_on = pa.concat_tables(parts)
        if acted_on.num_rows != selection.total:
            raise StepError(f"{selection.total} samples were selected but {acted_on.num_rows} found again")
        removal = _written(run, number, acted_on)
        tell(selection.total, selection.total)
    lowest = pc.min(acted_on[settings.score]).as_py() if acted_on.num_rows else None
    share = None if settings.max_share == "estimated" else settings.max_share
    return Choice(
        removal,
        RoundCounts(selection.candidates, noise_sentence(scored.noise, OF_RUN), still == 0, share),
        scored.metrics,
        ScoreHistogram(settings.score, edges, kept, gone, lowest),
        float(pc.sum(acted_on[SELF_CONFIDENCE]).as_py() or 0.0),
        _noise_left(scored, acted_on.num_rows, len(removal.removed)),
    )


def _noise_left(scored: Scored, acted_on: int, removed: int) -> Noise:
    model, live = scored.noise_model, int(scored.class_counts.sum())
    rate = model.remaining_noise_rate
    return Noise(*noise_left(model.confident_joint, rate, live, acted_on=acted_on, left=live - removed))


def _written(run: Run, number: int, acted_on: pa.Table) -> Removal:
    """Write what is removed and what is relabelled, each sample with its reason."""
    settings = run.config.removal
    acted_on = acted_on.append_column("round", pa.array(np.full(acted_on.num_rows, number), pa.int32()))
    change = np.zeros(acted_on.num_rows, bool)
    if settings.action == "relabel":
        change = acted_on["confidence"].to_numpy() >= settings.relabel_above
    removed, relabelled = acted_on.filter(pa.array(~change)), acted_on.filter(pa.array(change))
    for name, table in (("removed", removed), ("relabelled", relabelled)):
        if name == "removed" or table.num_rows:
            why = reason(table, settings.score, number, run.inputs.classes)
            run.folder.write_table(run.folder.round(number, f"{name}.parquet"), table.append_column("reason", why))
    new = NewLabels.of(*(relabelled[name].to_numpy() for name in (PARTITION, ROW, "suggested_label")))
    return Removal(Rows.of_table(removed), new)


def _still_allowed(run: Run, state: State[Any, Any], noise: NoiseEstimate, quota: Quota) -> int:
    """Samples that may be acted on in this and all later rounds."""
    settings, previous = run.config.removal, run.previous.removal
    if quota is not None:
        return run.splits["train"].rows
    return policy.allowance(
        state.history,
        policy.largest_share(state.history, noise.most, settings.max_share),
        previously_removed=len(previous.removed),
        previously_relabelled=len(previous.relabelled),
    )


def _candidates(run: Run, live: Live, path: str, quota: Quota) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """(ids, labels, score) with a score of -inf for what does not look wrong."""
    settings = run.config.removal
    columns = list(dict.fromkeys([SAMPLE_ID, PARTITION, ROW, LABEL, settings.score, "mislabel_odds"]))
    # a control removes as many as it is told to, by its own score alone
    above = None if settings.score == "random" or quota is not None else settings.min_log_odds
    for table in run.folder.row_groups(path, columns):
        odds = table["mislabel_odds"].to_numpy()
        scores = policy.candidate_scores(table[settings.score].to_numpy(), odds, above)
        # what has been relabelled once stays so: it would go back and forth
        scores[live.relabelled.rows.contains(table[PARTITION].to_numpy(), table[ROW].to_numpy())] = -np.inf
        yield table[SAMPLE_ID].to_numpy(), table[LABEL].to_numpy(), scores


def _edges(run: Run, path: str) -> np.ndarray:
    """[bins + 1]: the edges of the histogram of all scores."""
    low, high = np.inf, -np.inf
    for table in run.folder.row_groups(path, [run.config.removal.score]):
        bounds = pc.min_max(table[0])
        if table.num_rows:
            low, high = min(low, bounds["min"].as_py()), max(high, bounds["max"].as_py())
    return np.linspace(low, high if high > low else low + 1, _BINS + 1)
