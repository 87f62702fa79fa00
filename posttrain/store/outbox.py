"""Calls to MLflow, kept in the run folder until MLflow has accepted them.

Each call is written to `outbox/` as a message before it is sent, and deleted once MLflow has accepted it; messages are
sent in the order in which they were written. So a server that is unreachable, slow or refuses delays no round, and
loses none: what it did not accept is sent again with the next message, at the end of the run, or when the same command
is started again. A message may be sent twice (its answer was lost, the run was killed): `Tracking` logs it once.
"""

from __future__ import annotations

import base64
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from pyarrow import fs

from posttrain.config import without_credentials
from posttrain.errors import StepError
from posttrain.store.folder import RunFolder
from posttrain.store.mlflow_client import brief_requests, reason
from posttrain.store.tracking import Status, Tracking

_ANSWER_S = 5
"""Timeout of one request between rounds."""
_AT_A_TIME_S = 10.0
"""Between rounds, a delivery that has taken this long sends no further message."""
_PAUSE = 10
"""After a delivery that failed or took too long, the next one waits this many times its duration, so that a server that
is unreachable or slow costs a run at most a tenth of its time."""
_LAST_ANSWER_S, _AT_THE_END_S = 30, 60.0
"""The same two limits at the end of a run."""

_CALLS = ("log_round", "log_metrics", "log_tags", "log_dataset", "log_artifact", "log_model", "finish")


class Outbox:
    """The calls of `Tracking`, none of which fails because of MLflow.

    Leaving it as a context manager ends the MLflow run with the right status.
    """

    def __init__(self, queue: Queue, nested_run: Mapping[str, Any] | None = None) -> None:
        self._queue = queue
        self._nested_run = nested_run
        self._running = True
        self._finished = False

    @classmethod
    def of(cls, tracking: Tracking, folder: RunFolder, say: Callable[[str], None]) -> Outbox:
        """The outbox of the run in `folder`, with the messages of previous starts; `say` prints a line for the user."""
        return cls(Queue(tracking, folder, say))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._running:
            self._running = False
            if error is None or self._finished:
                self.finish()
                self.deliver(_AT_THE_END_S)
            else:
                # not kept in the outbox: the next start of the run sets its status to running again
                self._queue.give_up("KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")

    @property
    def uri(self) -> str:
        """Of the tracking server or database."""
        return self._queue.tracking.uri

    def undelivered(self) -> dict[str, Any] | None:
        """{messages, server, why} of what MLflow has not accepted; None where it has accepted everything."""
        return self._queue.undelivered()

    def deliver(self, within_s: float = math.inf) -> None:
        """Send all messages now, with more patience than between rounds."""
        self._queue.deliver(within_s, _LAST_ANSWER_S)

    def nested(self, name: str, *, params: Mapping[str, object], tags: Mapping[str, str]) -> Outbox:
        """As `Tracking.nested`; MLflow creates it with the first message to it."""
        return Outbox(self._queue, {"name": name, "params": params, "tags": tags})

    def log_round(
        self,
        round: int,
        *,
        params: Mapping[str, object],
        metrics: Mapping[str, float | None],
        figures: Mapping[str, bytes],
        artifacts: Sequence[Path],
    ) -> None:
        """As `Tracking.log_round`."""
        pictures = {name: base64.b64encode(png).decode() for name, png in figures.items()}
        self._add(
            "log_round",
            round=round,
            params=params,
            metrics=metrics,
            figures=pictures,
            artifacts=self._relative(artifacts),
        )

    def log_metrics(self, metrics: Mapping[str, float | None], step: int = 0) -> None:
        """As `Tracking.log_metrics`."""
        self._add("log_metrics", metrics=metrics, step=step)

    def log_tags(self, tags: Mapping[str, str]) -> None:
        """As `Tracking.log_tags`."""
        self._add("log_tags", tags=tags)

    def log_dataset(self, name: str, digest: str, source: str, profile: Mapping[str, object], *, context: str) -> None:
        """As `Tracking.log_dataset`."""
        self._add("log_dataset", name=name, digest=digest, source=source, profile=profile, context=context)

    def log_artifact(self, path: Path, folder: str | None = None) -> None:
        """As `Tracking.log_artifact`."""
        self._add("log_artifact", artifacts=self._relative([path]), folder=folder)

    def log_model(self, weights: Path, **recipe: Any) -> None:
        """As `Tracking.log_model`."""
        self._add("log_model", artifacts=self._relative([weights]), **recipe)

    def finish(self, status: Status = "FINISHED") -> None:
        """As `Tracking.finish`; a second call does nothing."""
        if not self._finished:
            self._finished = True
            self._add("finish", status=status)

    def _add(self, call: str, **given: Any) -> None:
        self._queue.add({"nested_run": self._nested_run, "call": call, "given": given})

    def _relative(self, paths: Sequence[Path]) -> list[str]:
        """Paths relative to the run folder, which may be moved."""
        root = self._queue.folder.local
        return [path.absolute().relative_to(root).as_posix() for path in paths]


