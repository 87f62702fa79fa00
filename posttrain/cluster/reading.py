"""Reading a data set into partitions: canonical blocks that depend on the samples alone, not on their files.

Ray Data reads and normalises every split, sorts all rows by `split * 2^60 + hash(sample_id)` with fixed
boundaries, and keeps the blocks in the object store (which spills to disk); small data are brought into the same
blocks by the driver itself. From here on a sample is (partition, row), and nothing can depend on how files, blocks or
workers were laid out.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import PurePosixPath
from typing import Any, Literal, NoReturn, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.dataset as pads
import pyarrow.parquet as pq
import ray
import ray.data
import ray.exceptions
from pyarrow import fs

from posttrain import errors
from posttrain.data.listing import image_files, parquet_files
from posttrain.errors import DataError, DuplicateIdError, LabelRangeError, PosttrainError, StepError
from posttrain.schema import (
    FILE,
    IMAGE,
    LABEL,
    ORDER,
    ORDER_BITS,
    SAMPLE_ID,
    SPLITS,
    TRUE_LABEL,
    ImageSpec,
    order_key,
    partition_boundaries,
    partition_count,
    uniform,
)
from posttrain.store.folder import resolve, with_retries
from posttrain.vision.noise import from_matrix, instance_dependent, pair, symmetric

# pyarrow makes these functions when it is imported: a type checker sees none of them
pc = cast(Any, pyarrow.compute)

Progress = Callable[[int, int], None]
"""Called with (done, total)."""

# what Arrow raises of files that are cut short, damaged, or not made by it
_NOT_READABLE = (pa.ArrowException, OSError, UnicodeDecodeError)

# seeds of the draws that decide per sample id; any three different numbers
_HELD_OUT_DRAW = 1
_NOISE_DRAW = 2

_TRIES = 4
"""Of a task of Ray Data whose process ends, where that may be the fault of an image."""

_PATH = "path"
"""Column in which Ray Data gives the path of a file."""

_TASKS = 256
"""Of Ray Data at most, where posttrain itself reads the files in them."""

SMALL_BYTES = 64 * 2**20
"""Data of so many bytes at most, once they are unpacked, are read and sorted in the driver's own process."""


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
    """Type of the image column; None: no column, or one that posttrain made."""
    bytes: int = 0
    """Of all that is read, once it is unpacked."""
    passed_over: tuple[int, str] | None = None
    """How many files of a class folder are not named as images, and the first of them."""


@dataclass(frozen=True)
class Partition:
    """One canonical block, in the object store."""

    index: int
    rows: int
    block: ray.ObjectRef[pa.Table] = field(repr=False)


@dataclass(frozen=True)
class Split:
    """The samples of one split, in partitions sorted by the hash of their ids."""

    name: str
    partitions: tuple[Partition, ...]
    class_counts: np.ndarray
    digest: str
    """SHA-256 over all ids and labels in canonical order, 16 hexadecimal digits."""

    @property
    def rows(self) -> int:
        return sum(partition.rows for partition in self.partitions)


# -- before anything is read ----------------------------------------------------------------------------


def list_source(source: Source) -> Listing:
    """What a source holds, from names and footers alone. Raises DataError where it cannot be read."""
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
    dataset = _dataset(source)
    rows, unpacked = _refuse_unfit(dataset, source)
    if rows == 0:
        raise DataError(f"{source.locations[0]}: holds no samples; name a location with at least one row")
    metadata = dataset.schema.metadata or {}
    return Listing(
        rows,
        _class_names(metadata, source.locations[0]),
        _declared_shape(metadata, source.locations[0]),
        _sizes(dataset),
        dataset.schema.field(source.image).type,
        unpacked,
    )


def _refuse_unfit(dataset: pads.FileSystemDataset, source: ParquetSource) -> tuple[int, int]:
    """Rows, and bytes once unpacked.

    Raises DataError for the first file that is cut short or has not the columns that it needs.
    Looks into every footer: Arrow itself would fill a column that a file lacks with nulls.
    """
    first: dict[str, tuple[str, pa.DataType]] = {}
    rows = unpacked = 0
    several = len(dataset.files) > 1
    elsewhere = f", or keep files of another kind out of {_briefly(source.locations)}" if several else ""
    for path, schema, of_file, size in _footers(dataset):
        for key, name in _columns(source):
            times = schema.names.count(name)
            if times != 1:
                what = f"no column {name!r}{_of_a_folder(path, name)}" if not times else f"{times} columns {name!r}"
                raise DataError(f"{path}: {what}; the file has {_briefly(schema.names)}; set {key}{elsewhere}")
            field = schema.field(name)
            if "arrow_pickled_object" in _kinds_within(field):
                raise DataError(
                    f"{path}: column {name!r} holds pickled Python objects, which could run code and are refused; "
                    f"write it as plain values ({key})"
                )
            kind = _plain_kind(field.type)
            _refuse_kind(key, kind, path, name)
            before = first.setdefault(name, (path, kind))
            if _family(before[1]) != _family(kind):
                raise DataError(
                    f"{path}: column {name!r} is {kind}, and in {before[0]} it is {before[1]}; write it with one type "
                    f"in all files ({key})"
                )
        rows += of_file
        unpacked += size
    return rows, unpacked


