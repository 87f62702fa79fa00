"""Open a run: alone in its folder, with its data read, its workers started and MLflow at hand."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from posttrain.config import Data, RunFile
from posttrain.errors import ConfigError
from posttrain.report.progress import StepLog
from posttrain.runs.read import read
from posttrain.runs.tracking import deliver_rest, open_outbox
from posttrain.store import lock
from posttrain.store.folder import RunFolder
from posttrain.store.ledger import Ledger, settings

if TYPE_CHECKING:
    from posttrain.cluster.workers import Workers
    from posttrain.runs.context import Run
    from posttrain.runs.inputs import Inputs


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
def opened(config: RunFile, progress: StepLog, *, verbose: bool) -> Iterator[Run]:
    """The run with its data read and its tracking open, alone in its folder; closes what it opened."""
    folder = RunFolder(config.run.path)
    with ExitStack() as stack:
        held = stack.enter_context(lock.run_lock(folder))
        with progress.step("check the inputs"):
            from posttrain.runs.inputs import prepare

            inputs = prepare(config)
        say_remarks(inputs, progress)
        address = join_ray(config, progress, stack, verbose=verbose)
        from posttrain.runs import leakage
        from posttrain.runs.context import Run

        ledger = Ledger(folder, assert_held=held.assert_held)
        splits, fingerprint = read(config, inputs, progress)
        leaks = leakage.find(config, splits, inputs.spec.image.shape, fingerprint, ledger, progress)
        init_folder(ledger, config, fingerprint)
        leakage.record(leaks, ledger)
        workers, train_workers = make_workers(config, progress, on_cluster=address is not None)
        if not train_workers:
            workers.start()  # they import torch while MLflow makes its tables
        with progress.step("open MLflow"):
            tracking = stack.enter_context(open_outbox(config, inputs, folder, fingerprint, progress))
        yield Run(config, inputs, splits, leaks, ledger, workers, train_workers, tracking, progress)


def say_remarks(inputs: Inputs, progress: StepLog) -> None:
    """Say what the user should know of the data before the run begins."""
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


def init_folder(ledger: Ledger, config: RunFile, fingerprint: dict[str, str]) -> None:
    """Make the folder that of this run, or search. Refuses one that was begun on other data."""
    started = ledger.started()
    if started is not None and ledger.is_begun():
        ledger.refuse_other_data(started, fingerprint)
    elif started is None or (started.get("config"), started.get("data")) != (settings(config), fingerprint):
        # only features and what was found while embedding can be there, and they may be of other data
        ledger.folder.keep_only_features("")
        for name in ("quarantine.parquet", "leakage.parquet"):
            ledger.folder.delete(ledger.folder.path(name))
        ledger.start(config, fingerprint)


def make_workers(config: RunFile, progress: StepLog, *, on_cluster: bool) -> tuple[Workers, int]:
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
    workers.report_losses(lambda text: progress.say(f"  {text}"))
    # local mode on one machine; a cluster's GPUs are not where the driver is
    train_workers = rays.train_workers if rays.train_workers is not None else int(on_cluster)
    if not on_cluster and rays.gpus_per_train_worker:
        refuse_missing_gpus("ray.gpus_per_train_worker", rays.gpus_per_train_worker, max(1, train_workers))
    return workers, train_workers
