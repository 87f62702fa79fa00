"""Parquet files as a data set: every footer is checked before anything is read, and errors name the file."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import PurePosixPath
from typing import Any, cast

import pyarrow as pa
import pyarrow.dataset as pads
import pyarrow.parquet as pq
from pyarrow import fs

from posttrain.data.listing import parquet_files
from posttrain.errors import DataError, StepError
from posttrain.store.folder import resolve, with_retries

# what Arrow raises of files that are cut short, damaged, or not made by it
_NOT_READABLE = (pa.ArrowException, OSError, UnicodeDecodeError)


def open_dataset(locations: Sequence[str], only: frozenset[str] | None) -> pads.FileSystemDataset:
    """The Parquet files at the locations; of these, where `only` names paths, those alone.

    Raises DataError for a location without Parquet files or on another file system than the first, and for a first file
    that is not readable, StepError where a path of `only` is not there any more.
    """
    paths: list[str] = []
    files, _ = resolve(locations[0])
    elsewhere = next((location for location in locations if resolve(location)[0] != files), None)
    if elsewhere is not None:
        raise DataError(f"{elsewhere} is on another file system than {locations[0]}; put all of a set on one")
    for location in locations:
        _, found = parquet_files(location)
        paths.extend(info.path for info in found if only is None or info.path in only)
    refuse_vanished(locations[0], only, paths)
    try:
        # the first file's schema by itself: Arrow would complain of a duplicate column without naming the file
        schema = with_retries(lambda: pq.read_schema(paths[0], filesystem=files))
    except _NOT_READABLE as error:
        raise _not_parquet(paths[0], error) from None
    try:
        return with_retries(lambda: pads.dataset(paths, format="parquet", filesystem=files))
    except pa.ArrowException as error:
        duplicate = next((name for name in schema.names if schema.names.count(name) > 1), None)
        if duplicate is None:
            raise _not_parquet(paths[0], error) from None
        raise DataError(
            f"{paths[0]}: {schema.names.count(duplicate)} columns {duplicate!r}; give each column a name of its own"
        ) from None


def refuse_vanished(location: str, wanted: frozenset[str] | None, found: Sequence[str]) -> None:
    """Raises StepError where one of the wanted paths is not among those found."""
    if wanted is not None and (missing := wanted.difference(found)):
        # the same command lists the files anew
        raise StepError(
            f"{min(missing)} has vanished from {location} since its files were listed; start the same command again"
        )


def check_footers(
    dataset: pads.FileSystemDataset, columns: Sequence[tuple[str, str]], locations: Sequence[str]
) -> tuple[int, int]:
    """The number of rows, and of bytes once unpacked, after a look into every footer.

    `columns`: (key of the run file, name) of each column that is read. Raises DataError for the first file that is cut
    short, or whose columns are missing, duplicate, of a type that cannot be used, or of another type than in the files
    before it. Arrow itself would fill a column that a file lacks with nulls.
    """
    first: dict[str, tuple[str, pa.DataType]] = {}
    rows = unpacked = 0
    elsewhere = f", or keep files of another kind out of {_first_few(locations)}" if len(dataset.files) > 1 else ""
    for path, schema, rows_of_file, bytes_of_file in _footers(dataset):
        for key, name in columns:
            kind = _checked_type(path, schema, key, name, elsewhere)
            first_path, first_kind = first.setdefault(name, (path, kind))
            if _type_family(first_kind) != _type_family(kind):
                raise DataError(
                    f"{path}: column {name!r} is {kind}, and in {first_path} it is {first_kind}; write it with one "
                    f"type in all files ({key})"
                )
        rows += rows_of_file
        unpacked += bytes_of_file
    return rows, unpacked


def _checked_type(path: str, schema: pa.Schema, key: str, name: str, elsewhere: str) -> pa.DataType:
    """The type of a column, without a dictionary around it. Raises DataError where the column cannot be used."""
    times = schema.names.count(name)
    if times != 1:
        what = f"no column {name!r}{_folder_of_that_name(path, name)}" if not times else f"{times} columns {name!r}"
        raise DataError(f"{path}: {what}; the file has {_first_few(schema.names)}; set {key}{elsewhere}")
    field = schema.field(name)
    if "arrow_pickled_object" in _extension_names(field):
        raise DataError(
            f"{path}: column {name!r} holds pickled Python objects, which could run code and are refused; "
            f"write it as plain values ({key})"
        )
    kind = value_type(field.type)
    if key in ("data.label", "data.true_label"):
        if not (pa.types.is_integer(kind) or pa.types.is_floating(kind) or is_text(kind)):
            raise DataError(
                f"{path}: column {name!r} is {kind}; labels have to be integers or class names (data.label, "
                "data.true_label)"
            )
    elif key == "data.id" and not (pa.types.is_integer(kind) or is_text(kind)):
        raise DataError(f"{path}: column {name!r} is {kind}; ids have to be integers or strings (data.id)")
    return kind


def _folder_of_that_name(path: str, name: str) -> str:
    """What to add where a folder is named after the column that a file lacks, as Hive names its partitions."""
    folder = next((part for part in PurePosixPath(path).parts[:-1] if part.startswith(f"{name}=")), None)
    return "" if folder is None else f" (the name of the folder {folder} is not read)"


def _footers(dataset: pads.FileSystemDataset) -> Iterator[tuple[str, pa.Schema, int, int]]:
    """(path, schema, number of rows, bytes once unpacked) of every file.

    Raises DataError for the first that is not a whole Parquet file.
    """

    def read_footer(fragment: Any) -> tuple[str, pa.Schema, int, int]:
        try:
            schema, footer = with_retries(lambda: (fragment.physical_schema, fragment.metadata))
            groups = range(footer.num_row_groups)
            return fragment.path, schema, footer.num_rows, sum(footer.row_group(i).total_byte_size for i in groups)
        except _NOT_READABLE as error:
            raise _not_parquet(fragment.path, error) from None

    # an object store takes 50 ms to answer a request, and answers many at once
    with ThreadPoolExecutor(16) as pool:
        yield from pool.map(read_footer, dataset.get_fragments())


def read_files(dataset: pads.FileSystemDataset, columns: Sequence[str]) -> Iterator[tuple[str, pa.Table]]:
    """(path, table) of every file. Raises DataError for the first that cannot be read."""
    for fragment in cast(Any, dataset.get_fragments()):
        read = functools.partial(fragment.to_table, columns=list(columns))
        try:
            table = with_retries(read)
        except _NOT_READABLE as error:
            raise _not_parquet(fragment.path, error) from None
        yield fragment.path, table


def read_row_groups(path: str, filesystem: fs.FileSystem, columns: Sequence[str]) -> Iterator[pa.Table]:
    """The row groups of a file. Raises DataError where one cannot be read."""
    fragment = pads.ParquetFileFormat().make_fragment(path, filesystem)
    try:
        for group in with_retries(fragment.split_by_row_group):
            yield with_retries(functools.partial(group.to_table, columns=list(columns)))
    except _NOT_READABLE as error:
        raise _not_parquet(path, error) from None


def read_column(dataset: pads.FileSystemDataset, name: str) -> Iterator[pa.Array]:
    """A column in parts. Raises DataError for the first file that cannot be read."""
    for fragment in cast(Any, dataset.get_fragments()):
        try:
            batches = with_retries(lambda fragment=fragment: list(fragment.to_batches(columns=[name])))
            yield from (batch.column(0) for batch in batches)
        except _NOT_READABLE as error:
            raise _not_parquet(fragment.path, error) from None


def refuse_unreadable(dataset: pads.FileSystemDataset, columns: Sequence[str]) -> None:
    """Raises DataError for the first file of which a page cannot be read."""
    for fragment in cast(Any, dataset.get_fragments()):
        try:
            for _ in fragment.to_batches(schema=dataset.schema, columns=list(columns)):
                pass
        except _NOT_READABLE as error:
            raise _not_parquet(fragment.path, error) from None


def file_sizes(dataset: pads.FileSystemDataset) -> tuple[tuple[str, int], ...]:
    """(path, size in bytes) of every file, sorted by path."""
    infos = dataset.filesystem.get_file_info(sorted(dataset.files))
    return tuple((info.path, info.size) for info in infos)


def value_type(kind: pa.DataType) -> pa.DataType:
    """The type of the values, where they are encoded by a dictionary."""
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def is_binary(kind: pa.DataType) -> bool:
    """Whether the type holds bytes with offsets of 32 bits, or of a fixed size."""
    return pa.types.is_binary(kind) or pa.types.is_fixed_size_binary(kind)


def first_line(error: BaseException) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _not_parquet(path: str, error: BaseException) -> DataError:
    return DataError(
        f"{path}: not readable as Parquet ({first_line(error)}); write the file again, or take it out of the folder"
    )


def _extension_names(field: pa.Field) -> str:
    """The names of the extension types of a column, and of what is nested in it."""
    names = [str((field.metadata or {}).get(b"ARROW:extension:name", b"")), getattr(field.type, "extension_name", "")]
    storage = getattr(field.type, "storage_type", field.type)
    nested = [storage.field(i) for i in range(storage.num_fields)]
    if pa.types.is_dictionary(storage):
        nested.append(pa.field("", storage.value_type))
    return " ".join([*names, *map(_extension_names, nested)])


def _type_family(kind: pa.DataType) -> str:
    """What the types of a column have to agree in from file to file: the width of numbers and of offsets may differ."""
    for name, belongs in {
        "integer": pa.types.is_integer(kind),
        "number": pa.types.is_floating(kind),
        "text": is_text(kind),
        "bytes": pa.types.is_large_binary(kind) or is_binary(kind),
    }.items():
        if belongs:
            return name
    return str(kind)


def _first_few(names: Sequence[str]) -> str:
    shown = ", ".join(names[:8])
    return f"{shown} and {len(names) - 8} more" if len(names) > 8 else shown
