"""Where samples come from: Parquet files, class folders or a table in memory, and what each holds before it is read."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import PurePosixPath
from typing import Literal

import pyarrow as pa
import pyarrow.dataset as pads

from posttrain.data import parquet_files
from posttrain.data.listing import image_files
from posttrain.errors import DataError
from posttrain.store.folder import resolve, with_retries

PATH = "path"
"""Column with the path of the file beside each row: what Ray Data calls it."""


@dataclass(frozen=True)
class ParquetSource:
    """Parquet files; columns by name."""

    locations: tuple[str, ...]
    id: str
    image: str
    label: str
    true_label: str | None = None
    only: frozenset[str] | None = field(default=None, repr=False)
    """Paths of the files to read; None: all that are there."""

    @property
    def keyed_columns(self) -> list[tuple[str, str]]:
        """(key of the run file, name) of each column that is read."""
        columns = [("data.id", self.id), ("data.image", self.image), ("data.label", self.label)]
        return columns if self.true_label is None else [*columns, ("data.true_label", self.true_label)]

    @property
    def columns(self) -> list[str]:
        """The names of the columns that are read, each once."""
        return list(dict.fromkeys(name for _, name in self.keyed_columns))

    @property
    def path_column(self) -> str:
        """The name of the column with the path of the file: PATH, or one that no column read has."""
        name = PATH
        while name in self.columns:
            name = f"_{name}"
        return name


@dataclass(frozen=True)
class FolderSource:
    """Class folders: `<location>/<class>/**/<image>`; the id is the path from `location` on."""

    location: str
    only: frozenset[str] | None = field(default=None, repr=False)
    """Paths of the images to read; None: all that are there."""


@dataclass(frozen=True)
class TableSource:
    """A table in memory with columns `id`, `image`, `label`."""

    table: pa.Table = field(repr=False)
    name: str


Source = ParquetSource | FolderSource | TableSource


@dataclass(frozen=True)
class Listing:
    """What is known of a source before anything is read."""

    rows: int
    classes: tuple[str, ...] | None
    image_shape: tuple[int, ...] | None
    files: tuple[tuple[str, int], ...]
    """(path, size in bytes) of every file."""
    images: pa.DataType | None = None
    """Type of the image column of Parquet files; else None."""
    ids: Literal["integers", "text"] | None = None
    """What the id column of Parquet files holds; else None."""
    bytes: int = 0
    """Of all that is read, once it is unpacked."""
    skipped: tuple[int, str] | None = None
    """How many files of class folders are skipped, as their names are not those of images, and the first of them."""


def list_source(source: Source) -> Listing:
    """What a source holds, from file names and Parquet footers alone. Raises DataError where it cannot be read."""
    if isinstance(source, TableSource):
        metadata = source.table.schema.metadata or {}
        return Listing(
            source.table.num_rows,
            _class_names(metadata, source.name),
            _declared_shape(metadata, source.name),
            ((source.name, source.table.nbytes),),
            bytes=source.table.nbytes,
        )
    if isinstance(source, FolderSource):
        return _list_folder(source)
    dataset = parquet_dataset(source)
    rows, unpacked = parquet_files.check_footers(dataset, source.keyed_columns, source.locations)
    if rows == 0:
        raise DataError(f"{source.locations[0]}: holds no samples; name a location with at least one row")
    metadata = dataset.schema.metadata or {}
    return Listing(
        rows,
        _class_names(metadata, source.locations[0]),
        _declared_shape(metadata, source.locations[0]),
        parquet_files.file_sizes(dataset),
        dataset.schema.field(source.image).type,
        "text" if parquet_files.is_text(parquet_files.value_type(dataset.schema.field(source.id).type)) else "integers",
        unpacked,
    )


def parquet_dataset(source: ParquetSource) -> pads.FileSystemDataset:
    """The files of a source as one data set of Arrow (see `parquet_files.open_dataset`)."""
    return parquet_files.open_dataset(source.locations, source.only)


def _list_folder(source: FolderSource) -> Listing:
    _, found, others = image_files(source.location)
    images = [info for info in found if source.only is None or info.path in source.only]
    parquet_files.refuse_vanished(source.location, source.only, [info.path for info in images])
    _, root = resolve(source.location)
    relative = [PurePosixPath(f.path).relative_to(root) for f in images]
    without_class = next((path for path in relative if len(path.parts) < 2), None)
    if without_class is not None:
        raise DataError(f"{source.location}/{without_class}: lies in no class folder; expected <class>/<image>")
    classes = tuple(sorted({path.parts[0] for path in relative}))
    files = tuple((f.path, f.size) for f in images)
    skipped = (len(others), others[0]) if others else None
    return Listing(len(images), classes, None, files, bytes=sum(size for _, size in files), skipped=skipped)


def tables_of(source: Source, listing: Listing) -> Iterator[pa.Table]:
    """The samples of a source as `normalise` takes them: a table per Parquet file, else all in one."""
    if isinstance(source, TableSource):
        yield source.table
        return
    if isinstance(source, FolderSource):
        files, _ = resolve(source.location)
        paths = [path for path, _ in listing.files]

        def content(path: str) -> bytes:
            with files.open_input_file(path) as stream:
                return with_retries(stream.readall)

        # an object store takes 50 ms to answer a request, and answers many at once
        with ThreadPoolExecutor(16) as pool:
            yield pa.table({"bytes": pa.array(pool.map(content, paths), pa.binary()), PATH: pa.array(paths)})
        return
    for path, table in parquet_files.read_files(parquet_dataset(source), source.columns):
        yield with_path(table, path, source)


def with_path(table: pa.Table, path: str, source: ParquetSource) -> pa.Table:
    """The rows of a file with the path of the file beside them."""
    return table.append_column(source.path_column, pa.array([path] * table.num_rows, pa.string()))


def without_data(source: Source) -> Source:
    """The source as a description to send to tasks: without anything whose size grows with the data set."""
    if isinstance(source, TableSource):
        return TableSource(source.table.slice(0, 0), source.name)
    return replace(source, only=None)


def _class_names(metadata: Mapping[bytes, bytes], where: str) -> tuple[str, ...] | None:
    """From the schema's metadata: `class_names` as JSON or comma-separated."""
    raw = metadata.get(b"class_names")
    if not raw:
        return None
    try:
        text = raw.decode()
        names = json.loads(text) if text.lstrip().startswith("[") else text.split(",")
        if not all(isinstance(name, str) and name for name in names) or len(set(names)) < len(names):
            raise ValueError("a name is empty, there twice, or no text")
    except ValueError as error:
        raise DataError(
            f"{where}: class_names in the schema's metadata are no list of names ({parquet_files.first_line(error)}); "
            "mend them, or leave them out and set data.classes"
        ) from None
    return tuple(names)


def _declared_shape(metadata: Mapping[bytes, bytes], where: str) -> tuple[int, ...] | None:
    """From the schema's metadata: `image_shape` as JSON."""
    raw = metadata.get(b"image_shape")
    if not raw:
        return None
    try:
        shape = json.loads(raw)
        if not isinstance(shape, list) or len(shape) not in (2, 3) or not all(type(n) is int and n > 0 for n in shape):
            raise ValueError("two or three whole numbers above 0 are needed")
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{where}: image_shape in the schema's metadata is no [height, width, channels] "
            f"({parquet_files.first_line(error)}); mend it, or leave it out and set data.image_shape"
        ) from None
    return tuple(shape)
