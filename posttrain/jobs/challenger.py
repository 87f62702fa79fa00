"""The run itself: the challenger is made, measured beside the champion, and the decision taken.

The only module of the jobs that knows how a run of `posttrain clean` is carried out.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from posttrain import rounds
from posttrain.config import Gate, JobFile, RunFile
from posttrain.data.listing import File
from posttrain.jobs import champion as champions
from posttrain.jobs import gate, previous_runs
from posttrain.jobs.attempt import Attempt
from posttrain.jobs.gate import BatchCounts, ClassCounts, Decision
from posttrain.jobs.inventory import Inventory, batch_names, file_names
from posttrain.jobs.job_folder import Base, JobFolder
from posttrain.jobs.new_data import counts_by_batch
from posttrain.jobs.previous_runs import PreviousRuns
from posttrain.jobs.summary import challenger_metrics, embedded_sentences
from posttrain.live import Removal
from posttrain.report.progress import StepLog
from posttrain.runs import clean
from posttrain.schema import PARTITION, ROW
from posttrain.store.ledger import Ledger

if TYPE_CHECKING:
    from posttrain.cluster.workers import Network
    from posttrain.rounds import Outcome
    from posttrain.runs.inputs import Inputs
    from posttrain.runs.steps import CleaningRun
    from posttrain.store.registry import Registry
    from posttrain.store.tracking import Tracking


def make_challenger(
    config: JobFile,
    job: JobFolder,
    registry: Registry,
    inventory: Inventory,
    attempt: Attempt,
    progress: StepLog,
    *,
    assert_held: Callable[[], None],
    verbose: bool,
) -> dict[str, Any]:
    """What the run came to and what was decided: the content of decision.json, which the caller writes.

    `assert_held` raises where another start of the job has taken over; it is called before anything is made to last.
    """
    began = time.perf_counter()
    with progress.step("check the inputs"):
        base = champions.base_network(config, job, registry, attempt.champion)
        run_config = champions.run_file(config, attempt.folder, base)
        inputs = champions.prepare_inputs(run_config, inventory.files, base)
    clean.tell_remarks(inputs, progress)
    with _opened(run_config, inputs, job, attempt, progress, verbose=verbose) as (run, tracking, digests):
        run.assert_held = assert_held
        previous = previous_runs.of_champion(job, attempt.champion, run.splits["train"], digests, progress.say)
        _take_over(run, previous, job, inventory.state.runs)
        state = clean.begun(run) or run.begin(clean.first_model(run))
        champion = _champion_by_class(run, registry, attempt)
        outcome = rounds.clean(state, run.as_steps(), clean.limits(run_config))
        progress.say(f"stopped: {outcome.reason}")
        outcome = run.concluded(outcome)
        summary = clean.finish(run, outcome, began)
        with progress.step("compare"):
            compared, decision = _compare(run, outcome, inventory, champion, config.gate)
        embedded = _embedded(run)
        for line in embedded_sentences(embedded):
            progress.say(line)
        assert_held()
        with progress.step("keep"):
            kept = _keep(run, outcome, job, attempt, previous)
        model_uri = None
        if decision.verdict != "alarm":
            assert_held()
            with progress.step("log the model"):
                model_uri = _log_model(tracking, outcome.state.model)
        record = {
            **asdict(decision),
            **asdict(compared),
            **kept,
            **{name: summary[name] for name in ("rounds", "live", "removed", "relabelled", "quarantined")},
            "model": model_uri,
            "mlflow_run": tracking.run_id,
            "parent": attempt.champion.number if attempt.champion else None,
            "data": digests,
            "measured_on": "test" if "test" in run.splits else "validation",
            "removed_earlier": len(previous.removal.removed),
            "embedded": embedded,
        }
        tracking.log_metrics(challenger_metrics(record))
    return record


@contextmanager
def _opened(
    config: RunFile, inputs: Inputs, job: JobFolder, attempt: Attempt, progress: StepLog, *, verbose: bool
) -> Iterator[tuple[CleaningRun, Tracking, dict[str, str]]]:
    """The run with its data read, its run in MLflow, and the digests of the data."""
    with ExitStack() as stack:
        address = clean.join_ray(config, progress, stack, verbose=verbose)
        from posttrain.runs import leakage
        from posttrain.runs.steps import CleaningRun

        splits, digests = clean.read(config, inputs, progress)
        ledger = Ledger(attempt.folder)
        leaks = leakage.find(config, splits, inputs.spec.image.shape, digests, ledger, progress)
        clean.claim(ledger, config, digests)
        workers, train_workers = clean.crew(config, on_cluster=address is not None)
        if not train_workers:
            workers.start()
        with progress.step("open MLflow"):
            tracking = stack.enter_context(clean.open_tracking(config, attempt.folder, home=job.folder))
            clean.log_data(tracking, config, inputs, digests)
        run = CleaningRun(config, inputs, splits, attempt.folder, workers, train_workers, tracking, progress)
        run.leave_out(leaks)
        yield run, tracking, digests


def _take_over(run: CleaningRun, previous: PreviousRuns, job: JobFolder, finished: tuple[str, ...]) -> None:
    """Start the run where the previous ones ended: with what they acted on, and the features of the finished ones."""
    from posttrain.runs.steps import Before

    run.take_over(
        previous.removal,
        [job.run(name) for name in reversed(finished)],
        Before(previous.self_confidence, previous.validation_noise),
    )


def _champion_by_class(run: CleaningRun, registry: Registry, attempt: Attempt) -> ClassCounts | None:
    """The champion on the held-out set; measured once, while the features of its base network are there."""
    if attempt.champion is None:
        return None
    path = run.folder.path("champion.json")
    if not run.folder.exists(path):
        with run.progress.step("champion"):
            network = run.network(*champions.own_network(registry, attempt.champion, run.config.model, run.inputs.spec))
            samples, correct = run.by_class(network, on=run.first)
        run.folder.write_json(path, {"samples": samples, "correct": correct})
    record = run.folder.read_json(path)
    return ClassCounts(tuple(record["samples"]), tuple(record["correct"]))


def _counts_by_batch(run: CleaningRun, files: list[File]) -> dict[str, BatchCounts]:
    """What the run found in these files, by batch."""
    names = file_names(run.config.data, files)
    return counts_by_batch(
        run.splits["train"],
        names,
        batch_names(run.config.data, names),
        scores=run.folder.row_groups(run.folder.round(1, "scores.parquet"), [PARTITION, ROW, "mislabel_odds"]),
        least_odds=run.config.removal.least_odds,
        acted_on=run.ledger.removal(run.ledger.rounds()).acted_on,
        left_out=run.live.quarantined | run.live.previously_removed,
    )


@dataclass(frozen=True)
class Compared:
    """What the decision rests on."""

    champion: ClassCounts | None
    challenger: ClassCounts
    new_data: BatchCounts


def _compare(
    run: CleaningRun, outcome: Outcome[Network], inventory: Inventory, champion: ClassCounts | None, rules: Gate
) -> tuple[Compared, Decision]:
    """What was compared, and the decision: first the alarm, then the gate."""
    challenger = ClassCounts(*run.by_class(outcome.state.model))
    new_data = _counts_by_batch(run, inventory.checked)
    others = gate.combined([*new_data.values(), *_counts_by_batch(run, inventory.exempt).values()])
    history = outcome.state.history
    acted_on = sum(done.removed + done.relabelled for done in history)
    older = BatchCounts(history[0].live - others.samples, 0, acted_on - others.acted_on)
    decision = gate.alarm(
        new_data,
        # without a champion nothing has been cleaned yet
        older if champion else gate.NO_DATA,
        alarm_share=rules.alarm_share,
        alarm_samples=rules.alarm_samples,
        alarm_older_share=rules.alarm_older_share,
    ) or gate.compare(
        champion,
        challenger,
        margin=rules.margin,
        class_drop=rules.class_drop,
        class_samples=rules.class_samples,
        classes=run.inputs.classes,
    )
    return Compared(champion, challenger, gate.combined(new_data.values())), decision


def _embedded(run: CleaningRun) -> dict[str, dict[str, int]]:
    """By split: images that went through the backbone the run began with, of how many, and through later ones."""
    found = {}
    for split, counts in run.through_backbones().items():
        (new, of), *later = counts.values()
        found[split] = {"new": new, "of": of, "for_new_weights": sum(count for count, _ in later)}
    return found


def _keep(
    run: CleaningRun, outcome: Outcome[Network], job: JobFolder, attempt: Attempt, previous: PreviousRuns
) -> dict[str, Any]:
    """Write what later runs start from: the base network, and all samples acted on so far; its part of the record."""
    from posttrain.cluster import matching
    from posttrain.runs.steps import recipe

    base = run.base_of(outcome.state)
    job.keep_base(Base(base.key, recipe(base.spec), run.inputs.classes, base.weights))
    confidence = pa.concat_tables([previous.self_confidence, run.ledger.support(outcome.state.history)])
    removal = Removal(run.live.removed | run.live.previously_removed, run.live.relabelled)
    acted_on = matching.taken_out(run.splits["train"], removal, confidence)
    attempt.folder.write_table(attempt.folder.path(previous_runs.ACTED_ON), acted_on)
    noise = outcome.state.history[-1].metrics.get("held_out_noise", previous.validation_noise)
    return {"base": base.key, "acted_on": acted_on.num_rows, "validation_noise": noise}


def _log_model(tracking: Tracking, model: Network) -> str | None:
    """The URI of the model as it is logged in MLflow."""
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder, "model.safetensors")
        weights.write_bytes(model.weights)
        return clean.log_model(tracking, model, weights)