def _of_a_folder(path: str, name: str) -> str:
    """What to add where a folder is named after the column that a file lacks, as Hive does with its partitions."""
    folder = next((part for part in PurePosixPath(path).parts[:-1] if part.startswith(f"{name}=")), None)
    return "" if folder is None else f" (the name of the folder {folder} is not read)"


def _footers(dataset: pads.FileSystemDataset) -> Iterator[tuple[str, pa.Schema, int, int]]:
    """(path, schema, number of rows, bytes once unpacked) of every file.

    Raises DataError for the first that is no whole Parquet file.
    """

    def look(fragment: Any) -> tuple[str, pa.Schema, int, int]:
        try:
            schema, footer = with_retries(lambda: (fragment.physical_schema, fragment.metadata))
            groups = range(footer.num_row_groups)
            return fragment.path, schema, footer.num_rows, sum(footer.row_group(i).total_byte_size for i in groups)
        except _NOT_READABLE as error:
            raise _no_parquet(fragment.path, error) from None

    # an object store answers one question in 50 ms, and many of them in the same time
    with ThreadPoolExecutor(16) as pool:
        yield from pool.map(look, dataset.get_fragments())


def _no_parquet(path: str, error: BaseException) -> DataError:
    return DataError(
        f"{path}: not readable as Parquet ({_first_line(error)}); write the file again, or take it out of the folder"
    )


def _columns(source: ParquetSource) -> Iterator[tuple[str, str]]:
    """(key of the run file, name) of each column that is read."""
    yield from (("data.id", source.id), ("data.image", source.image), ("data.label", source.label))
    if source.true_label is not None:
        yield "data.true_label", source.true_label


def _columns_read(source: ParquetSource) -> list[str]:
    return list(dict.fromkeys(name for _, name in _columns(source)))


def _path_column(source: ParquetSource) -> str:
    """The name under which the path of its file goes beside each row: "path", or one that no column read has."""
    name = _PATH
    while name in _columns_read(source):
        name = f"_{name}"
    return name


def _kinds_within(field: pa.Field) -> str:
    """The names of the extension types of a column, and of what is nested in it."""
    names = [str((field.metadata or {}).get(b"ARROW:extension:name", b"")), getattr(field.type, "extension_name", "")]
    storage = getattr(field.type, "storage_type", field.type)
    nested = [storage.field(i) for i in range(storage.num_fields)]
    if pa.types.is_dictionary(storage):
        nested.append(pa.field("", storage.value_type))
    return " ".join([*names, *map(_kinds_within, nested)])


def _plain_kind(kind: pa.DataType) -> pa.DataType:
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def _family(kind: pa.DataType) -> str:
    """What two files have to agree in: numbers of any width, text and bytes with any offsets."""
    for name, belongs in {
        "integer": pa.types.is_integer(kind),
        "number": pa.types.is_floating(kind),
        "text": _is_text(kind),
        "bytes": pa.types.is_large_binary(kind) or _is_binary(kind),
    }.items():
        if belongs:
            return name
    return str(kind)


def _refuse_kind(key: str, kind: pa.DataType, path: str, name: str) -> None:
    if key in ("data.label", "data.true_label"):
        if not (pa.types.is_integer(kind) or pa.types.is_floating(kind) or _is_text(kind)):
            raise DataError(
                f"{path}: column {name!r} is {kind}; labels have to be integers or class names (data.label, "
                "data.true_label)"
            )
    elif key == "data.id" and not (pa.types.is_integer(kind) or _is_text(kind)):
        raise DataError(f"{path}: column {name!r} is {kind}; ids have to be integers or strings (data.id)")


def _briefly(names: Sequence[str]) -> str:
    shown = ", ".join(names[:8])
    return f"{shown} and {len(names) - 8} more" if len(names) > 8 else shown


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


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
            f"{where}: class_names in the schema's metadata are no list of names ({_first_line(error)}); mend them, "
            "or leave them out and set data.classes"
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
            f"{where}: image_shape in the schema's metadata is no [height, width, channels] ({_first_line(error)}); "
            "mend it, or leave it out and set data.image_shape"
        ) from None
    return tuple(shape)


