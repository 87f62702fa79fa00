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


def _make_last(path: str | Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on the disk."""
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
    """What `read` gives; it is asked again where an object store refused and the file system did not ask again itself.

    That is where it wanted fewer bytes than the refusal has: the AWS SDK then has no room for the refusal's text, and
    takes this for a failure of its own, which it does not repeat (seen with pyarrow 25).
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
    """Path, in the same file system, of the features of one backbone that other runs read, too: `features/<backbone>`
    of their common search. Nothing in it is ever deleted from here."""

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
        """The same folder for processes that work elsewhere."""
        return replace(self, location=self.path()) if self.is_local else self

    def beneath(self, *parts: str) -> RunFolder:
        """A folder in this one; in a URI, the options behind its `?` stay behind."""
        is_uri = "://" in self.location
        path, mark, options = self.location.partition("?") if is_uri else (self.location, "", "")
        return RunFolder("/".join((path.rstrip("/"), *parts)) + mark + options)

    # -- the paths -------------------------------------------------------------------------------------

    def features(self, backbone: str, split: str, partition: int) -> str:
        """The shard of a partition: in `shared_features` where these are the backbone's, else in this folder."""
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

    def clear_half_written(self) -> None:
        """Delete what writers of a killed process left behind; to be called where no other is at work here."""
        if not self.is_local:
            return  # there, what is half written is nowhere to be seen
        for path in self.local.rglob("*.tmp"):
            # but no lock files: other processes write theirs at any time
            if _TEMPORARY.search(path.name) and not path.parent.name.endswith("lock"):
                path.unlink(missing_ok=True)

    # -- reading and writing ---------------------------------------------------------------------------

    def exists(self, path: str) -> bool:
        return self.files.get_file_info(path).type == fs.FileType.File

    def refuse_unwritable(self) -> None:
        """Raises RunFolderError where a local folder cannot be made or written to."""
        if not self.is_local:
            return
        existing = next(path for path in (self.local, *self.local.parents) if path.exists())
        if not existing.is_dir():
            raise RunFolderError(f"run.path = {self.location}: {existing} is a file; name a folder")
        if not os.access(existing, os.W_OK | os.X_OK):
            raise RunFolderError(f"run.path = {self.location}: {existing} may not be written to; name another folder")

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
        """A stream whose content appears at `path` whole, or not at all.

        On a local disk by a rename. An object store shows what its stream has got when that is closed, and pyarrow
        closes it even after an error: there the content is staged in a local file, and sent when it is whole.

        `durable`: it is on the disk when this ends, and so is its name, so that what is written later, and vouches for
        it, never outlives it in a power cut. Raises StepError where it cannot be written.
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
            raise StepError(f"{path} cannot be written ({why}); mend it and start the same command again") from error

    @contextmanager
    def _renamed(self, path: str, durable: bool) -> Iterator[pa.NativeFile]:
        files, folder = self.files, Path(path).parent
        temporary = f"{path}.{uuid.uuid4().hex[:8]}.tmp"
        # a folder that is new is known to the one above it, which has to last as well
        changed = {folder, *(above.parent for above in (folder, *folder.parents) if not above.exists())}
        files.create_dir(str(folder), recursive=True)
        try:
            with files.open_output_stream(temporary) as stream:
                yield stream
            if durable:
                _make_last(temporary)
            os.replace(temporary, path)
            if durable:
                for each in changed:
                    _make_last(each)
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
        """Each table becomes a row group of one Parquet file: never all of them in memory; the number of rows.

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
                    # else it would write its end when it is collected, to a stream that has failed or is closed
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
