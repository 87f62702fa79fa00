"""A data set in partitions: blocks that depend on the samples alone, not on their files.

Ray Data reads and normalises every split, sorts all rows by `split * 2^60 + hash(sample_id)` with fixed
boundaries, and keeps the blocks in the object store (which spills to disk); small data are brought into the same
blocks by the driver itself. From here on a sample is (partition, row), and nothing can depend on how files, blocks or
workers were laid out.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn, cast

import numpy as np
import pyarrow as pa
import ray
import ray.data
import ray.exceptions
from pyarrow import fs

from posttrain.cluster.failures import cause_chain, unwrapped
from posttrain.cluster.inspection import Inspection, inspect, inspect_remotely, refuse_shared_ids
from posttrain.data.normalise import normalise
from posttrain.data.parquet_files import read_row_groups, refuse_unreadable
from posttrain.data.sources import (
    PATH,
    FolderSource,
    Listing,
    ParquetSource,
    Source,
    TableSource,
    list_source,
    parquet_dataset,
    tables_of,
    with_path,
    without_data,
)
from posttrain.errors import DataError, DuplicateIdError, PosttrainError, StepError
from posttrain.schema import (
    ORDER,
    ORDER_BITS,
    SPLITS,
    partition_boundaries,
    partition_count,
)
from posttrain.store.folder import resolve
from posttrain.vision.noise import LabelNoise

Progress = Callable[[int, int], None]
"""Called with (done, total)."""

_MAX_READ_TASKS = 256
"""Tasks of Ray Data in which posttrain itself reads the files."""

_ATTEMPTS = 4
"""Times that Ray Data runs a task whose process ends, where an image may be what ends it."""

SMALL_BYTES = 64 * 2**20
"""Data of at most so many bytes, once they are unpacked, are read and sorted in the driver's own process."""


@dataclass(frozen=True)
class Partition:
    """Some samples of a split, as a block in the object store."""

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
    """SHA-256 over all ids and labels in the order of the partitions, 16 hexadecimal digits."""

    @property
    def rows(self) -> int:
        return sum(partition.rows for partition in self.partitions)


def read(
    sources: Mapping[str, Source],
    *,
    classes: Sequence[str],
    validation_share: float | None,
    noise: LabelNoise | None,
    seed: int,
    ids_span_sets: bool = True,
    progress: Progress = lambda done, total: None,
) -> dict[str, Split]:
    """Every split in partitions. `validation_share` splits a validation set off the training data, by id.

    `ids_span_sets`: an id names the same sample in every source, so that one in two of them is refused.
    Raises DataError, LabelRangeError or DuplicateIdError, naming file and value.
    """
    listings = {name: list_source(source) for name, source in sources.items()}
    rows = {name: listing.rows for name, listing in listings.items()}
    total_rows = sum(rows.values())
    if validation_share is not None:
        rows["validation"] = max(1, round(rows["train"] * validation_share))
    layout = _Layout.of(rows)
    # an image may end the process that decodes it, which must not be this one
    decodes = noise is not None and noise.kind == "instance"
    here = not decodes and sum(listing.bytes for listing in listings.values()) <= SMALL_BYTES
    options: dict[str, dict[str, Any]] = {
        name: {
            "split": name,
            "source": without_data(source),
            "classes": tuple(classes),
            "validation_share": validation_share if name == "train" else None,
            "seed": seed,
            "noise": noise if name != "test" else None,
        }
        for name, source in sources.items()
    }
    blocks: list[Any] = []
    inspections: list[Inspection] = []
    try:
        made = (
            _blocks_made_here(sources, listings, options, layout, len(classes))
            if here
            else _blocks_of_ray_data(sources, listings, options, layout, len(classes), _ATTEMPTS if decodes else None)
        )
        for block, inspection in made:
            blocks.append(block)
            inspections.append(inspection)
            progress(sum(i.rows for i in inspections), total_rows)
    except Exception as error:
        _raise_with_file(error, sources)
    splits = _splits(layout, blocks, inspections, classes)
    if ids_span_sets:
        _refuse_shared_ids(splits, sources, here=here)
    total = sum(split.rows for split in splits.values())
    if total != total_rows:
        raise PosttrainError(f"{total_rows} samples were listed but {total} were read; did the files change meanwhile?")
    return splits


