"""The run itself: the challenger is made, measured beside the champion, and the decision taken.

The only module of the jobs that knows how a run of `posttrain clean` is carried out.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from posttrain.config import Gate, JobFile, RunFile
from posttrain.data.listing import File
from posttrain.jobs import champion as champions
from posttrain.jobs import gate, previous_runs
from posttrain.jobs.attempt import Attempt
from posttrain.jobs.gate import BatchCounts, ClassCounts, Decision
from posttrain.jobs.inventory import Inventory, batch_names, file_names
from posttrain.jobs.job_folder import Base, JobFolder
from posttrain.jobs.new_data import counts_by_batch
from posttrain.jobs.summary import challenger_metrics, embedded_sentences
from posttrain.report.progress import StepLog
from posttrain.runs import open as opening
from posttrain.runs import tracking as run_tracking
from posttrain.runs.read import read
from posttrain.schema import PARTITION, ROW
from posttrain.store.ledger import Ledger

if TYPE_CHECKING:
    from posttrain.cluster.network import Network
    from posttrain.live import Live
    from posttrain.rounds import Outcome, State
    from posttrain.runs.context import Run
    from posttrain.runs.fit import Fitted
    from posttrain.runs.inputs import Inputs
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
    opening.say_remarks(inputs, progress)
    with _opened(run_config, inputs, job, attempt, progress, assert_held, verbose=verbose) as (run, tracking, digests):
        from posttrain.runs.begin import begin_or_resume
        from posttrain.runs.clean import cleaned
        from posttrain.runs.finish import finish

        previous = previous_runs.of_champion(
            job, inventory.state.runs[::-1], attempt.champion, run.splits["train"], digests, progress.say
        )
        run = replace(run, previous=previous)
        state = begin_or_resume(run)
        champion = _champion_by_class(run, state, registry, attempt)
        outcome = cleaned(run, state)
        summary = finish(run, outcome, began)
        with progress.step("compare"):
            compared, decision = _compare(run, outcome, inventory, champion, config.gate)
        embedded = _say_embedded(run)
        assert_held()
        with progress.step("keep"):
            kept = _keep(run, outcome, job, attempt)
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
            "previously_removed": len(previous.removal.removed),
            "embedded": embedded,
        }
        tracking.log_metrics(challenger_metrics(record))
    return record


@contextmanager
def _opened(
    config: RunFile,
    inputs: Inputs,
    job: JobFolder,
    attempt: Attempt,
    progress: StepLog,
    assert_held: Callable[[], None],
    *,
    verbose: bool,
) -> Iterator[tuple[Run, Tracking, dict[str, str]]]:
    """The run with its data read, its run in MLflow, and the digests of the data."""
    with ExitStack() as stack:
        address = opening.join_ray(config, progress, stack, verbose=verbose)
        from posttrain.runs import leakage
        from posttrain.runs.context import Run

        splits, digests = read(config, inputs, progress)
        ledger = Ledger(attempt.folder, assert_held=assert_held)
        leaks = leakage.find(config, splits, inputs.spec.image.shape, digests, ledger, progress)
        opening.init_folder(ledger, config, digests)
        leakage.record(leaks, ledger)
        workers, train_workers = opening.make_workers(config, progress, on_cluster=address is not None)
        if not train_workers:
            workers.start()
        with progress.step("open MLflow"):
            tracking = stack.enter_context(run_tracking.open_tracking(config, attempt.folder, home=job.folder))
            run_tracking.log_data(tracking, config, inputs, digests)
        run = Run(config, inputs, splits, leaks, ledger, workers, train_workers, tracking, progress)
        yield run, tracking, digests


def _champion_by_class(
    run: Run, state: State[Network, Fitted], registry: Registry, attempt: Attempt
) -> ClassCounts | None:
    """The champion on the held-out set; measured once, while the features of its base network are there."""
    if attempt.champion is None:
        return None
    from posttrain.runs.evaluate import by_class
    from posttrain.runs.networks import network_of

    path = run.folder.path("champion.json")
    if not run.folder.exists(path):
        with run.progress.step("champion"):
            network = network_of(
                run, *champions.own_network(registry, attempt.champion, run.config.model, run.inputs.spec)
            )
            samples, correct = by_class(run, state, network, on=state.base)
        run.folder.write_json(path, {"samples": samples, "correct": correct})
    record = run.folder.read_json(path)
    return ClassCounts(tuple(record["samples"]), tuple(record["correct"]))


def _counts_by_batch(run: Run, live: Live, files: list[File]) -> dict[str, BatchCounts]:
    """What the run found in these files, by batch."""
    names = file_names(run.config.data, files)
    return counts_by_batch(
        run.splits["train"],
        names,
        batch_names(run.config.data, names),
        scores=run.folder.row_groups(run.folder.round(1, "scores.parquet"), [PARTITION, ROW, "mislabel_odds"]),
        min_log_odds=run.config.removal.min_log_odds,
        acted_on=run.ledger.removal(run.ledger.rounds()).acted_on,
        left_out=live.quarantined | live.previously_removed,
    )


@dataclass(frozen=True)
class Compared:
    """What the decision rests on."""

    champion: ClassCounts | None
    challenger: ClassCounts
    new_data: BatchCounts


def _compare(
    run: Run, outcome: Outcome[Network, Fitted], inventory: Inventory, champion: ClassCounts | None, rules: Gate
) -> tuple[Compared, Decision]:
    """What was compared, and the decision: first the alarm, then the gate."""
    from posttrain.runs.evaluate import by_class

    state = outcome.state
    challenger = ClassCounts(*by_class(run, state, state.model))
    new_data = _counts_by_batch(run, state.live, inventory.checked)
    others = gate.combined([*new_data.values(), *_counts_by_batch(run, state.live, inventory.exempt).values()])
    history = state.history
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


def _say_embedded(run: Run) -> dict[str, dict[str, int]]:
    """By split: images that went through the backbone the run began with, of how many, and through later ones."""
    from posttrain.runs.embed import embedded_counts

    found = {}
    for split, counts in embedded_counts(run).items():
        (new, of), *later = counts.values()
        found[split] = {"new": new, "of": of, "for_new_weights": sum(count for count, _ in later)}
    for line in embedded_sentences(found):
        run.progress.say(line)
    return found


def _keep(run: Run, outcome: Outcome[Network, Fitted], job: JobFolder, attempt: Attempt) -> dict[str, Any]:
    """Write what later runs start from: the base network, and all samples acted on so far; its part of the record."""
    from posttrain.cluster import matching
    from posttrain.runs.commit import acted_on_so_far
    from posttrain.runs.conclude import base_network
    from posttrain.runs.networks import recipe

    state, previous = outcome.state, run.previous
    base = base_network(run, state)
    job.keep_base(
        Base(
            base.digest,
            recipe(base.spec),
            run.inputs.classes,
            base.weights,
            initial_weights_known=run.inputs.initial_weights is not None,
        )
    )
    confidence = pa.concat_tables([previous.self_confidence, run.ledger.self_confidence(state.history)])
    acted_on = matching.describe_acted_on(run.splits["train"], acted_on_so_far(state.live), confidence)
    attempt.folder.write_table(attempt.folder.path(previous_runs.ACTED_ON), acted_on)
    # no round removes a validation label: what any round saw of them still holds
    seen = [done.metrics["validation_noise"] for done in state.history if done.metrics.get("validation_noise")]
    noise = seen[-1] if seen else previous.validation_noise
    return {"base": base.digest, "acted_on": acted_on.num_rows, "validation_noise": noise}


def _log_model(tracking: Tracking, model: Network) -> str | None:
    """The URI of the model as it is logged in MLflow."""
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder, "model.safetensors")
        weights.write_bytes(model.weights)
        return run_tracking.log_model(tracking, model, weights)
