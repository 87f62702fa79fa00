"""The job folder: the one owner of every path in it, and of what a job knows of its previous runs.

```
<job>/
  state.json         files held back, champion, runs so far; written last: what it says is done
  files/<digest>.parquet   the files that have been seen, with what tells whether one has changed
  base/<key>.safetensors, <key>.json   networks that the champions' features come from
  runs/<name>/       run folders
  lock/              lock files
```
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping, Set
from dataclasses import asdict, dataclass, replace
from typing import Any

import pyarrow as pa
from pyarrow import fs

from posttrain.data.listing import File
from posttrain.errors import RunFolderError
from posttrain.store.folder import RunFolder
from posttrain.store.ledger import FORMAT, refuse_older

_COLUMNS = pa.schema(
    [
        ("split", pa.string()),
        ("path", pa.string()),
        ("size", pa.int64()),
        ("mtime_ns", pa.int64()),
        ("content", pa.string()),
    ]
)


@dataclass(frozen=True)
class State:
    """What a job knows when it starts; the empty one before its first run has ended."""

    runs: tuple[str, ...] = ()
    """Names of the finished runs, the oldest first."""
    champion: str | None = None
    """Version that serves, as of the last run or rollback."""
    verdict: str | None = None
    """Of the last run."""
    files: str | None = None
    """Name of the table of seen files."""
    held_back: tuple[str, ...] = ()
    """Paths of training files that take no part until they change or are accepted."""
    accepted: tuple[str, ...] = ()
    """Paths of training files that were held back and are let in by the user: they raise no alarm."""
    unused: tuple[str, ...] = ()
    """Paths of training files that have been seen, and that no champion has been made with yet."""


@dataclass(frozen=True)
class Base:
    """A network whose features are probed, and what builds it."""

    key: str
    recipe: Mapping[str, Any]
    """factory, arguments, head."""
    classes: tuple[str, ...] | None
    """None: not known, of a version that posttrain did not make."""
    weights: bytes
    suffix: str = ".safetensors"
    """How the name of a file of the weights ends; what others logged may have been saved by torch.save."""
    initial_weights_known: bool = False
    """Whether the initial weights of the job's run files are those that its training began with."""


@dataclass(frozen=True)
class JobFolder:
    """The folder of a job."""

    folder: RunFolder

    def refuse_a_run(self) -> None:
        """Raises RunFolderError where `posttrain clean` has its run here, or `posttrain tune` its search."""
        if any(self.folder.exists(self.folder.path(name)) for name in ("run.yaml", "search.yaml")):
            raise RunFolderError(
                f"run.path = {self.folder.location} holds a run of another command; name a new folder for the job"
            )

    def run(self, name: str) -> RunFolder:
        """The folder of a run. Raises RunFolderError for a name that leads out of the job's folder."""
        return self.folder.beneath("runs", self._inside(name))

    def _inside(self, name: str) -> str:
        # names come back from tags in MLflow, where others may write, too
        if not re.fullmatch(r"[\w-][\w .-]*", name):
            raise RunFolderError(
                f"{name!r} is no name of a run or network in {self.folder.location}: mend the tags of the registered "
                "model, or name a new folder for the job"
            )
        return name

    # -- state -----------------------------------------------------------------------------------------

    def state(self) -> State:
        """What is known; raises RunFolderError where another version of posttrain wrote it."""
        path = self.folder.path("state.json")
        if not self.folder.exists(path):
            return State()
        record = self.folder.read_json(path)
        refuse_older(self.folder, record)
        try:
            del record["format"]
            lists = {key: tuple(record.pop(key)) for key in ("runs", "held_back", "accepted", "unused")}
            return replace(State(**record), **lists)
        except (KeyError, TypeError, AttributeError):
            raise RunFolderError(
                f"{path} is not one that this version of posttrain wrote; name a new folder for the job"
            ) from None

    def write_state(self, state: State, seen: Iterable[File] | None = None) -> None:
        """Write the state, with another table of seen files where one is given."""
        if seen is not None:
            rows = sorted(seen, key=lambda file: (file.split, file.path))
            table = pa.Table.from_pylist([asdict(file) for file in rows], schema=_COLUMNS)
            name = f"{listing_digest(rows)}.parquet"
            self.folder.write_table(self.folder.path("files", name), table)
            state = replace(state, files=name)
        self.folder.write_json(self.folder.path("state.json"), {"format": FORMAT, **asdict(state)})

    def seen(self, state: State) -> dict[tuple[str, str], File]:
        """The files that the finished runs have seen, by split and path; those held back are among them."""
        if state.files is None:
            return {}
        rows = self.folder.read_table(self.folder.path("files", self._inside(state.files))).to_pylist()
        return {(row["split"], row["path"]): File(**row) for row in rows}

    # -- base networks ---------------------------------------------------------------------------------

    def base(self, key: str) -> Base | None:
        """The base network of that key; None where its files are not there."""
        described, weights = self._base(key)
        if not (self.folder.exists(described) and self.folder.exists(weights)):
            return None
        record = self.folder.read_json(described)
        classes = record["classes"]
        return Base(
            key,
            record["recipe"],
            tuple(classes) if classes else None,
            self.folder.read_bytes(weights),
            initial_weights_known=record.get("initial_weights_known", False),
        )

    def keep_base(self, base: Base) -> None:
        """Write a base network, unless it is there."""
        described, weights = self._base(base.key)
        if not self.folder.exists(described):
            self.folder.write_bytes(weights, base.weights)
            record = {
                "recipe": dict(base.recipe),
                "classes": base.classes,
                "initial_weights_known": base.initial_weights_known,
            }
            self.folder.write_json(described, record)

    def _base(self, key: str) -> tuple[str, str]:
        name = self._inside(key)
        return self.folder.path("base", f"{name}.json"), self.folder.path("base", f"{name}.safetensors")

    def drop_features(self, kept: Set[str]) -> None:
        """Delete the feature stores of all runs but these, also of runs that were begun and never ended."""
        for info in self._in("runs"):
            if info.base_name not in kept:
                self.folder.beneath("runs", info.base_name).keep_only_features("")

    def drop_bases(self, kept: Set[str]) -> None:
        """Delete all base networks but these."""
        for info in self._in("base"):
            if info.base_name.rpartition(".")[0] not in kept:
                self.folder.delete(info.path)

    def _in(self, name: str) -> list[fs.FileInfo]:
        return self.folder.files.get_file_info(fs.FileSelector(self.folder.path(name), allow_not_found=True))


def listing_digest(files: Iterable[File], *more: object) -> str:
    """16 hexadecimal digits that tell one set of files, and whatever else decides a run, from another."""
    digest = hashlib.sha256()
    for file in sorted(files, key=lambda file: (file.split, file.path)):
        digest.update(f"{file.split}\t{file.path}\t{file.size}\t{file.mtime_ns}\n".encode())
    for part in more:
        digest.update(f"{part}\n".encode())
    return digest.hexdigest()[:16]
