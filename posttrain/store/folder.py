"""The run folder: the one owner of every path in it, on a local disk or an object store."""

from __future__ import annotations

import functools
import json
import os
import re
import tempfile
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from posttrain.errors import RunFolderError, StepError

_T = TypeVar("_T")
_TEMPORARY = re.compile(r"\.[0-9a-f]{8}\.tmp$")


def _sync(path: str | Path) -> None:
    """Wait until the content of a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# opening an object store asks it for its region, and makes connections that are worth keeping
@functools.lru_cache(maxsize=64)
def _opened(uri: str) -> tuple[fs.FileSystem, str]:
    return fs.FileSystem.from_uri(uri)


def resolve(location: str) -> tuple[fs.FileSystem, str]:
    """(file system, path in it) of a local path or of any URI that pyarrow knows (s3://, gs://, file://)."""
    if "://" in location:
        try:
            return _opened(location)
        except (pa.ArrowInvalid, OSError) as error:
            raise RunFolderError(f"{location}: {error}; use a local path or an s3://, gs:// or file:// URI") from None
    return fs.LocalFileSystem(), os.path.abspath(os.path.expanduser(location))


def with_retries(read: Callable[[], _T]) -> _T:
    """The result of `read`, repeated after a refusal of an object store that the AWS SDK does not repeat itself.

    It does not where the read asked for fewer bytes than the text of the refusal has: it has no room for that text, and
    takes this for an error of its own (seen with pyarrow 25).
    """
    for wait in (0.1, 0.4, 1.6, 6.4):
        try:
            return read()
        except OSError as error:
            if "Failed to flush response stream" not in str(error):
                raise
        time.sleep(wait)
    return read()


@dataclass(frozen=True)
class RunFolder:
    """A run folder by its location. Picklable: workers open it for themselves."""

    location: str
    shared_features: str | None = None
    """Path, in the same file system, of features that several runs share: `features/<backbone>` of their search.
    Nothing in it is deleted."""

    def path(self, *parts: str) -> str:
        return "/".join((resolve(self.location)[1], *parts))

    @property
    def files(self) -> fs.FileSystem:
        return resolve(self.location)[0]

    @property
    def is_local(self) -> bool:
        return isinstance(self.files, fs.LocalFileSystem)

    @property
    def local(self) -> Path:
        """The folder as a local path; only where `is_local`."""
        return Path(self.path())

    @property
    def absolute(self) -> RunFolder:
        """The same folder with an absolute path, for processes with another working directory."""
        return replace(self, location=self.path()) if self.is_local else self

    def beneath(self, *parts: str) -> RunFolder:
        """A folder in this one; the options after the `?` of a URI stay at the end."""
        is_uri = "://" in self.location
        path, mark, options = self.location.partition("?") if is_uri else (self.location, "", "")
        return RunFolder("/".join((path.rstrip("/"), *parts)) + mark + options)

    # -- the paths -------------------------------------------------------------------------------------

    def features(self, backbone: str, split: str, partition: int) -> str:
        """Path of a partition's shard: in `shared_features` if these are of this backbone, else in this folder."""
        shared = self.shared_features
        of_backbone = shared if shared and shared.endswith(f"/{backbone}") else self.path("features", backbone)
        return f"{of_backbone}/{split}/{partition:05d}.parquet"

    def round(self, number: int, *parts: str) -> str:
        return self.path("rounds", f"{number:04d}", *parts)

    def checkpoint(self, number: int) -> str:
        return self.round(number, "checkpoint", "model.safetensors")

    def keep_only_features(self, backbone: str) -> None:
        """Delete the feature stores of all other backbones."""
        for info in self.files.get_file_info(fs.FileSelector(self.path("features"), allow_not_found=True)):
            if info.base_name != backbone:
                self.files.delete_dir(info.path)

    def delete(self, path: str) -> None:
        """Delete a file, if it is there."""
        if self.exists(path):
            self.files.delete_file(path)

    def delete_folder(self, path: str) -> None:
        """Delete a folder with all that is in it, if it is there."""
        if self.files.get_file_info(path).type == fs.FileType.Directory:
            self.files.delete_dir(path)

    def clear_half_written(self) -> None:
        """Delete the temporary files of a killed process; call it only while holding the folder's lock."""
        if not self.is_local:
            return  # an object store shows no half-written objects
        for path in self.local.rglob("*.tmp"):
            # but no lock files: other processes write theirs at any time
            if _TEMPORARY.search(path.name) and not path.parent.name.endswith("lock"):
                path.unlink(missing_ok=True)

    # -- reading and writing ---------------------------------------------------------------------------

    def exists(self, path: str) -> bool:
        return self.files.get_file_info(path).type == fs.FileType.File

    def refuse_unwritable(self) -> None:
        """Raises RunFolderError where a local folder cannot be created or written to."""
        if not self.is_local:
            return
        existing = next(path for path in (self.local, *self.local.parents) if path.exists())
        if not existing.is_dir():
            raise RunFolderError(f"run.path = {self.location}: {existing} is a file; name a folder")
        if not os.access(existing, os.W_OK | os.X_OK):
            raise RunFolderError(f"run.path = {self.location}: {existing} may not be written to; name another folder")
        try:
            # root passes any check of permissions, also where no file can be made, as in /proc
            with tempfile.TemporaryFile(dir=existing):
                pass
        except OSError as error:
            raise RunFolderError(
                f"run.path = {self.location} cannot be written: {existing} takes no files "
                f"({os.strerror(error.errno or 0)}); name another folder"
            ) from None

    def is_empty(self) -> bool:
        info = self.files.get_file_info(self.path())
        if info.type == fs.FileType.NotFound:
            return True
        if info.type == fs.FileType.File:
            raise RunFolderError(f"run.path = {self.location} is a file; name a folder")
        inside = self.files.get_file_info(fs.FileSelector(self.path()))
        return all(entry.base_name.startswith(".") for entry in inside)

    def read_bytes(self, path: str) -> bytes:
        def read() -> bytes:
            with self.files.open_input_stream(path) as stream:
                return stream.read()

        return with_retries(read)

    def read_json(self, path: str) -> Any:
        return json.loads(self.read_bytes(path))

    @contextmanager
    def writing(self, path: str, *, durable: bool = True) -> Iterator[pa.NativeFile]:
        """A stream whose content appears at `path` completely, or not at all.

        On a local disk, a temporary file is renamed. An object store shows what a stream has received once it is
        closed, and pyarrow closes it even after an error: so the content is first written to a local file, then sent.

        `durable`: content and name are on the disk when this ends, so that a file written later, which relies on this
        one, never survives a power cut without it. Raises StepError where it cannot be written.
        """
        try:
            if self.is_local:
                with self._renamed(path, durable) as stream:
                    yield stream
            else:
                with self._sent(path) as stream:
                    yield stream
        except OSError as error:
            # pyarrow's own text names the temporary file
            why = os.strerror(error.errno) if error.errno else " ".join(str(error).split())
            raise StepError(
                f"{path} cannot be written ({why}); fix the cause and start the same command again"
            ) from error

    @contextmanager
    def _renamed(self, path: str, durable: bool) -> Iterator[pa.NativeFile]:
        files, folder = self.files, Path(path).parent
        temporary = f"{path}.{uuid.uuid4().hex[:8]}.tmp"
        # the name of a new folder is stored in its parent, which has to be synced as well
        changed = {folder, *(above.parent for above in (folder, *folder.parents) if not above.exists())}
        files.create_dir(str(folder), recursive=True)
        try:
            with files.open_output_stream(temporary) as stream:
                yield stream
            if durable:
                _sync(temporary)
            os.replace(temporary, path)
            if durable:
                for each in changed:
                    _sync(each)
        finally:
            if os.path.exists(temporary):
                os.unlink(temporary)

    @contextmanager
    def _sent(self, path: str) -> Iterator[pa.NativeFile]:
        files = self.files
        files.create_dir(path.rsplit("/", 1)[0], recursive=True)
        with tempfile.TemporaryDirectory() as folder:
            staged = os.path.join(folder, "staged")
            with fs.LocalFileSystem().open_output_stream(staged) as stream:
                yield stream
            fs.copy_files(staged, path, source_filesystem=fs.LocalFileSystem(), destination_filesystem=files)

    def write_bytes(self, path: str, content: bytes) -> None:
        with self.writing(path) as stream:
            stream.write(content)

    def write_json(self, path: str, content: Any) -> None:
        self.write_bytes(path, (json.dumps(content, indent=2) + "\n").encode())

    def write_table(self, path: str, table: pa.Table) -> None:
        with self.writing(path) as stream:
            pq.write_table(table, stream, compression="zstd")

    def write_row_groups(self, path: str, tables: Iterable[pa.Table], *, of_none: pa.Table | None = None) -> int:
        """Write each table as a row group of one Parquet file, without all of them in memory; the number of rows.

        `of_none`: what is written where there is no table.
        """
        rows = 0
        with self.writing(path) as stream:
            writer: pq.ParquetWriter | None = None
            try:
                for table in tables:
                    writer = writer or pq.ParquetWriter(stream, table.schema, compression="zstd")
                    writer.write_table(table)
                    rows += table.num_rows
                if writer is not None:
                    writer.close()
                elif of_none is not None:
                    pq.write_table(of_none, stream)
            finally:
                if writer is not None:
                    # or it would write its footer when garbage-collected, to a stream that has failed or is closed
                    writer.is_open = False
        return rows

    def read_table(self, path: str, columns: list[str] | None = None) -> pa.Table:
        with self.files.open_input_file(path) as stream:
            return with_retries(lambda: pq.read_table(stream, columns=columns))

    @contextmanager
    def parquet(self, path: str) -> Iterator[pq.ParquetFile]:
        """A Parquet file to be read in parts."""
        with self.files.open_input_file(path) as stream:
            yield with_retries(lambda: pq.ParquetFile(stream))

    def row_groups(self, path: str, columns: list[str] | None = None) -> Iterator[pa.Table]:
        """The row groups of a Parquet file one after another: never the whole of it in memory."""
        with self.parquet(path) as file:
            for group in range(file.num_row_groups):
                yield with_retries(lambda group=group: file.read_row_group(group, columns=columns))
