"""The steps of a round, as functions on a run: what `posttrain.rounds.clean` is handed.

A `CleaningRun` holds what lasts through the rounds: the data in buckets, the pool of workers, the run folder and
the tracking. Each method is one step.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet as pq
import torch

from pipelines.inputs import Inputs
from posttrain.cluster import measuring, refining
from posttrain.cluster.reading import Split
from posttrain.cluster.workers import Network, View, Workers, load_network, standardize
from posttrain.config import RunFile
from posttrain.config import Training as TrainingSection
from posttrain.errors import PosttrainError, StepError
from posttrain.influence import curvature, probe
from posttrain.influence.probe import Standardizer
from posttrain.influence.selection import Selection, select
from posttrain.report.progress import StepLog
from posttrain.rounds import Cut, State, Steps
from posttrain.schema import (
    BUCKET,
    LABEL,
    ROW,
    SAMPLE_ID,
    Excluded,
    Round,
    excluded_digest,
    excluded_rows,
    merged,
    stream_seed,
)
from posttrain.store.features import ShardSummary, quarantine_table
from posttrain.store.folder import RunFolder
from posttrain.store.ledger import Ledger
from posttrain.store.results import reason
from posttrain.vision import models

if TYPE_CHECKING:
    from posttrain.store.tracking import Tracking

# pyarrow makes these functions when it is imported: a type checker sees none of them
pc = cast(Any, pyarrow.compute)

_BINS = 60


@dataclass(frozen=True)
class Fitted:
    """A probe with the view that it was fitted on."""

    view: View
    standardizer: Standardizer
    probe: probe.Probe
    validation_loss: float
    validation_accuracy: float


@dataclass(frozen=True)
class Scored:
    """The scores of a round, in `scores.parquet`."""

    path: str
    class_counts: np.ndarray
    """Live samples of each class."""


@dataclass(frozen=True)
class Removal:
    """What a round takes out, in `removed.parquet`."""

    selection: Selection
    scored: int
    excluded: Excluded
    """Of this round alone."""
    figures: dict[str, bytes]


@dataclass
class CleaningRun:
    """One run of `posttrain clean`, as its steps see it."""

    config: RunFile
    inputs: Inputs
    splits: dict[str, Split]
    folder: RunFolder
    workers: Workers
    train_workers: int
    tracking: Tracking | None
    progress: StepLog
    removed: Excluded = field(default_factory=dict)
    quarantined: Excluded = field(default_factory=dict)
    quota: Sequence[int] | None = None
    """Samples to remove in each round instead of the budget: for controls."""
    _fitted: dict[tuple[str, str], Fitted] = field(default_factory=dict)
    _probe_metrics: dict[str, float] = field(default_factory=dict)

    @property
    def ledger(self) -> Ledger:
        return Ledger(self.folder)

    @property
    def excluded(self) -> Excluded:
        """What takes no part in training and scoring: removed or quarantined."""
        return merged(self.quarantined, self.removed)

    # -- the steps -------------------------------------------------------------------------------------

    def embed(self, state: State[Network]) -> str:
        """The feature store of the model's backbone, by its fingerprint; written where it is not there."""
        self.progress.begin_round(state.number + 1)
        return self._embed(state.model, ("train", "validation"))

    def fit(self, state: State[Network], backbone: str) -> Fitted:
        """The probe on the live samples."""
        with self.progress.step("fit"):
            return self._fit(backbone, self.excluded)

    def score(self, state: State[Network], backbone: str, fitted: Fitted) -> Scored:
        """Every score of every live sample, streamed to the round's `scores.parquet`."""
        classes, dim = fitted.probe.weights.shape
        kind = self.config.probe.curvature
        if kind == "auto":
            kind = "exact" if classes * dim <= self.config.probe.exact_limit else "ekfac"
        with self.progress.step("curvature"):
            found = curvature.measure(self.workers.reducer(fitted.view), fitted.probe, kind)
        path = self.folder.round(state.number + 1, "scores.parquet")
        counts = np.zeros(classes, np.int64)
        with self.progress.step("score") as tell, self.folder.writing(path) as stream:
            writer: pq.ParquetWriter | None = None
            done = 0
            seed = stream_seed("control", self.config.run.seed, state.number)
            for table in self.workers.score(fitted.view, fitted.probe.weights, found, seed):
                writer = writer or pq.ParquetWriter(stream, table.schema, compression="zstd")
                writer.write_table(table)
                counts += np.bincount(table[LABEL].to_numpy(), minlength=classes)
                done += table.num_rows
                tell(done, fitted.probe.count)
            if writer is None:
                raise StepError("no sample is left to score; the run folder's quarantine.parquet says why")
            writer.close()
        self._probe_metrics = {
            "probe_damping": fitted.probe.damping,
            "probe_validation_loss": fitted.validation_loss,
            "probe_validation_accuracy": fitted.validation_accuracy,
            "curvature_is_exact": float(kind == "exact"),
        }
        return Scored(path, counts)

    def select(self, state: State[Network], scored: Scored) -> Removal:
        """The round's cut, and its rows in `removed.parquet`."""
        settings = self.config.removal
        number = state.number + 1
        floors = np.ceil(settings.class_floor * self.splits["train"].class_counts).astype(np.int64)
        with self.progress.step("select") as tell:
            selection = select(
                lambda: self._candidates(scored.path),
                classes=len(self.inputs.classes),
                at_most=self._at_most(number, int(scored.class_counts.sum())),
                caps=np.maximum(scored.class_counts - floors, 0),
                threshold=-np.inf,
            )
            edges = self._edges(scored.path)
            kept, gone = np.zeros(_BINS, np.int64), np.zeros(_BINS, np.int64)
            parts = []
            for table, (ids, labels, scores) in zip(
                self.folder.row_groups(scored.path), self._candidates(scored.path), strict=True
            ):
                mask = selection.taken(ids, labels, scores)
                values = table[settings.score].to_numpy()
                kept += np.histogram(values[~mask], edges)[0]
                gone += np.histogram(values[mask], edges)[0]
                part = table.filter(pa.array(mask))
                part = part.append_column("round", pa.array(np.full(part.num_rows, number), pa.int32()))
                part = part.append_column("reason", reason(part, settings.score, number, self.inputs.classes))
                parts.append(part)
            table = pa.concat_tables(parts)
            if table.num_rows != selection.total:
                raise StepError(f"{selection.total} samples were selected but {table.num_rows} found again")
            self.folder.write_table(self.folder.round(number, "removed.parquet"), table)
            tell(selection.total, selection.total)
        figures: dict[str, bytes] = {}
        if self.tracking is not None:
            from posttrain.store.tracking import score_histogram

            lowest = pc.min(table[settings.score]).as_py() if table.num_rows else None
            figures["scores.png"] = score_histogram(edges, kept, gone, score=settings.score, cut=lowest)
        scored_samples = int(scored.class_counts.sum())
        return Removal(
            selection, scored_samples, excluded_rows(table[BUCKET].to_numpy(), table[ROW].to_numpy()), figures
        )

    def count(self, removal: Removal) -> Cut:
        """How many samples were scored, how many are candidates, and how many of them go."""
        return Cut(removal.scored, removal.selection.candidates, removal.selection.total)

    def refine(self, state: State[Network], backbone: str, removal: Removal, fitted: Fitted) -> Network:
        """The model without the samples of this round: a new head, or the whole network trained on."""
        excluded = merged(self.excluded, removal.excluded)
        settings = self.config.refine
        if settings.scope == "head":
            with self.progress.step("refine"):
                return self.new_head(state.model, backbone, excluded)
        return self.train(
            state.model,
            settings,
            excluded,
            name="refine",
            seed=self.config.run.seed + 1000 * (state.number + 1),
        )

    def evaluate(self, state: State[Network], model: Network) -> dict[str, float]:
        """Accuracy and cross-entropy on what was never trained on and never cleaned."""
        splits = [name for name in ("validation", "test") if name in self.splits]
        backbone = self._embed(model, splits)
        with self.progress.step("evaluate") as tell:
            head = models.head_of(load_network(model), self.inputs.spec.head)
            bias = torch.zeros(head.out_features) if head.bias is None else head.bias.detach()
            weights = torch.cat([head.weight.detach(), bias[:, None]], dim=1)
            dim = head.in_features
            as_stored = Standardizer(torch.zeros(dim).double(), torch.ones(dim).double())
            metrics = {}
            for name in splits:
                loss, accuracy = self._measure(self._view(backbone, name, {}, as_stored), weights)
                metrics |= {f"{name}_accuracy": accuracy, f"{name}_loss": loss}
            total = sum(self.splits[name].rows for name in splits)
            tell(total, total)
        return metrics

    def commit(self, state: State[Network], removal: Removal, model: Network, done: Round) -> Round:
        """Make the round last, then tell MLflow."""
        with self.progress.step("commit"):
            self.folder.write_bytes(self.folder.checkpoint(done.number), model.weights)
            self.removed = merged(self.removed, removal.excluded)
            metrics = {**done.metrics, **self._probe_metrics}
            if self._true_labels_known():
                found = measuring.detection(self.splits["train"], self.removed)
                metrics |= _known(removal_precision=found.precision, removal_recall=found.recall)
        done = replace(done, metrics=metrics, seconds=self.progress.seconds_of_round())
        self.ledger.commit(done)
        # the next round's features are those of the new backbone: the old ones are not asked for again
        self.folder.keep_only_features(models.backbone_fingerprint(load_network(model), self.inputs.spec.head))
        self.tell_round(done, removal.figures)
        self.progress.say(self._line(done))
        return done

    def new_head(self, model: Network, backbone: str, excluded: Excluded) -> Network:
        """The network with the probe on what is not excluded as its head."""
        refined = self._fit(backbone, excluded)
        weight, bias = refined.standardizer.fold(refined.probe.weights)
        changed = load_network(model)
        models.replace_head(changed, self.inputs.spec.head, weight.float(), bias.float())
        return self.network(models.to_bytes(changed))

    def as_steps(self) -> Steps[str, Fitted, Scored, Removal, Network]:
        """The steps as `posttrain.rounds.clean` takes them."""
        return Steps(self.embed, self.fit, self.score, self.select, self.count, self.refine, self.evaluate, self.commit)

    # -- before the first round ------------------------------------------------------------------------

    def begin(self, model: Network) -> State[Network]:
        """Round 0: the model as it came, everything embedded once and what cannot be read quarantined."""
        self.folder.write_bytes(self.folder.checkpoint(0), model.weights)
        self.progress.begin_round(0)
        backbone = self._embed(model, [name for name in ("train", "validation", "test") if name in self.splits])
        metrics = self.evaluate(State((), model, self._validation_samples), model)
        with self.progress.step("fit"):
            metrics |= self._refitted(backbone)
        done = Round(0, self._live(), 0, 0, metrics, self.progress.seconds_of_round())
        self.ledger.commit(done)
        self.tell_round(done, {})
        self.progress.say(self._line(done))
        return State((done,), model, self._validation_samples)

    def resume(self, rounds: tuple[Round, ...]) -> State[Network]:
        """The state after the last committed round."""
        path = self.folder.path("quarantine.parquet")
        if self.folder.exists(path):
            table = self.folder.read_table(path)
            table = table.filter(pc.equal(table["split"], "train"))
            self.quarantined = excluded_rows(table[BUCKET].to_numpy(), table[ROW].to_numpy())
        self.removed = self.ledger.excluded(rounds)
        for done in rounds:
            self.tell_round(done, {})
        weights = self.folder.read_bytes(self.folder.checkpoint(rounds[-1].number))
        return State(rounds, self.network(weights), self._validation_samples)

    def network(self, weights: bytes) -> Network:
        """The run's network with these weights."""
        model = models.build(
            self.inputs.spec.factory, classes=self.inputs.spec.classes, arguments=self.inputs.spec.arguments
        )
        models.load_bytes(model, weights)
        return Network(self.inputs.spec, weights, models.fingerprint(model))

    def train(
        self,
        model: Network,
        settings: TrainingSection,
        excluded: Excluded,
        *,
        name: str,
        seed: int,
        max_steps: int | None = None,
    ) -> Network:
        """The network trained on the training samples that are not excluded, through Ray Train."""
        if self.train_workers:
            # Ray Train waits for ever for CPUs and GPUs that the scoring workers hold
            self.workers.release()
        with self.progress.step(name) as tell:
            trained = refining.train(
                model,
                self.splits["train"],
                excluded,
                refining.Training(**settings.model_dump(exclude={"scope"}), max_steps=max_steps),
                seed=seed,
                workers=self.train_workers,
                gpus_per_worker=self.workers.gpus_per_worker,
                folder=self.folder,
                run_name=f"{name}-{seed}",
                progress=tell,
            )
        self.progress.say(
            f"  {name}: {trained.epochs} epochs, {trained.steps} steps, accuracy on the given labels "
            f"{100 * trained.train_accuracy:.1f} %"
        )
        return self.network(trained.weights)

    # -- what the steps share --------------------------------------------------------------------------

    def _embed(self, model: Network, splits: Iterable[str]) -> str:
        backbone = models.backbone_fingerprint(load_network(model), self.inputs.spec.head)
        summaries: dict[str, list[ShardSummary]] = {}
        for name in splits:
            split = self.splits[name]
            excluded = self.excluded if name == "train" else {}
            with self.progress.step("embed" if name == "train" else f"embed {name}") as tell:
                summaries[name] = self.workers.embed(
                    model,
                    split.buckets,
                    self.folder,
                    backbone=backbone,
                    split=name,
                    excluded=excluded,
                    progress=tell,
                )
        self._quarantine(summaries)
        return backbone

    def _quarantine(self, summaries: dict[str, list[ShardSummary]]) -> None:
        path = self.folder.path("quarantine.parquet")
        tables = []
        for name, found in summaries.items():
            table = quarantine_table(found)
            if table.num_rows:
                tables.append(table.append_column("split", pa.array([name] * table.num_rows)))
            if table.num_rows and name == "train":
                self.quarantined = excluded_rows(table[BUCKET].to_numpy(), table[ROW].to_numpy(), self.quarantined)
        before = self.folder.read_table(path) if self.folder.exists(path) else None
        if before is None or tables:
            known = set() if before is None else _keys(before)
            new = [t.filter(pa.array([key not in known for key in _keys_in_order(t)])) for t in tables]
            empty = quarantine_table([]).append_column("split", pa.array([], pa.string()))
            parts = [part for part in (before, *new) if part is not None and part.num_rows]
            self.folder.write_table(path, pa.concat_tables(parts) if parts else empty)
            count = sum(t.num_rows for t in new)
            if count:
                first = next(t for t in new if t.num_rows)
                self.progress.say(
                    f"  {count} samples cannot be read and are quarantined, the first: "
                    f"{first['file'][0].as_py()} (sample_id {first[SAMPLE_ID][0].as_py()}): "
                    f"{first['reason'][0].as_py()}; all in quarantine.parquet"
                )
        if self._live() <= 0:
            raise PosttrainError(
                "not one training sample can be read; quarantine.parquet in the run folder gives the reasons: "
                "are data.image and data.image_shape right?"
            )

    def _fit(self, backbone: str, excluded: Excluded) -> Fitted:
        key = (backbone, excluded_digest(excluded))
        if key not in self._fitted:
            raw = self._view(backbone, "train", excluded, None)
            standardizer = standardize(self.workers, raw)
            view = self._view(backbone, "train", excluded, standardizer)
            held_out = self._view(backbone, "validation", {}, standardizer)
            fits = []
            for damping in self.config.probe.damping:
                found = probe.fit(
                    self.workers.reducer(view),
                    classes=len(self.inputs.classes),
                    dim=len(standardizer.mean) + 1,
                    damping=damping,
                    start=fits[-1][0].weights if fits else None,
                )
                fits.append((found, *self._measure(held_out, found.weights)))
            best, loss, accuracy = min(fits, key=lambda fit: fit[1])
            # the last two serve: the probe after a removal is the next round's probe
            self._fitted = dict(list(self._fitted.items())[-1:])
            self._fitted[key] = Fitted(view, standardizer, best, loss, accuracy)
        return self._fitted[key]

    def _refitted(self, backbone: str) -> dict[str, float]:
        """Accuracies of the head refitted with nothing removed: what a removal has to be compared with."""
        fitted = self._fit(backbone, self.excluded)
        metrics = {"refit_validation_accuracy": fitted.validation_accuracy}
        if "test" in self.splits:
            view = self._view(backbone, "test", {}, fitted.standardizer)
            metrics["refit_test_accuracy"] = self._measure(view, fitted.probe.weights)[1]
        return metrics

    def _measure(self, view: View, weights: torch.Tensor) -> tuple[float, float]:
        """(mean cross-entropy, accuracy) of a linear head on a view."""
        count, loss, correct, _ = self.workers.reducer(view)(probe.loss_gradient, weights)
        return float(loss / count), float(correct / count)

    def _view(self, backbone: str, split: str, excluded: Excluded, standardizer: Standardizer | None) -> View:
        buckets = tuple(bucket.index for bucket in self.splits[split].buckets)
        return View(self.folder, backbone, split, buckets, excluded, standardizer)

    def _candidates(self, path: str) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """(ids, labels, score) with a score of -inf for what does not look wrong."""
        settings = self.config.removal
        columns = list(dict.fromkeys([SAMPLE_ID, LABEL, settings.score, "loo_margin"]))
        for table in self.folder.row_groups(path, columns):
            scores = table[settings.score].to_numpy().copy()
            if settings.score != "random":
                scores[table["loo_margin"].to_numpy() <= settings.threshold] = -np.inf
            yield table[SAMPLE_ID].to_numpy(), table[LABEL].to_numpy(), scores

    def _edges(self, path: str) -> np.ndarray:
        low, high = np.inf, -np.inf
        for table in self.folder.row_groups(path, [self.config.removal.score]):
            bounds = pc.min_max(table[0])
            if table.num_rows:
                low, high = min(low, bounds["min"].as_py()), max(high, bounds["max"].as_py())
        return np.linspace(low, high if high > low else low + 1, _BINS + 1)

    def _at_most(self, number: int, live: int) -> int:
        if self.quota is not None:
            return self.quota[number - 1]
        return max(1, int(self.config.removal.budget * live))

    def _live(self) -> int:
        return self.splits["train"].rows - sum(len(rows) for rows in self.excluded.values())

    @property
    def _validation_samples(self) -> int:
        return self.splits["validation"].rows

    def _true_labels_known(self) -> bool:
        from posttrain.cluster.reading import true_labels_are_known

        return true_labels_are_known(self.inputs.sources, self.inputs.noise)

    def tell_round(self, done: Round, figures: dict[str, bytes]) -> None:
        """The round in MLflow; one that MLflow has already stays as it is."""
        if self.tracking is None:
            return
        metrics: dict[str, float | None] = {
            "live": done.live,
            "candidates": done.candidates,
            "removed": done.removed,
            **done.metrics,
            **{f"seconds_{name.replace(' ', '_')}": value for name, value in done.seconds.items()},
        }
        settings = self.config.removal
        paths = ("removed.parquet",) if done.removed and self.folder.is_local else ()
        artifacts = [self.folder.local / "rounds" / f"{done.number:04d}" / name for name in (*paths, "round.json")]
        self.tracking.log_round(
            done.number,
            params={"score": settings.score, "budget": settings.budget, "scope": self.config.refine.scope},
            metrics=metrics,
            figures=figures,
            artifacts=artifacts if self.folder.is_local else [],
        )

    def _line(self, done: Round) -> str:
        parts = [f"round {done.number}: live {done.live:,}"]
        if done.number:
            parts.append(f"removed {done.removed:,} of {done.candidates:,} candidates")
        parts.append(f"validation accuracy {100 * done.metrics['validation_accuracy']:.1f} %")
        if "test_accuracy" in done.metrics:
            parts.append(f"test accuracy {100 * done.metrics['test_accuracy']:.1f} %")
        return ", ".join(parts)


def _known(**metrics: float | None) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if value is not None}


def _keys_in_order(table: pa.Table) -> list[str]:
    return [
        json.dumps(key)
        for key in zip(table["split"].to_pylist(), table[BUCKET].to_pylist(), table[ROW].to_pylist(), strict=True)
    ]


def _keys(table: pa.Table) -> set[str]:
    return set(_keys_in_order(table))


def average_precisions(folder: RunFolder, split: Split) -> dict[str, float]:
    """Average precision of every score of the first round against the labels known to be right (measuring)."""
    from sklearn.metrics import average_precision_score

    from posttrain.influence.scores import SCORES

    wrong = measuring.wrong_rows(split)
    table: Any = folder.read_table(folder.round(1, "scores.parquet"), [BUCKET, ROW, *SCORES])
    truth = np.array(
        [wrong[b][r] for b, r in zip(table[BUCKET].to_pylist(), table[ROW].to_pylist(), strict=True)], bool
    )
    if not truth.any():
        return {}
    return {name: float(average_precision_score(truth, table[name].to_numpy())) for name in SCORES}
