"""The ledger: what a run was started with, which rounds are committed, and how it ended.

A round counts from the moment its `round.json`, written last, is there. Whatever lies beside it without one is
half-done work and is written again.
"""

from __future__ import annotations

import importlib.metadata
import math
import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from pydantic import ValidationError

from posttrain.config import RunFile, differences, dump, without_marks, without_secrets, yaml
from posttrain.errors import RunFolderError
from posttrain.live import NewLabels, Removal, Rows
from posttrain.schema import NO_SELF_CONFIDENCE, PARTITION, ROW, SELF_CONFIDENCE, Round
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


FORMAT = 2
"""Of run, search and job folders; one of another format is refused."""


def refuse_older(folder: RunFolder, record: object) -> None:
    """Raises RunFolderError where the first record of a folder is not of this format."""
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise RunFolderError(
            f"{folder.location} was made by an older version of posttrain, whose run folders this one cannot go on "
            "with; name another run.path"
        )


def settings(config: RunFile) -> dict[str, Any]:
    """The run file as it may be written down: without the users, passwords and keys in its URIs."""
    return without_secrets(yaml.load(dump(config), where="the run file"))


@dataclass(frozen=True)
class Ledger:
    """The record of one run in its folder, or of one search in the folder that holds its trials."""

    folder: RunFolder
    kind: Literal["run", "search"] = "run"
    assert_held: Callable[[], None] = lambda: None
    """Raises where another process has taken the folder over; called before a round is made last."""

    # -- what the run was started with -----------------------------------------------------------------

    def started(self) -> dict[str, Any] | None:
        """`run.yaml` (`search.yaml`) as it was written; None for a new folder. Refuses that of an older version."""
        if self.folder.exists(self._record):
            record = yaml.load(self.folder.read_bytes(self._record), where=self._record)
            refuse_older(self.folder, record)
            return record
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
            "format": FORMAT,
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
        self.assert_held()
        self.folder.write_json(self.folder.round(done.number, "round.json"), asdict(done))

    def removal(self, rounds: Sequence[Round]) -> Removal:
        """All that the committed rounds removed and relabelled."""
        removed = self._acted_on("removed", rounds, [PARTITION, ROW])
        relabelled = self._acted_on("relabelled", rounds, [PARTITION, ROW, "suggested_label"])
        labels = NewLabels.of(*(relabelled[name].to_numpy() for name in relabelled.column_names))
        return Removal(Rows.of_table(removed), labels)

    def self_confidence(self, rounds: Sequence[Round]) -> pa.Table:
        """{partition, row, self_confidence} of all that the committed rounds removed or relabelled."""
        names = [PARTITION, ROW, SELF_CONFIDENCE]
        return pa.concat_tables([self._acted_on(kind, rounds, names) for kind in ("removed", "relabelled")])

    def _acted_on(
        self, kind: Literal["removed", "relabelled"], rounds: Sequence[Round], columns: list[str]
    ) -> pa.Table:
        """Columns of what the rounds removed, or relabelled."""
        of_none = NO_SELF_CONFIDENCE.append_column("suggested_label", pa.array([], pa.int32())).select(columns)
        paths = [self.folder.round(done.number, f"{kind}.parquet") for done in rounds if getattr(done, kind)]
        return pa.concat_tables([of_none, *(self.folder.read_table(path, columns) for path in paths)])

    def keep_confident_joint(self, number: int, joint: np.ndarray) -> None:
        """Write down `NoiseModel.confident_joint` of a round, [classes, classes], as {class, label, samples}."""
        classes = np.arange(len(joint), dtype=np.int32)
        columns = np.repeat(classes, len(classes)), np.tile(classes, len(classes)), joint.flatten()
        table = pa.table(dict(zip(("class", "label", "samples"), columns, strict=True)))
        self.folder.write_table(self._confident_joint(number), table)

    def confident_joint(self, number: int) -> np.ndarray | None:
        """What `keep_confident_joint` wrote in a round; None where it did not, as in one that found no wrong labels."""
        if not self.folder.exists(self._confident_joint(number)):
            return None
        found = self.folder.read_table(self._confident_joint(number))["samples"].to_numpy()
        return found.reshape(math.isqrt(len(found)), -1)

    def _confident_joint(self, number: int) -> str:
        return self.folder.round(number, "confident_joint.parquet")

    # -- the end ---------------------------------------------------------------------------------------

    def finished(self) -> dict[str, Any] | None:
        """The summary of a run that came to its end."""
        path = self.folder.path("summary.json")
        return self.folder.read_json(path) if self.folder.exists(path) else None

    def finish(self, summary: dict[str, Any]) -> None:
        self.folder.write_json(self.folder.path("summary.json"), summary)
