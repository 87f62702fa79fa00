"""`posttrain clean`: a noisy data set and a model in, a clean data set and a better model out.

Read from top to bottom: open the run, read the data into partitions, get the model, go round, write the results.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from posttrain import rounds
from posttrain.config import Data, RunFile, without_credentials, yaml
from posttrain.errors import ConfigError, DataError, StepError, TrackingError
from posttrain.report.progress import StepLog
from posttrain.report.summary import print_summary
from posttrain.schema import merged
from posttrain.store import lock
from posttrain.store.folder import RunFolder
from posttrain.store.ledger import Ledger, settings

if TYPE_CHECKING:
    from posttrain.cluster.reading import Split
    from posttrain.cluster.workers import Network, Workers
    from posttrain.runs.inputs import Inputs
    from posttrain.runs.steps import CleaningRun
    from posttrain.store.outbox import Outbox
    from posttrain.store.tracking import Tracking


def clean(config: RunFile, *, verbose: bool = False, quiet: bool = False) -> dict[str, Any]:
    """The summary of the run in `run.path`, begun, gone on with, or finished already.

    Progress goes to standard error; the summary table to standard output unless `quiet`. Raises PosttrainError.
    """
    began = time.perf_counter()
    progress = StepLog(Console(stderr=True))
    ledger = Ledger(RunFolder(config.run.path))
    summary = finished_already(ledger, config, progress)
    if summary is None:
        with opened(config, progress, verbose=verbose) as run:
            state = begun(run) or run.begin(first_model(run))
            outcome = rounds.clean(state, run.as_steps(), limits(config))
            progress.say(f"stopped: {outcome.reason}")
            outcome = run.concluded(outcome)
            summary = finish(run, outcome, began)
        summary["undelivered"] = undelivered(run.tracking)
    if not quiet:
        print_summary(Console(), summary)
    return summary


def limits(config: RunFile) -> rounds.Limits:
    """When the rounds of this run file end."""
    removal = config.removal
    return rounds.Limits(removal.max_rounds, removal.min_share, removal.patience)


def finished_already(ledger: Ledger, config: RunFile, progress: StepLog) -> dict[str, Any] | None:
    """The summary of a finished run; None where there is work. Refuses a folder of another run."""
    if not ledger.folder.is_local and config.tracking.uri is None:
        raise ConfigError(
            f"run.path = {config.run.path} is not on this machine, and SQLite cannot live there: "
            "set tracking.uri to an MLflow server"
        )
    ledger.folder.refuse_unwritable()
    started = ledger.started()
    if started is None or not ledger.is_begun():
        return None
    ledger.refuse_other_settings(started, config)
    summary = ledger.finished()
    if summary is not None:
        from posttrain.runs.inputs import list_files

        ledger.refuse_other_data(started, {"files": list_files(config)})
        progress.say(
            f"{config.run.path}: this {ledger.kind} is finished; nothing to do. For another, set run.path to a new "
            "folder."
        )
        summary["undelivered"] = deliver_rest(config, ledger.folder, progress)
    return summary


@contextmanager
def opened(config: RunFile, progress: StepLog, *, verbose: bool) -> Iterator[CleaningRun]:
    """The run with its data read and its tracking open, alone in its folder; closes what it opened."""
    folder = RunFolder(config.run.path)
    with ExitStack() as stack:
        held = stack.enter_context(lock.run_lock(folder))
        with progress.step("check the inputs"):
            from posttrain.runs.inputs import prepare

            inputs = prepare(config)
        tell_remarks(inputs, progress)
        run = _opened(config, inputs, folder, progress, stack, verbose=verbose)
        run.assert_held = held.assert_held
        yield run


def tell_remarks(inputs: Inputs, progress: StepLog) -> None:
    for remark in inputs.remarks:
        progress.say(remark)


def join_ray(config: RunFile, progress: StepLog, stack: ExitStack, *, verbose: bool) -> str | None:
    """Start Ray, or join the cluster whose address is returned; `stack` ends it."""
    with progress.step("start Ray"):
        from posttrain.cluster.session import cluster_address, session

        rays = config.ray
        address = cluster_address(rays.address)
        stack.enter_context(
            session(address=address, num_cpus=rays.num_cpus, object_store_gb=rays.object_store_gb, verbose=verbose)
        )
    if address is not None:
        from posttrain.cluster.nodes import refuse_unshared

        with progress.step("check the nodes"):
            refuse_unshared(config.run.path, locations(config.data))
    return address


def locations(data: Data) -> dict[str, tuple[str, ...]]:
    """Where the sets lie, by their keys in the run file; those that the driver itself makes lie nowhere."""
    given = {f"data.{name}": getattr(data, name) for name in ("train", "validation", "test")}
    return {key: (paths,) if isinstance(paths, str) else paths for key, paths in given.items() if paths is not None}


def read(config: RunFile, inputs: Inputs, progress: StepLog) -> tuple[dict[str, Split], dict[str, str]]:
    """All sets in partitions, and the fingerprint of the data: digests of files, ids and labels."""
    from posttrain.cluster import reading

    with progress.step("read") as tell:
        splits = reading.read(
            inputs.sources,
            classes=inputs.classes,
            held_out_share=inputs.held_out_share,
            noise=inputs.noise,
            seed=config.run.seed,
            ids_span_sets=config.data.id_scope == "all",
            progress=tell,
        )
    refuse_changed(config, inputs, splits)
    from posttrain.runs.inputs import refuse_one_class

    counts = splits["train"].class_counts
    split_off = " Or has the validation set taken the others (data.validation_share)?" if inputs.held_out_share else ""
    refuse_one_class(config, [name for name, count in zip(inputs.classes, counts, strict=True) if count], split_off)
    return splits, {"files": inputs.listing, **{name: split.digest for name, split in splits.items()}}


def refuse_changed(config: RunFile, inputs: Inputs, splits: dict[str, Split]) -> None:
    """Raises DataError where other samples were read than the files held when they were listed."""
    found = {name: split.rows for name, split in splits.items()}
    if inputs.held_out_share is not None:
        found["train"] += found.pop("validation")
    for name, rows in inputs.rows.items():
        if found[name] != rows:
            raise DataError(
                f"data.{name} = {getattr(config.data, name)}: held {rows:,} samples when its files were listed, and "
                f"{found[name]:,} when they were read; leave them as they are, and start again"
            )


def claim(ledger: Ledger, config: RunFile, fingerprint: dict[str, str]) -> None:
    """Make the folder that of this run, or search. Refuses one that was begun on other data."""
    started = ledger.started()
    if started is not None and ledger.is_begun():
        ledger.refuse_other_data(started, fingerprint)
    elif started is None or (started.get("config"), started.get("data")) != (settings(config), fingerprint):
        # nothing but features and what came of them can lie there yet, and those may be of other data
        ledger.folder.keep_only_features("")
        for name in ("quarantine.parquet", "leakage.parquet"):
            ledger.folder.delete(ledger.folder.path(name))
        ledger.start(config, fingerprint)


def crew(config: RunFile, *, on_cluster: bool) -> tuple[Workers, int]:
    """The workers that embed and score, and how many train; 0: the driver does."""
    from posttrain.cluster.devices import refuse_missing_gpus
    from posttrain.cluster.workers import Workers

    rays = config.ray
    workers = Workers(
        count=rays.workers,
        cpus=rays.cpus_per_worker,
        gpus=rays.gpus_per_worker,
        on_cluster=on_cluster,
    )
    # local mode on one machine; a cluster's GPUs are not where the driver is
    train_workers = rays.train_workers if rays.train_workers is not None else int(on_cluster)
    if not on_cluster and rays.gpus_per_train_worker:
        refuse_missing_gpus("ray.gpus_per_train_worker", rays.gpus_per_train_worker, max(1, train_workers))
    return workers, train_workers


def _opened(
    config: RunFile, inputs: Inputs, folder: RunFolder, progress: StepLog, stack: ExitStack, *, verbose: bool
) -> CleaningRun:
    address = join_ray(config, progress, stack, verbose=verbose)
    from posttrain.runs import leakage
    from posttrain.runs.steps import CleaningRun

    splits, fingerprint = read(config, inputs, progress)
    leaks = leakage.find(config, splits, inputs.spec.image.shape, fingerprint, Ledger(folder), progress)
    claim(Ledger(folder), config, fingerprint)
    workers, train_workers = crew(config, on_cluster=address is not None)
    if not train_workers:
        workers.start()  # they import torch while MLflow makes its tables
    with progress.step("open MLflow"):
        tracking = stack.enter_context(open_outbox(config, inputs, folder, fingerprint, progress))
    run = CleaningRun(config, inputs, splits, folder, workers, train_workers, tracking, progress)
    run.leave_out(leaks)
    return run


def open_tracking(config: RunFile, folder: RunFolder, *, home: RunFolder | None = None) -> Tracking:
    """The run's parent in MLflow; the one that it has already where it goes on.

    `home`: the folder of the job whose database the run shares, where tracking.uri is null.
    """
    from posttrain.store.tracking import Tracking

    path = folder.path("tracking.json")
    known = folder.read_json(path) if folder.exists(path) else {}
    if "run_id" not in known and config.tracking.uri is None and home is None:
        # a run that was killed while MLflow made its tables: half of them cannot be gone on with
        for left in folder.local.glob("mlflow.db*"):
            left.unlink()
    if "key" not in known:
        # before MLflow has the run: it is found again by this, should we be killed before we have its id
        known["key"] = uuid.uuid4().hex
        folder.write_json(path, known)
    tracking = Tracking.open(
        config.tracking.uri,
        run_folder=(home or folder).local if folder.is_local else Path("."),
        experiment=config.tracking.experiment,
        run_name=config.run.path.rstrip("/").rsplit("/", 1)[-1],
        run_id=known.get("run_id"),
        key=known["key"],
        params=settings(config),
        tags={"posttrain.run": without_credentials(config.run.path)},
    )
    if not tracking.resumed:
        known |= {"uri": without_credentials(tracking.uri), "run_id": tracking.run_id}
        folder.write_json(path, known)
    return tracking


def open_outbox(
    config: RunFile, inputs: Inputs, folder: RunFolder, fingerprint: dict[str, str], progress: StepLog
) -> Outbox:
    """What the run tells MLflow through: from here on it goes on also where MLflow does not answer."""
    from posttrain.store.outbox import Outbox

    outbox = Outbox.of(open_tracking(config, folder), folder, progress.say)
    log_data(outbox, config, inputs, fingerprint)
    return outbox


def log_data(tracking: Tracking | Outbox, config: RunFile, inputs: Inputs, fingerprint: dict[str, str]) -> None:
    """Every named set as an input of the MLflow run."""
    for name in inputs.sources:
        tracking.log_dataset(
            f"{config.data.source}/{name}",
            fingerprint[name],
            without_credentials(str(getattr(config.data, name) or name)),
            {"classes": len(inputs.classes), "digest": fingerprint[name]},
        )


def deliver_rest(config: RunFile, folder: RunFolder, progress: StepLog) -> dict[str, Any] | None:
    """Tell MLflow what it did not take of a finished run; what is left of it after that, as `Outbox.undelivered`."""
    from posttrain.store.outbox import Outbox, waiting

    left = waiting(folder)
    if not left:
        return None
    with lock.run_lock(folder), progress.step("open MLflow"):
        try:
            outbox = Outbox.of(open_tracking(config, folder), folder, progress.say)
        except TrackingError as error:
            uri = without_credentials(config.tracking.uri or "the run folder's database")
            return {"messages": len(left), "server": uri, "why": str(error)}
        outbox.deliver()
    return outbox.undelivered()


def undelivered(tracking: Tracking | Outbox | None) -> dict[str, Any] | None:
    """{messages, server, why} of what MLflow did not take and the run folder keeps; None where there is nothing."""
    from posttrain.store.outbox import Outbox

    return tracking.undelivered() if isinstance(tracking, Outbox) else None


def begun(run: CleaningRun) -> Any:
    """The state to go on from; None where no round is committed yet."""
    committed = run.ledger.rounds()
    if not committed:
        return None
    run.progress.say(f"{run.config.run.path}: going on after round {committed[-1].number}")
    return run.resume(committed)


def first_model(run: CleaningRun) -> Network:
    """The model to clean with: the given weights, or the network trained on the given labels first."""
    if run.inputs.weights is not None:
        return run.network(run.inputs.weights)
    path = run.folder.path("pretrained", "model.safetensors")
    if run.folder.exists(path):
        run.progress.say(f"pre-trained already: {path}")
        return run.network(run.folder.read_bytes(path))
    run.progress.say("no model.weights given: training the network on the given labels first")
    from posttrain.runs.inputs import untrained

    model = run.train(
        run.network(untrained(run.config, run.inputs)),
        run.config.pretrain,
        run.live,
        name="pretrain",
        seed=run.config.run.seed,
    )
    run.folder.write_bytes(path, model.weights)
    return model


def finish(run: CleaningRun, outcome: rounds.Outcome[Network], began: float) -> dict[str, Any]:
    """Write what the run leaves behind; return its summary, which is written last."""
    from posttrain.store import results
    from posttrain.store.outbox import Outbox
    from posttrain.store.scores import delete_score_shards

    folder, state, classes = run.folder, outcome.state, run.inputs.classes
    numbers = [r.number for r in state.history if r.removed or r.relabelled]
    # the latest word on what is kept: also of a round that removed nothing, while a boundary put on last has none
    scored = next((n for n in range(state.number + 1, 0, -1) if folder.exists(folder.round(n, "scores.parquet"))), 0)
    if not scored:
        raise StepError("no round has scored the samples: removal.max_rounds has to be at least 1")
    last_scores = folder.round(scored, "scores.parquet")
    files: dict[str, str] = {}
    with run.progress.step("results") as tell:
        folder.write_bytes(folder.path("model.safetensors"), state.model.weights)
        write_model(run, state.model)
        removed = results.write_taken(folder, "removed", numbers or [scored], classes)
        relabelled = sum(r.relabelled for r in state.history)
        if relabelled:
            results.write_taken(folder, "relabelled", numbers, classes)
        relabelled_now = run.ledger.relabelled(state.history)
        results.write_issues(folder, numbers, last_scores, run.live.excluded, relabelled_now, classes)
        kept = state.live
        if run.config.results.cleaned in ("both", "parquet"):
            from posttrain.cluster.writing import write_cleaned

            run.workers.make_room()
            data = run.config.data
            kept = write_cleaned(
                run.splits["train"],
                run.excluded,
                run.relabelled,
                folder,
                columns=(data.id, data.image, data.label),
                classes=classes,
                progress=tell,
            )
            files["clean data set"] = folder.path("cleaned")
        if run.config.results.cleaned in ("both", "manifest"):
            kept = results.write_manifest(folder, last_scores, run.excluded, run.relabelled)
            files["its ids"] = folder.path("manifest.parquet")
        files |= {
            "what was removed": folder.path("removed.parquet"),
            "issues": folder.path("issues.csv"),
            "refined weights": folder.path("model.safetensors"),
            "how to build the model": folder.path("model.yaml"),
        }
        if relabelled:
            files["what was relabelled"] = folder.path("relabelled.parquet")
    earlier = sum(len(rows) for rows in run.earlier.excluded.values())
    # what an earlier run removed, and is left out by now for another reason, counts once
    either = merged(run.quarantined, run.earlier.excluded)
    quarantined = sum(len(rows) for rows in either.values()) - earlier
    check_counts(run.splits["train"].rows, kept, removed, quarantined, earlier)
    first, last = state.history[0].metrics, state.history[-1].metrics
    if run.tracking is not None:
        with run.progress.step("log the model"):
            files["MLflow"] = log_results(run, outcome)
    summary = {
        "run": without_credentials(run.config.run.path),
        "rounds": state.number,
        "ended": outcome.reason,
        "live": kept,
        "removed": removed,
        "relabelled": relabelled,
        "quarantined": quarantined,
        "leakage": run.leaks,
        "noise": run.noise,
        "boundary": run.boundaries.as_record(),
        **{
            f"{split}_accuracy_{when}": metrics.get(f"{split}_accuracy")
            for split in ("validation", "test")
            for when, metrics in (("before", first), ("after", last))
        },
        "test_accuracy_refit": first.get("refit_test_accuracy"),
        "test_accuracy_boundary": first.get("boundary_test_accuracy"),
        "removal_precision": last.get("removal_precision"),
        "removal_recall": last.get("removal_recall"),
        "relabel_accuracy": last.get("relabel_accuracy"),
        "seconds": round(time.perf_counter() - began, 1),
        "steps": {name: round(seconds, 2) for name, seconds in run.progress.seconds.items()},
        "files": files,
    }
    # those of the last look, which was no round
    delete_score_shards(folder, scored)
    folder.clear_half_written()
    if isinstance(run.tracking, Outbox):
        # before the summary: a run that has one is gone on with by nobody
        run.tracking.finish()
    run.ledger.finish(summary)
    return summary


def write_model(run: CleaningRun, model: Network) -> None:
    """`model.yaml`: the section `model` of a run file that takes the refined model."""
    from posttrain.runs.steps import recipe

    spec = model.spec
    section = {
        **recipe(spec),
        "weights": run.folder.path("model.safetensors"),
        "channels": spec.image.channels,
        "image_size": list(spec.image.size),
        "mean": list(spec.image.mean),
        "std": list(spec.image.std),
    }
    text = "# Written by posttrain: this section of a run file takes the refined model.\n"
    run.folder.write_bytes(run.folder.path("model.yaml"), (text + yaml.dump({"model": section})).encode())


def check_counts(samples: int, kept: int, removed: int, quarantined: int, earlier: int = 0) -> None:
    """Every input sample is in exactly one of kept, removed (by this run or an earlier one of its job), quarantined."""
    if kept + removed + quarantined + earlier != samples:
        before = f" + {earlier} removed by earlier runs" if earlier else ""
        raise StepError(
            f"the counts do not add up: {kept} kept + {removed} removed{before} + {quarantined} quarantined is not "
            f"{samples}; the run folder is left as it is, please report this with its rounds/*/round.json"
        )


def log_results(run: CleaningRun, outcome: rounds.Outcome[Network]) -> str:
    """Artifacts and the final model in MLflow; where to look at them."""
    tracking = run.tracking
    assert tracking is not None
    if run.folder.is_local:
        for name in (
            "run.yaml",
            "model.yaml",
            "removed.parquet",
            "relabelled.parquet",
            "issues.csv",
            "leakage.parquet",
        ):
            if (run.folder.local / name).exists():
                tracking.log_artifact(run.folder.local / name)
        if run.config.tracking.log_model:
            log_model(tracking, outcome.state.model, run.folder.local / "model.safetensors")
    leaks = {f"leaked_{name}": float(count["samples"]) for name, count in (run.leaks or {}).items()}
    tracking.log_metrics({"rounds": outcome.state.number, **leaks}, step=outcome.state.number)
    return (
        f"mlflow ui --backend-store-uri {tracking.uri}"
        if tracking.uri.startswith("sqlite:")
        else without_credentials(tracking.uri)
    )


def log_model(tracking: Tracking | Outbox, model: Network, weights: Path) -> str | None:
    """The URI of the model as it is logged in MLflow, where that is known; `weights` is its safetensors file."""
    spec = model.spec
    return tracking.log_model(
        weights,
        factory=spec.factory,
        arguments=spec.arguments,
        classes=spec.classes,
        head=spec.head,
        image={
            "channels": spec.image.channels,
            "size": spec.image.size,
            "mean": spec.image.mean,
            "std": spec.image.std,
            "shape": spec.image.shape,
        },
    )