def _dataset(source: ParquetSource) -> pads.FileSystemDataset:
    parts: list[str] = []
    files = None
    for location in source.locations:
        files, found = parquet_files(location)
        parts.extend(info.path for info in found if source.only is None or info.path in source.only)
    _refuse_vanished(source.locations[0], source.only, parts)
    try:
        # the first file's schema by itself: Arrow would complain of a double column without naming the file
        schema = with_retries(lambda: pq.read_schema(parts[0], filesystem=files))
    except _NOT_READABLE as error:
        raise _no_parquet(parts[0], error) from None
    try:
        return with_retries(lambda: pads.dataset(parts, format="parquet", filesystem=files))
    except pa.ArrowException as error:
        double = next((name for name in schema.names if schema.names.count(name) > 1), None)
        if double is None:
            raise _no_parquet(parts[0], error) from None
        raise DataError(
            f"{parts[0]}: {schema.names.count(double)} columns {double!r}; give each column a name of its own"
        ) from None


def _sizes(dataset: pads.FileSystemDataset) -> tuple[tuple[str, int], ...]:
    infos = dataset.filesystem.get_file_info(sorted(dataset.files))
    return tuple((info.path, info.size) for info in infos)


def _list_folder(source: FolderSource) -> Listing:
    _, found, others = image_files(source.location)
    images = [info for info in found if source.only is None or info.path in source.only]
    _refuse_vanished(source.location, source.only, [info.path for info in images])
    _, root = resolve(source.location)
    relative = [PurePosixPath(f.path).relative_to(root) for f in images]
    loose = next((path for path in relative if len(path.parts) < 2), None)
    if loose is not None:
        raise DataError(f"{source.location}/{loose}: lies in no class folder; expected <class>/<image>")
    classes = tuple(sorted({path.parts[0] for path in relative}))
    files = tuple((f.path, f.size) for f in images)
    unpacked = sum(size for _, size in files)
    passed_over = (len(others), others[0]) if others else None
    return Listing(len(images), classes, None, files, bytes=unpacked, passed_over=passed_over)


def _refuse_vanished(location: str, wanted: frozenset[str] | None, found: Sequence[str]) -> None:
    if wanted is not None and (missing := wanted.difference(found)):
        # a later start lists what is there then
        raise StepError(
            f"{min(missing)} has vanished from {location} since its files were listed; start the same command again"
        )


def string_labels(source: ParquetSource) -> tuple[str, ...] | None:
    """The distinct names where the label column holds text, sorted; None where it holds numbers."""
    dataset = _dataset(source)
    if not _is_text(_plain_kind(dataset.schema.field(source.label).type)):
        return None
    names: set[str] = set()
    for column in _each_label(dataset, source):
        names.update(name for name in pc.unique(column).to_pylist() if name is not None)
    return tuple(sorted(names))


def highest_label(source: ParquetSource) -> int:
    """The largest label of a numeric label column."""
    highest = -1
    for column in _each_label(_dataset(source), source):
        value = pc.max(column).as_py()
        if value is not None and math.isinf(value):
            raise DataError(
                f"{source.locations[0]}: a label is {value}; is data.label = {source.label!r} the right column?"
            )
        highest = max(highest, -1 if value is None or math.isnan(value) else int(value))
    return highest


def _each_label(dataset: pads.FileSystemDataset, source: ParquetSource) -> Iterator[pa.Array]:
    """The label column in parts. Raises DataError naming the file where a page of it cannot be read."""
    for fragment in cast(Any, dataset.get_fragments()):
        try:
            batches = with_retries(lambda fragment=fragment: list(fragment.to_batches(columns=[source.label])))
            yield from (batch.column(0) for batch in batches)
        except _NOT_READABLE as error:
            raise _no_parquet(fragment.path, error) from None


# -- reading ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Noise:
    """Labels of the training and validation data that are flipped on purpose, for measuring."""

    kind: Literal["symmetric", "pair", "instance", "matrix"]
    rate: float | None
    """None with kind matrix."""
    seed: int
    matrix: tuple[tuple[float, ...], ...] | None
    """Kind matrix: row y holds the chance of each given label where the class is y."""
    image: ImageSpec
    """How images are seen: kind instance decodes them."""


