"""The ledger: what a run was started with, which rounds are committed, and how it ended.

A round counts from the moment its `round.json`, written last, is there. Whatever lies beside it without one is
half-done work and is written again.
"""

from __future__ import annotations

import importlib.metadata
import math
import platform
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from pydantic import ValidationError

from posttrain.config import RunFile, differences, dump, without_marks, without_secrets, yaml
from posttrain.errors import RunFolderError
from posttrain.schema import (
    NO_SUPPORT,
    PARTITION,
    ROW,
    SUPPORT,
    Excluded,
    Relabelled,
    Round,
    excluded_rows,
    relabelled_rows,
)
from posttrain.store.folder import RunFolder

_PACKAGES = (
    "posttrain",
    "ray",
    "torch",
    "torchvision",
    "pyarrow",
    "mlflow",
    "numpy",
    "pandas",
    "scikit-learn",
)

# what may differ when a run goes on: where it computes and where it tells of it, not what it computes
_MAY_DIFFER = {
    "run": ("ray.", "tracking.", "run.path", "search."),
    "search": ("ray.", "tracking.", "run.path", "search.max_concurrent_trials"),
}
_MAY_NOT_DIFFER = ("ray.precision",)


def settings(config: RunFile) -> dict[str, Any]:
    """The run file as it may be written down: without the users, passwords and keys in its URIs."""
    return without_secrets(yaml.load(dump(config), where="the run file"))


