"""The run in MLflow: opening it, logging the data and the model, delivering what it did not accept."""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain.config import RunFile, without_credentials
from posttrain.errors import TrackingError
from posttrain.report.progress import StepLog
from posttrain.store import lock
from posttrain.store.folder import RunFolder
from posttrain.store.ledger import settings

if TYPE_CHECKING:
    from posttrain.cluster.network import Network
    from posttrain.runs.inputs import Inputs
    from posttrain.store.outbox import Outbox
    from posttrain.store.tracking import Tracking


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
    """The outbox through which the run logs to MLflow: from here on it goes on also where MLflow does not answer."""
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
            context=name,
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
            "background": spec.image.background,
        },
    )


def deliver_rest(config: RunFile, folder: RunFolder, progress: StepLog) -> dict[str, Any] | None:
    """Send MLflow what it has not accepted yet of a finished run; `Outbox.undelivered` after that."""
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


def undelivered(tracking: object) -> dict[str, Any] | None:
    """{messages, server, why} of what MLflow has not accepted and the run folder keeps; None where there is nothing."""
    from posttrain.store.outbox import Outbox

    return tracking.undelivered() if isinstance(tracking, Outbox) else None