def read(
    sources: Mapping[str, Source],
    *,
    classes: Sequence[str],
    held_out_share: float | None,
    noise: Noise | None,
    seed: int,
    ids_span_sets: bool = True,
    progress: Progress = lambda done, total: None,
) -> dict[str, Split]:
    """Every split in partitions. `held_out_share` splits a validation set off the training data, by id.

    `ids_span_sets`: an id names the same sample in every source, so that one in two of them is refused.
    Raises DataError, LabelRangeError or DuplicateIdError, naming file and value.
    """
    listings = {name: list_source(source) for name, source in sources.items()}
    rows = {name: listing.rows for name, listing in listings.items()}
    total_rows = sum(rows.values())
    if held_out_share is not None:
        rows["validation"] = max(1, round(rows["train"] * held_out_share))
    layout = _Layout.of(rows)
    # of an image that ends the process which decodes it, this one would die
    decodes = noise is not None and noise.kind == "instance"
    here = not decodes and sum(listing.bytes for listing in listings.values()) <= SMALL_BYTES

    def normalising(name: str) -> dict[str, Any]:
        return {
            "split": name,
            "source": _without_data(sources[name]),
            "classes": tuple(classes),
            "held_out": (held_out_share, seed) if name == "train" else None,
            "noise": noise if name != "test" else None,
        }

    inspections: list[Inspection] = []
    try:
        if here:
            blocks = []
            for block in _sorted_here(sources, listings, normalising, layout):
                blocks.append(ray.put(block))
                inspections.append(inspect(block, len(classes)))
                progress(sum(i.rows for i in inspections), total_rows)
        else:
            tries = _TRIES if decodes else None
            blocks = _sorted_by_ray_data(sources, listings, normalising, layout, tries=tries)
            for reference in [_inspect.remote(block, len(classes)) for block in blocks]:
                inspections.append(ray.get(reference))
                progress(sum(i.rows for i in inspections), total_rows)
    except Exception as error:
        if any(isinstance(cause, ray.exceptions.WorkerCrashedError) for cause in _causes(error)):
            raise StepError(
                f"{_TRIES} processes ended one after another while they read the data; if it is an image that ends "
                "the process which decodes it, a run without data.noise quarantines it and names it: take it out"
            ) from None
        if not isinstance(told := _told(error), PosttrainError):
            # neither Ray nor Arrow says which file it was
            for source in sources.values():
                _refuse_unreadable(source)
        raise told from None
    if len(blocks) != len(layout.owners):
        raise PosttrainError(f"Ray Data sorted into {len(blocks)} blocks where {len(layout.owners)} were asked for")
    splits = {}
    for name in layout.names:
        mine = [i for i, owner in enumerate(layout.owners) if owner == name]
        splits[name] = _split(name, [blocks[i] for i in mine], [inspections[i] for i in mine], classes)
    if ids_span_sets:
        _refuse_shared_ids(splits, sources, here=here)
    total = sum(split.rows for split in splits.values())
    if total != total_rows:
        raise PosttrainError(f"{total_rows} samples were listed but {total} were read; did the files change meanwhile?")
    return splits


@dataclass(frozen=True)
class _Layout:
    """The partitions of all splits one behind the other, by the order key: the number of the split above the id's hash."""

    names: tuple[str, ...]
    owners: tuple[str, ...]
    """Of each partition, its split."""
    boundaries: tuple[int, ...]
    """The order key with which each partition but the first begins."""

    @classmethod
    def of(cls, rows: Mapping[str, int]) -> _Layout:
        """`rows`: how many each split has, or is thought to get."""
        names = tuple(name for name in SPLITS if name in rows)
        boundaries: list[int] = []
        owners: list[str] = []
        for name in names:
            base = SPLITS.index(name) << ORDER_BITS
            boundaries += [base] if owners else []
            boundaries += [base + edge for edge in partition_boundaries(partition_count(rows[name]))]
            owners += [name] * partition_count(rows[name])
        return cls(names, tuple(owners), tuple(boundaries))


def _sorted_by_ray_data(
    sources: Mapping[str, Source],
    listings: Mapping[str, Listing],
    normalising: Callable[[str], dict[str, Any]],
    layout: _Layout,
    *,
    tries: int | None,
) -> Sequence[Any]:
    """The partitions, read, normalised and sorted by the cluster.

    `tries`: of a task whose process ends; None: no bound.
    """
    context = ray.data.DataContext.get_current()
    # reader V2 packs small data into one block and costs four times the CPU
    context.use_datasource_v2 = False
    options: Any = {} if tries is None else {"max_retries": tries - 1}
    with warnings.catch_warnings():
        # deprecated in 2.60, which has no other way to say it: a later Ray, another line here
        warnings.filterwarnings("ignore", "`ray_remote_args` is deprecated")
        parts = [
            _dataset_of(source, listings[name]).map_batches(
                cast(Any, normalise),  # the annotation of `map_batches` does not know `fn_kwargs`
                batch_format="pyarrow",
                batch_size=None,
                fn_kwargs=normalising(name),
                **options,
            )
            for name, source in sources.items()
        ]
    whole = parts[0].union(*parts[1:]) if len(parts) > 1 else parts[0]
    boundaries: list[int | float] = list(layout.boundaries)
    return whole.sort(ORDER, boundaries=boundaries).materialize().to_arrow_refs()