@dataclass(frozen=True)
class Ledger:
    """The record of one run in its folder, or of one search in the folder that holds its trials."""

    folder: RunFolder
    kind: Literal["run", "search"] = "run"

    # -- what the run was started with -----------------------------------------------------------------

    def started(self) -> dict[str, Any] | None:
        """`run.yaml` (`search.yaml`) as it was written; None for a new folder."""
        if self.folder.exists(self._record):
            return yaml.load(self.folder.read_bytes(self._record), where=self._record)
        other, command = ("search", "tune") if self.kind == "run" else ("run", "clean")
        if self.folder.exists(self.folder.path(f"{other}.yaml")):
            raise RunFolderError(
                f"run.path = {self.folder.location} holds a {other} (of posttrain {command}) and no {self.kind}; "
                "name another run.path"
            )
        if not self.folder.is_empty():
            raise RunFolderError(
                f"run.path = {self.folder.location} is not empty and holds no {self.kind} (no {self.kind}.yaml); "
                "name a new folder, or empty this one"
            )
        return None

    @property
    def _record(self) -> str:
        return self.folder.path(f"{self.kind}.yaml")

    def start(self, config: RunFile, fingerprint: dict[str, str]) -> None:
        """Write `run.yaml` (`search.yaml`): settings, versions, seeds and the fingerprint of the data."""
        versions = {}
        for name in _PACKAGES:
            try:
                versions[name] = importlib.metadata.version(name)
            except importlib.metadata.PackageNotFoundError:
                versions[name] = "not installed as a package"
        record = {
            "config": settings(config),
            "data": fingerprint,
            "versions": {"python": platform.python_version(), **versions},
        }
        text = f"# Written by posttrain; the {self.kind} goes on only with these settings and these data.\n"
        text += yaml.dump(record)
        self.folder.write_bytes(self._record, text.encode())

    def is_begun(self) -> bool:
        """Whether the folder holds anything that depends on the settings: trained weights, a round, or trials."""
        folder = self.folder
        drawn = folder.path("pretrained", "model.safetensors"), folder.path("trials.json")
        return any(map(folder.exists, drawn)) or bool(self.rounds())

    def refuse_other_settings(self, started: dict[str, Any], config: RunFile) -> None:
        """Raises RunFolderError where the run in the folder was made with other settings."""
        try:
            before = RunFile.model_validate(without_marks(started["config"]))
        except (ValidationError, KeyError, TypeError):
            raise RunFolderError(
                f"{self._record} is not one that this version of posttrain wrote; name another run.path"
            ) from None
        changed = [
            line
            for line in differences(before, RunFile.model_validate(without_marks(settings(config))))
            if line.startswith(_MAY_NOT_DIFFER) or not line.startswith(_MAY_DIFFER[self.kind])
        ]
        if changed:
            raise RunFolderError(
                f"{self.folder.location} holds a {self.kind} with other settings ({'; '.join(changed)}); "
                "name another run.path, or go back to these settings"
            )

    def refuse_other_data(self, started: dict[str, Any], fingerprint: dict[str, str]) -> None:
        """Raises RunFolderError where the run in the folder was made from other data."""
        before = started["data"]
        changed = [
            f"{name}: {before.get(name)} -> {value}" for name, value in fingerprint.items() if before.get(name) != value
        ]
        if changed:
            raise RunFolderError(
                f"{self.folder.location} holds a {self.kind} on other data (fingerprints {'; '.join(changed)}); "
                "name another run.path for the data as they are now"
            )

    # -- rounds ----------------------------------------------------------------------------------------

    def rounds(self) -> tuple[Round, ...]:
        """The committed rounds, from 0 on without a gap. Raises RunFolderError for those of another version."""
        found: list[Round] = []
        while self.folder.exists(path := self.folder.round(len(found), "round.json")):
            try:
                found.append(Round(**self.folder.read_json(path)))
            except TypeError:
                raise RunFolderError(
                    f"{path} is not one that this version of posttrain wrote; name another run.path"
                ) from None
        return tuple(found)

    def commit(self, done: Round) -> None:
        """Make a round last; everything else of it has been written by now."""
        self.folder.write_json(self.folder.round(done.number, "round.json"), asdict(done))

    def excluded(self, rounds: tuple[Round, ...]) -> Excluded:
        """(partition, row) of all that the committed rounds removed."""
        excluded: Excluded = {}
        for done in rounds:
            if done.removed:
                table = self.removed(done.number, [PARTITION, ROW])
                excluded = excluded_rows(table[PARTITION].to_numpy(), table[ROW].to_numpy(), excluded)
        return excluded

    def relabelled(self, rounds: tuple[Round, ...]) -> Relabelled:
        """(partition, row) and new label of all that the committed rounds relabelled."""
        relabelled: Relabelled = {}
        for done in rounds:
            if done.relabelled:
                path = self.folder.round(done.number, "relabelled.parquet")
                table = self.folder.read_table(path, [PARTITION, ROW, "suggested_label"])
                relabelled = relabelled_rows(
                    table[PARTITION].to_numpy(), table[ROW].to_numpy(), table["suggested_label"].to_numpy(), relabelled
                )
        return relabelled

    def support(self, rounds: tuple[Round, ...]) -> pa.Table:
        """{partition, row, self_confidence} of all that the committed rounds removed or relabelled."""
        names = [PARTITION, ROW, SUPPORT]
        tables = [NO_SUPPORT]
        for done in rounds:
            for kind, count in (("removed", done.removed), ("relabelled", done.relabelled)):
                if count:
                    tables.append(self.folder.read_table(self.folder.round(done.number, f"{kind}.parquet"), names))
        return pa.concat_tables(tables)

    def keep_votes(self, number: int, votes: np.ndarray) -> None:
        """Write down `NoiseModel.votes` of a round, [classes, classes], as {class, label, votes}."""
        classes = np.arange(len(votes), dtype=np.int32)
        columns = np.repeat(classes, len(classes)), np.tile(classes, len(classes)), votes.flatten()
        self.folder.write_table(
            self._votes(number), pa.table(dict(zip(("class", "label", "votes"), columns, strict=True)))
        )

    def votes(self, number: int) -> np.ndarray | None:
        """What `keep_votes` wrote in a round; None where it did not, as in a round that found no wrong labels."""
        if not self.folder.exists(self._votes(number)):
            return None
        found = self.folder.read_table(self._votes(number))["votes"].to_numpy()
        return found.reshape(math.isqrt(len(found)), -1)

    def _votes(self, number: int) -> str:
        return self.folder.round(number, "votes.parquet")

    def removed(self, number: int, columns: list[str] | None = None) -> pa.Table:
        return self.folder.read_table(self.folder.round(number, "removed.parquet"), columns)

    # -- the end ---------------------------------------------------------------------------------------

    def finished(self) -> dict[str, Any] | None:
        """The summary of a run that came to its end."""
        path = self.folder.path("summary.json")
        return self.folder.read_json(path) if self.folder.exists(path) else None

    def finish(self, summary: dict[str, Any]) -> None:
        self.folder.write_json(self.folder.path("summary.json"), summary)