def _raise_with_file(error: Exception, sources: Mapping[str, Source]) -> NoReturn:
    """Raises what made reading fail, naming the file where one cannot be read."""
    if any(isinstance(cause, ray.exceptions.WorkerCrashedError) for cause in cause_chain(error)):
        raise StepError(
            f"{_ATTEMPTS} processes ended one after another while they read the data; if it is an image that ends "
            "the process which decodes it, a run without data.noise quarantines it and names it: take it out"
        ) from None
    if not isinstance(found := unwrapped(error), PosttrainError):
        # neither Ray nor Arrow says which file it was
        for source in sources.values():
            if isinstance(source, ParquetSource):
                refuse_unreadable(parquet_dataset(source), source.columns)
    raise found from None


# -- sorting ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Layout:
    """The partitions of all splits one after another, by order key: the split's number above the hash of the id."""

    names: tuple[str, ...]
    owners: tuple[str, ...]
    """The split of each partition."""
    boundaries: tuple[int, ...]
    """The order key with which each partition but the first begins."""

    @classmethod
    def of(cls, rows: Mapping[str, int]) -> _Layout:
        """`rows`: how many each split has, or is expected to have."""
        names = tuple(name for name in SPLITS if name in rows)
        boundaries: list[int] = []
        owners: list[str] = []
        for name in names:
            base = SPLITS.index(name) << ORDER_BITS
            boundaries += [base] if owners else []
            boundaries += [base + edge for edge in partition_boundaries(partition_count(rows[name]))]
            owners += [name] * partition_count(rows[name])
        return cls(names, tuple(owners), tuple(boundaries))


def _blocks_of_ray_data(
    sources: Mapping[str, Source],
    listings: Mapping[str, Listing],
    options: Mapping[str, dict[str, Any]],
    layout: _Layout,
    classes: int,
    attempts: int | None,
) -> Iterator[tuple[Any, Inspection]]:
    """The partitions, read, normalised (with these options, by source), sorted and inspected by the cluster.

    `attempts`: how often a task is run whose process ends; None: any number of times.
    """
    context = ray.data.DataContext.get_current()
    # reader V2 packs small data into one block and costs four times the CPU
    context.use_datasource_v2 = False
    task_options: Any = {} if attempts is None else {"max_retries": attempts - 1}
    with warnings.catch_warnings():
        # deprecated in 2.60, which has no other way to say it: a later Ray, another line here
        warnings.filterwarnings("ignore", "`ray_remote_args` is deprecated")
        parts = [
            _dataset_of(source, listings[name]).map_batches(
                cast(Any, normalise),  # the annotation of `map_batches` does not know `fn_kwargs`
                batch_format="pyarrow",
                batch_size=None,
                fn_kwargs=options[name],
                **task_options,
            )
            for name, source in sources.items()
        ]
    whole = parts[0].union(*parts[1:]) if len(parts) > 1 else parts[0]
    boundaries: list[int | float] = list(layout.boundaries)
    blocks = whole.sort(ORDER, boundaries=boundaries).materialize().to_arrow_refs()
    inspections = [inspect_remotely.remote(block, classes) for block in blocks]
    for block, inspection in zip(blocks, inspections, strict=True):
        yield block, ray.get(inspection)