def _sorted_here(
    sources: Mapping[str, Source],
    listings: Mapping[str, Listing],
    normalising: Callable[[str], dict[str, Any]],
    layout: _Layout,
) -> Iterator[pa.Table]:
    """The same partitions of small data, made in this process: Ray Data takes ten seconds to begin."""
    tables: dict[str, pa.Table] = {}
    edges: dict[str, np.ndarray] = {}
    for name, source in sources.items():
        parts = [normalise(table, **normalising(name)) for table in _tables_of(source, listings[name])]
        whole = pa.concat_tables(parts)
        keys = whole[ORDER].to_numpy()
        order = np.argsort(keys, kind="stable")
        tables[name] = whole.take(pa.array(order))
        edges[name] = np.array([0, *np.searchsorted(keys[order], layout.boundaries), len(keys)])
    for partition, owner in enumerate(layout.owners):
        # a set that is not read from a source of its own is split off the training set
        name = owner if owner in tables else "train"
        first, end = edges[name][partition : partition + 2]
        # a copy: a slice would hold on to all of them
        yield tables[name].take(pa.array(np.arange(first, end))).combine_chunks()


def _tables_of(source: Source, listing: Listing) -> Iterator[pa.Table]:
    """The files of a source, one by one, or some of its images, as Ray Data gives them to `normalise`."""
    if isinstance(source, TableSource):
        yield source.table
        return
    if isinstance(source, FolderSource):
        files, _ = resolve(source.location)
        paths = [path for path, _ in listing.files]

        def content(path: str) -> bytes:
            with files.open_input_file(path) as stream:
                return with_retries(stream.readall)

        # an object store answers one question in 50 ms, and many of them in the same time
        with ThreadPoolExecutor(16) as pool:
            yield pa.table({"bytes": pa.array(pool.map(content, paths), pa.binary()), "path": pa.array(paths)})
        return
    dataset = _dataset(source)
    for fragment in cast(Any, dataset.get_fragments()):
        read = functools.partial(fragment.to_table, columns=_columns_read(source))
        try:
            table = with_retries(read)
        except _NOT_READABLE as error:
            raise _no_parquet(fragment.path, error) from None
        yield _with_path(table, fragment.path, _path_column(source))


def _with_path(table: pa.Table, path: str, name: str) -> pa.Table:
    return table.append_column(name, pa.array([path] * table.num_rows, pa.string()))


def _refuse_unreadable(source: Source) -> None:
    """Raises DataError for the first Parquet file of which a page cannot be read."""
    if not isinstance(source, ParquetSource):
        return
    dataset = _dataset(source)
    columns = _columns_read(source)
    for fragment in cast(Any, dataset.get_fragments()):
        try:
            for _ in fragment.to_batches(schema=dataset.schema, columns=columns):
                pass
        except _NOT_READABLE as error:
            raise _no_parquet(fragment.path, error) from None


def true_labels_are_known(sources: Mapping[str, Source], noise: Noise | None) -> bool:
    """Whether the removals can be measured against labels known to be right."""
    train = sources["train"]
    return noise is not None or (isinstance(train, ParquetSource) and train.true_label is not None)


def _without_data(source: Source) -> Source:
    """The source as every task gets it: without what may be as long as the data set."""
    if isinstance(source, TableSource):
        return TableSource(source.table.slice(0, 0), source.name)
    return replace(source, only=None)


def _dataset_of(source: Source, listing: Listing) -> ray.data.Dataset:
    if isinstance(source, TableSource):
        return ray.data.from_arrow(source.table)
    if isinstance(source, FolderSource):
        files, _ = resolve(source.location)
        paths = [path for path, _ in listing.files]
        return ray.data.read_binary_files(paths, filesystem=files, include_paths=True)
    dataset = _dataset(source)
    columns = _columns_read(source)
    if _PATH in columns:
        # Ray Data would put the path of the file in its place
        paths = [{_PATH: path} for path in dataset.files]
        files = ray.data.from_items(paths, override_num_blocks=min(len(paths), _TASKS))
        return files.map_batches(
            cast(Any, _by_row_group),
            batch_format="pyarrow",
            fn_kwargs={"filesystem": dataset.filesystem, "columns": columns, "path_column": _path_column(source)},
        )
    read = ray.data.read_parquet(
        list(dataset.files),
        filesystem=dataset.filesystem,
        include_paths=True,
        # else a folder `label=0` would overwrite a column `label` of its files
        partitioning=None,
        # else it would pass over what is not called .parquet; these files are known to be Parquet
        file_extensions=None,
    )
    return read.select_columns([*columns, _PATH])