@dataclass(frozen=True)
class _Message:
    path: str
    content: dict[str, Any]


class Queue:
    """The messages of a run and of its nested runs, in the order in which they are sent."""

    def __init__(self, tracking: Tracking, folder: RunFolder, say: Callable[[str], None]) -> None:
        self.tracking, self.folder = tracking, folder
        self._say = say
        self._waiting = [_Message(path, folder.read_json(path)) for path in waiting(folder)]
        last = self._waiting[-1].path.rpartition("/")[2] if self._waiting else "0"
        self._number = int(last.partition(".")[0])
        self._nested: dict[str, Tracking] = {}
        self._not_before = -math.inf
        self._why = ""

    def add(self, content: Mapping[str, Any]) -> None:
        """Keep a message, and send what is waiting unless a delivery has just failed."""
        # through JSON: MLflow gets the same now or later
        kept: dict[str, Any] = json.loads(json.dumps(content, default=str))
        if kept in [message.content for message in self._waiting]:
            return  # a run that is continued logs all its rounds again
        self._number += 1
        message = _Message(self.folder.path("outbox", f"{self._number:08d}.json"), kept)
        # not durable: a run that is continued after a power cut logs all its rounds again
        with self.folder.writing(message.path, durable=False) as stream:
            stream.write(json.dumps(kept).encode())
        self._waiting.append(message)
        self.deliver_if_due()

    def deliver_if_due(self) -> None:
        """Send what is waiting, for as long as a round may be delayed."""
        if time.monotonic() >= self._not_before:
            took = self.deliver(_AT_A_TIME_S, _ANSWER_S)
            if self._waiting or took > _AT_A_TIME_S:
                self._not_before = time.monotonic() + _PAUSE * max(took, 1.0)

    def deliver(self, within_s: float, answer_s: int) -> float:
        """Send messages until none is left, the time is up, or MLflow refuses one; returns the seconds that it took."""
        began, count = time.monotonic(), 0
        try:
            with brief_requests(answer_s):
                while self._waiting and time.monotonic() - began < within_s:
                    self._send(self._waiting[0].content)
                    self.folder.files.delete_file(self._waiting.pop(0).path)
                    count += 1
        except StepError as error:
            why = reason(error.__cause__ or error)
            if not self._why:
                server = without_credentials(self.tracking.uri)
                self._say(
                    f"MLflow at {server} does not accept messages ({why}): they are kept for later, and the run goes on"
                )
            self._why = why
        else:
            if self._waiting:
                self._why = self._why or f"slower than {within_s:g} s"
            elif self._why:
                self._say(f"MLflow has accepted the messages kept for it: {count}")
                self._why = ""
        return time.monotonic() - began

    def give_up(self, status: Status) -> None:
        """Set the status of the MLflow run, if MLflow answers quickly."""
        self.deliver_if_due()
        if self._waiting:
            return
        try:
            with brief_requests(_ANSWER_S):
                self.tracking.finish(status)
        except StepError:
            pass  # the error that ended the run is the one to report

    def undelivered(self) -> dict[str, Any] | None:
        if not self._waiting:
            return None
        return {
            "messages": len(self._waiting),
            "server": without_credentials(self.tracking.uri),
            "why": self._why,
        }

    def _send(self, content: Mapping[str, Any]) -> None:
        to, given = self.tracking, dict(content["given"])
        if (nested_run := content["nested_run"]) is not None:
            name = nested_run["name"]
            if name not in self._nested:
                self._nested[name] = self.tracking.nested(**nested_run)
            to = self._nested[name]
        if "figures" in given:
            given["figures"] = {name: base64.b64decode(png) for name, png in given["figures"].items()}
        if "artifacts" in given:
            given["artifacts"] = self._existing(given["artifacts"])
        call = _CALLS[_CALLS.index(content["call"])]
        if call in ("log_artifact", "log_model"):
            for path in given.pop("artifacts"):
                getattr(to, call)(path, **given)
        elif call != "finish" or to.is_running:
            getattr(to, call)(**given)

    def _existing(self, names: Sequence[str]) -> list[Path]:
        paths = [self.folder.local / name for name in names]
        for path in paths:
            if not path.exists():
                self._say(f"{path} is gone and cannot be logged to MLflow")
        return [path for path in paths if path.exists()]


def waiting(folder: RunFolder) -> list[str]:
    """Paths of the messages that MLflow has not accepted yet, in order."""
    selector = fs.FileSelector(folder.path("outbox"), allow_not_found=True)
    return sorted(info.path for info in folder.files.get_file_info(selector) if info.path.endswith(".json"))