def _dataset_of(source: Source, listing: Listing) -> ray.data.Dataset:
    if isinstance(source, TableSource):
        return ray.data.from_arrow(source.table)
    if isinstance(source, FolderSource):
        files, _ = resolve(source.location)
        paths = [path for path, _ in listing.files]
        return ray.data.read_binary_files(paths, filesystem=files, include_paths=True)
    dataset = parquet_dataset(source)
    if PATH in source.columns:
        # Ray Data would put the path of the file in the place of that column
        paths = [{PATH: path} for path in dataset.files]
        files = ray.data.from_items(paths, override_num_blocks=min(len(paths), _MAX_READ_TASKS))
        return files.map_batches(
            cast(Any, _read_row_groups),
            batch_format="pyarrow",
            fn_kwargs={"filesystem": dataset.filesystem, "source": without_data(source)},
        )
    read = ray.data.read_parquet(
        list(dataset.files),
        filesystem=dataset.filesystem,
        include_paths=True,
        # else a folder `label=0` would overwrite a column `label` of its files
        partitioning=None,
        # else files whose names do not end in .parquet are skipped; these are known to be Parquet
        file_extensions=None,
    )
    return read.select_columns([*source.columns, PATH])


def _read_row_groups(files: pa.Table, *, filesystem: fs.FileSystem, source: ParquetSource) -> Iterator[pa.Table]:
    for path in files[PATH].to_pylist():
        for table in read_row_groups(path, filesystem, source.columns):
            yield with_path(table, path, source)


def _blocks_made_here(
    sources: Mapping[str, Source],
    listings: Mapping[str, Listing],
    options: Mapping[str, dict[str, Any]],
    layout: _Layout,
    classes: int,
) -> Iterator[tuple[Any, Inspection]]:
    """The same partitions of small data, made in this process: Ray Data takes ten seconds to begin."""
    tables: dict[str, pa.Table] = {}
    edges: dict[str, np.ndarray] = {}
    for name, source in sources.items():
        parts = [normalise(table, **options[name]) for table in tables_of(source, listings[name])]
        whole = pa.concat_tables(parts)
        keys = whole[ORDER].to_numpy()
        order = np.argsort(keys, kind="stable")
        tables[name] = whole.take(pa.array(order))
        edges[name] = np.array([0, *np.searchsorted(keys[order], layout.boundaries), len(keys)])
    for partition, owner in enumerate(layout.owners):
        # a set that is not read from a source of its own is split off the training set
        name = owner if owner in tables else "train"
        first, end = edges[name][partition : partition + 2]
        # a copy: a slice would keep the whole table in memory
        block = tables[name].take(pa.array(np.arange(first, end))).combine_chunks()
        yield ray.put(block), inspect(block, classes)


# -- the splits -------------------------------------------------------------------------------------------


def _splits(
    layout: _Layout, blocks: Sequence[Any], inspections: Sequence[Inspection], classes: Sequence[str]
) -> dict[str, Split]:
    if len(blocks) != len(layout.owners):
        raise PosttrainError(f"Ray Data sorted into {len(blocks)} blocks where {len(layout.owners)} were asked for")
    splits = {}
    for name in layout.names:
        mine = [i for i, owner in enumerate(layout.owners) if owner == name]
        splits[name] = _split(name, [blocks[i] for i in mine], [inspections[i] for i in mine], classes)
    return splits


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
    if sum(partition.rows for partition in partitions) == 0:
        raise DataError(f"the {name} set is empty; name data.{name}, or raise data.validation_share")
    return Split(name, partitions, counts, digest.hexdigest()[:16])


def _refuse_shared_ids(splits: Mapping[str, Split], sources: Mapping[str, Source], *, here: bool) -> None:
    """Raises DuplicateIdError where the training data share an id with data that the model is measured on.

    The ids of class folders are relative to each folder, so that there the folders have to differ instead. `here`: look
    for shared ids in this process.
    """
    train = sources["train"]
    held_out: dict[str, list[Any]] = {}
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
        held_out[name] = [partition.block for partition in split.partitions]
    refuse_shared_ids([partition.block for partition in splits["train"].partitions], held_out, here=here)