def _by_row_group(
    files: pa.Table, *, filesystem: fs.FileSystem, columns: list[str], path_column: str
) -> Iterator[pa.Table]:
    """The columns of each of the Parquet files, row group by row group, with the path of the file beside them."""
    for path in files[_PATH].to_pylist():
        fragment = pads.ParquetFileFormat().make_fragment(path, filesystem)
        try:
            for group in with_retries(fragment.split_by_row_group):
                table = with_retries(functools.partial(group.to_table, columns=columns))
                yield _with_path(table, path, path_column)
        except _NOT_READABLE as error:
            raise _no_parquet(path, error) from None


def normalise(
    table: pa.Table,
    *,
    split: str,
    source: Source,
    classes: tuple[str, ...],
    held_out: tuple[float | None, int] | None,
    noise: Noise | None,
) -> pa.Table:
    """A block in the project's columns: order, sample_id, image, label (-1: none), file, true_label."""
    true_labels: np.ndarray | None = None
    if isinstance(source, FolderSource):
        _, root = resolve(source.location)
        relative = [
            str(PurePosixPath("/" + p.lstrip("/")).relative_to("/" + root.lstrip("/")))
            for p in table["path"].to_pylist()
        ]
        ids = pa.array(relative, pa.string())
        position = {name: index for index, name in enumerate(classes)}
        labels = np.array([position.get(path.split("/", 1)[0], -2) for path in relative], np.int32)
        if (labels == -2).any():
            path = relative[int(np.argmax(labels == -2))]
            raise LabelRangeError(
                f"{source.location}/{path}: its class folder is not among the {len(classes)} classes "
                f"of the training data; rename it, or name all classes in data.classes"
            )
        images, files = table["bytes"], ids
    else:
        parquet = isinstance(source, ParquetSource)
        id_column, image_column, label_column = (
            (source.id, source.image, source.label) if parquet else ("id", IMAGE, LABEL)
        )
        files = table[_path_column(source)] if parquet else pa.array([source.name] * table.num_rows, pa.string())
        where = files[0].as_py() if parquet and table.num_rows else getattr(source, "name", "")
        ids = _ids(table[id_column], where, id_column)
        labels = _labels(table[label_column], classes, where, label_column, ids)
        images = table[image_column]
        if parquet and source.true_label:
            true_labels = _labels(table[source.true_label], classes, where, source.true_label, ids)
    keys = ids.to_numpy(zero_copy_only=False)
    if noise is not None:
        true_labels = labels if true_labels is None else true_labels
        labels = _noisy(labels, keys, images, noise, len(classes))
    splits = np.full(table.num_rows, SPLITS.index(split), np.int64)
    if held_out is not None and held_out[0] is not None:
        drawn = uniform(keys, held_out[1] + _HELD_OUT_DRAW * 1_000_003) < held_out[0]
        splits[drawn] = SPLITS.index("validation")
    order = order_key(keys) + (splits << ORDER_BITS)
    if _is_binary(images.type):
        # 32-bit offsets end at 2 GiB, which a partition of large images can pass
        images = pc.cast(images, pa.large_binary())
    columns = {
        ORDER: pa.array(order, pa.int64()),
        SAMPLE_ID: ids,
        IMAGE: images,
        LABEL: pa.array(labels, pa.int32()),
        FILE: pc.cast(files, pa.string()),
        TRUE_LABEL: pa.array(labels if true_labels is None else true_labels, pa.int32()),
    }
    return pa.table(columns)


def _noisy(
    labels: np.ndarray, ids: np.ndarray, images: pa.Array | pa.ChunkedArray, noise: Noise, classes: int
) -> np.ndarray:
    """A block's labels with the noise. An empty one stays, and with kind instance that of an unreadable image."""
    seed = noise.seed + _NOISE_DRAW
    noisy, given = labels.copy(), labels >= 0
    if noise.kind == "matrix":
        assert noise.matrix is not None, "the run file's check"
        noisy[given] = from_matrix(labels[given], ids[given], matrix=np.array(noise.matrix), seed=seed)
        return noisy
    assert noise.rate is not None, "the run file's check"
    if noise.kind == "instance":
        from posttrain.vision.images import decode_column  # torch: the other kinds read without it

        spec = noise.image
        pixels, readable, _ = decode_column(
            images, channels=spec.channels, size=spec.size, shape=spec.shape, background=spec.background
        )
        seen = given & readable
        noisy[seen] = instance_dependent(
            labels[seen], ids[seen], pixels.numpy()[given[readable]], classes=classes, rate=noise.rate, seed=seed
        )
        return noisy
    flip = {"symmetric": symmetric, "pair": pair}[noise.kind]
    noisy[given] = flip(labels[given], ids[given], classes=classes, rate=noise.rate, seed=seed)
    return noisy


def _is_binary(kind: pa.DataType) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_fixed_size_binary(kind)


def _ids(column: pa.ChunkedArray, where: str, name: str) -> pa.Array:
    if column.null_count:
        raise DataError(f"{where}: column {name!r} has {column.null_count} empty ids; every sample needs one")
    kind = column.type
    if pa.types.is_integer(kind):
        target = pa.int64()
    elif _is_text(kind):
        target = pa.string()
    else:
        raise DataError(f"{where}: column {name!r} is {kind}; ids have to be integers or strings (data.id)")
    try:
        cast = pc.cast(column, target)
    except pa.ArrowInvalid:
        raise DataError(
            f"{where}: column {name!r} holds an id above 2^63 - 1; write it as a string (data.id)"
        ) from None
    return cast.combine_chunks() if isinstance(cast, pa.ChunkedArray) else cast


def _labels(column: pa.ChunkedArray, classes: tuple[str, ...], where: str, name: str, ids: pa.Array) -> np.ndarray:
    """int32 class indices; -1 where the label is empty. Out-of-range labels are kept: `inspect` names them."""
    kind = column.type
    if pa.types.is_dictionary(kind):
        column = pc.cast(column, kind.value_type)
        kind = kind.value_type
    if _is_text(kind):
        known = pa.array(classes, kind)
        index = pc.index_in(column, known)
        unknown = pc.and_(pc.is_null(index), pc.is_valid(column))
        if pc.any(unknown).as_py():
            at = pc.index(unknown, True).as_py()
            raise LabelRangeError(
                f"{where}: label {column[at].as_py()!r} at sample_id {ids[at].as_py()!r} is not among the "
                f"{len(classes)} classes (column {name!r}); set data.classes or correct the label"
            )
        return pc.fill_null(index, -1).to_numpy().astype(np.int32)
    if not (pa.types.is_integer(kind) or pa.types.is_floating(kind)):
        raise DataError(f"{where}: column {name!r} is {kind}; labels have to be integers or class names (data.label)")
    values = column.to_numpy().astype(np.float64)
    absent = np.isnan(values)
    broken = ~absent & (values != np.floor(values))
    if broken.any():
        at = int(np.argmax(broken))
        raise DataError(
            f"{where}: label {values[at]} at sample_id {ids[at].as_py()!r} is not a whole number; is data.label = "
            f"{name!r} the right column?"
        )
    outside = ~absent & ((values < 0) | (values >= len(classes)))
    if outside.any():
        at = int(np.argmax(outside))
        hint = (
            ", or data.classes too small?" if values[at] >= 0 else "? Where a label is not known, leave it empty (null)"
        )
        raise LabelRangeError(
            f"{where}: label {values[at]:.0f} at sample_id {ids[at].as_py()!r}, but there are {len(classes)} classes "
            f"(0..{len(classes) - 1}); is data.label = {name!r} the right column{hint}"
        )
    return np.where(absent, -1, values).astype(np.int32)


# -- looking at the partitions ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Inspection:
    """What the driver needs to know of a partition."""

    rows: int
    class_counts: np.ndarray
    digest: bytes
    duplicate: tuple[Any, str, str] | None
    """(id, file, file) of a sample that occurs twice."""


@ray.remote
def _inspect(table: pa.Table, classes: int) -> Inspection:
    return inspect(table, classes)


def inspect(table: pa.Table, classes: int) -> Inspection:
    """Counts and digest of a partition, and the first id in it that occurs twice."""
    labels = table[LABEL].to_numpy()
    counts = np.bincount(labels[labels >= 0], minlength=classes)
    digest = hashlib.sha256()
    ids = table[SAMPLE_ID].to_pylist()
    for identity, label in zip(ids, labels, strict=True):
        digest.update(f"{identity!r}\t{label}\n".encode())
    duplicate = None
    if len(set(ids)) < len(ids):
        seen: dict[Any, int] = {}
        for at, identity in enumerate(ids):
            if identity in seen:
                first, second = table[FILE][seen[identity]].as_py(), table[FILE][at].as_py()
                duplicate = (identity, first, second)
                break
            seen[identity] = at
    return Inspection(table.num_rows, counts, digest.digest(), duplicate)


def _split(name: str, blocks: Sequence[Any], inspections: Sequence[Inspection], classes: Sequence[str]) -> Split:
    digest = hashlib.sha256(f"{name} {list(classes)}".encode())
    for inspection in inspections:
        if inspection.duplicate is not None:
            identity, first, second = inspection.duplicate
            raise DuplicateIdError(
                f"{first}: sample_id {identity!r} occurs twice in the {name} data (again in {second}); "
                "ids have to be unique: is data.id the right column?"
            )
        digest.update(inspection.digest)
    partitions = tuple(
        Partition(index, inspection.rows, block)
        for index, (block, inspection) in enumerate(zip(blocks, inspections, strict=True))
    )
    counts = np.sum([inspection.class_counts for inspection in inspections], axis=0)
    if sum(b.rows for b in partitions) == 0:
        raise DataError(f"the {name} set is empty; name data.{name}, or raise data.validation_share")
    return Split(name, partitions, counts, digest.hexdigest()[:16])


@ray.remote
def _ids_alone(block: pa.Table) -> pa.Table:
    return block.select([SAMPLE_ID])


def _shared_ids(
    mine: pa.Table, others: list[list[ray.ObjectRef[pa.Table]]], other_names: list[str]
) -> tuple[Any, str] | None:
    ids = mine[SAMPLE_ID].combine_chunks()
    for name, references in zip(other_names, others, strict=True):
        for reference in references:
            other = ray.get(reference)[SAMPLE_ID].combine_chunks()
            if other.type != ids.type:
                continue
            both = ids.filter(pc.is_in(ids, other))
            if len(both):
                return both[0].as_py(), name
    return None


def _refuse_shared_ids(splits: Mapping[str, Split], sources: Mapping[str, Source], *, here: bool) -> None:
    """`here`: looked for in this process. The training data must share no id with what it is measured on.

    The ids of class folders are relative to each folder, so that there the folders have to differ instead.
    """
    train = sources["train"]
    held_back = {}
    for name, split in splits.items():
        source = sources.get(name)
        if name == "train" or source is None:
            continue
        if isinstance(train, FolderSource) and isinstance(source, FolderSource):
            if resolve(train.location)[1].rstrip("/") == resolve(source.location)[1].rstrip("/"):
                raise DuplicateIdError(
                    f"data.train and data.{name} are the same folder, {source.location}; what is measured on must "
                    "not be trained on"
                )
            continue
        held_back[name] = [
            partition.block if here else _ids_alone.remote(partition.block) for partition in split.partitions
        ]
    if not held_back:
        return
    names, others = list(held_back), list(held_back.values())
    blocks = [partition.block for partition in splits["train"].partitions]
    if here:
        found = [_shared_ids(ray.get(block), others, names) for block in blocks]
    else:
        look = ray.remote(_shared_ids)
        found = ray.get([look.remote(block, others, names) for block in blocks])
    for shared in found:
        if shared is not None:
            identity, name = shared
            raise DuplicateIdError(
                f"sample_id {identity!r} is in both the train and the {name} set; what is measured on must not be "
                "trained on: take it out of one of them, or, where ids begin anew in each set, set data.id_scope to set"
            )


def raise_cause(error: BaseException) -> NoReturn:
    """Raise posttrain's own error out of the wrappings that Ray puts around it; else `error` as it is.

    What a disk or an object store refuses becomes a StepError.
    """
    told = _told(error)
    if told is error:
        raise error
    raise told from None


def _told(error: BaseException) -> BaseException:
    causes = list(_causes(error))
    for inner in causes:
        if isinstance(inner, PosttrainError):
            return inner
    # Ray Data keeps of the exception that a function of its own raised only the text
    told = re.search(r"^posttrain\.errors\.(\w+): (.+)$", str(error), re.MULTILINE)
    if told is not None and issubclass(kind := getattr(errors, told[1], Exception), PosttrainError):
        return kind(told[2])
    for inner in causes:
        # Ray's own error is one of this kind as well, with the whole trace as its text
        if isinstance(inner, OSError) and not isinstance(inner, ray.exceptions.RayError | ConnectionError):
            why = " ".join(str(inner).split())
            return StepError(f"{why}; mend it and start the same command again to go on")
    return error


def _causes(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    queue: list[BaseException | None] = [error]
    while queue:
        inner = queue.pop()
        if inner is None or id(inner) in seen:
            continue
        seen.add(id(inner))
        yield inner
        queue += [getattr(inner, "cause", None), inner.__cause__, inner.__context__]


def _first_line(error: BaseException) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
