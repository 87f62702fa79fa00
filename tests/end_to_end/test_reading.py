"""Small data are read by the driver, larger ones by Ray Data: into the same partitions, with the same refusals."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
from small_data import Digits

from posttrain.cluster import partitioning
from posttrain.cluster.partitioning import Split
from posttrain.data.sources import FolderSource, ParquetSource, Source, TableSource
from posttrain.errors import DataError, DuplicateIdError, PosttrainError
from posttrain.schema import ORDER, SPLITS, ImageSpec
from posttrain.vision import datasets
from posttrain.vision.noise import LabelNoise

pytestmark = pytest.mark.ray

CLASSES = tuple(map(str, range(10)))
FLIPS = LabelNoise("symmetric", 0.2, 0, None, ImageSpec(1, (8, 8), (0.0,), (1.0,)))


@pytest.fixture
def read_both(ray_session: None, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Reads by the driver, then by Ray Data."""

    def read(sources: dict[str, Source], **options: Any) -> tuple[Any, Any]:
        found = []
        for most in (2**40, 0):
            monkeypatch.setattr(partitioning, "SMALL_BYTES", most)
            with_defaults = {"classes": CLASSES, "validation_share": None, "noise": None, "seed": 0, **options}
            try:
                found.append(partitioning.read(sources, **with_defaults))
            except PosttrainError as error:
                found.append(error)
        return found[0], found[1]

    return read


def assert_same(one: dict[str, Split], other: dict[str, Split]) -> None:
    assert one.keys() == other.keys()
    for name, split in one.items():
        twin = other[name]
        assert (split.digest, split.class_counts.tolist()) == (twin.digest, twin.class_counts.tolist())
        assert [partition.rows for partition in split.partitions] == [partition.rows for partition in twin.partitions]
        for partition, its_twin in zip(split.partitions, twin.partitions, strict=True):
            block, its_block = ray.get(partition.block), ray.get(its_twin.block)
            assert block.schema.remove_metadata() == its_block.schema.remove_metadata()
            assert block.equals(its_block)
            keys = block[ORDER].to_numpy()
            assert (np.diff(keys) > 0).all()


def write_many(table: pa.Table, folder: Path, files: int = 3) -> str:
    folder.mkdir(parents=True)
    shuffled = table.take(np.random.default_rng(1).permutation(table.num_rows))
    edges = np.linspace(0, table.num_rows, files + 1).astype(int)
    for part, (start, stop) in enumerate(itertools.pairwise(edges)):
        pq.write_table(shuffled.slice(start, stop - start), folder / f"{part}.parquet", row_group_size=70)
    return str(folder)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="plain", marks=pytest.mark.long),
        pytest.param({"validation_share": 0.2, "noise": FLIPS, "seed": 5}, id="split"),
    ],
)
def test_files_of_parquet(read_both: Any, digits: Digits, tmp_path: Path, options: dict[str, Any]) -> None:
    named = ("train", "test") if options else SPLITS
    locations = {split: write_many(digits.table(split), tmp_path / split) for split in named}
    sources = {split: ParquetSource((at,), "id", "image", "label", "true") for split, at in locations.items()}
    one, other = read_both(sources, **options)
    assert_same(one, other)
    assert set(one) == set(SPLITS) and sum(split.rows for split in one.values()) > 1000


def test_many_partitions(read_both: Any, tmp_path: Path) -> None:
    rows = 9000
    images = pa.array([np.full(4, i % 256, np.uint8).tobytes() for i in range(rows)], pa.binary())
    table = pa.table({"id": [f"sample {i}" for i in range(rows)], "image": images, "label": np.arange(rows) % 10})
    at = write_many(table, tmp_path / "train")
    one, other = read_both({"train": ParquetSource((at,), "id", "image", "label")}, validation_share=0.1)
    assert_same(one, other)
    assert len(one["train"].partitions) > 2


def test_class_folders(read_both: Any, digits: Digits, tmp_path: Path) -> None:
    for split in ("train", "test"):
        for row in digits.table(split).slice(0, 60).to_pylist():
            path = tmp_path / split / str(row["label"]) / "inner" / f"{row['id']}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(row["image"])
    sources = {split: FolderSource(str(tmp_path / split)) for split in ("train", "test")}
    assert_same(*read_both(sources, validation_share=0.3))


@pytest.mark.long
def test_the_embedded_data(read_both: Any) -> None:
    sources = {name: TableSource(table, f"digits/{name}") for name, table in datasets.digits(0).items()}
    assert_same(*read_both(sources, validation_share=0.1, noise=FLIPS))


def write_under(folders: tuple[str, ...], root: Path, table: pa.Table, name: str = "a.parquet") -> str:
    """Every folder gets some of the rows, of all classes."""
    for part, folder in enumerate(folders):
        (root / folder).mkdir(parents=True)
        rows = np.arange(part, table.num_rows, len(folders))
        pq.write_table(table.take(pa.array(rows)), root / folder / name, row_group_size=70)
    return str(root)


def assert_the_files_own(found: Any, given: pa.Table, columns: tuple[str, str, str], true_label: str) -> None:
    """Ids, images and labels as they were written, each with the path of a file."""
    assert not isinstance(found, Exception), found
    blocks = pa.concat_tables([ray.get(partition.block) for partition in found["train"].partitions]).sort_by(
        "sample_id"
    )
    written = given.sort_by(columns[0])
    for inner, own in zip(("sample_id", "image", "label", "true_label"), (*columns, true_label), strict=True):
        assert blocks[inner].to_pylist() == written[own].to_pylist(), own
    assert all(Path(path).is_file() for path in set(blocks["file"].to_pylist()))


OWN = ("id", "image", "label")
INNER = ("sample_id", "file", "order", "partition", "row", "true_label", "bytes", "split", "row_hash")


@pytest.mark.parametrize(
    ("folders", "columns", "true_label"),
    [
        (("label=0", "label=1"), OWN, "true"),
        *(
            pytest.param(*case, marks=pytest.mark.long)
            for case in (
                (("order=0/sample_id=3", "order=1/sample_id=4"), ("order", "file", "sample_id"), "partition"),
                (("id=7/true=0", "id=7/true=1"), OWN, "true"),
                (("image=x/path=0", "image=y/path=0"), OWN, "true"),
                (("a%20b", "a b", "a#b", "a?b", "a:b"), OWN, "true"),
                (("path=0", "path=1"), ("path", "image", "label"), "true"),
                (("label=0", "label=1"), ("id", "path", "_path"), "true"),
                (("path=0", "path=1"), ("id", "image", "label"), "path"),
                (("label=0", "label=1"), ("label", "true_label", "id"), "image"),
            )
        ),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, tuple) else value,
)
def test_a_column_is_what_its_files_say_whatever_folders_and_columns_are_called(
    read_both: Any,
    digits: Digits,
    tmp_path: Path,
    folders: tuple[str, ...],
    columns: tuple[str, str, str],
    true_label: str,
) -> None:
    table = digits.table("train").slice(0, 200)
    table = table.rename_columns([*columns, true_label])
    # what is not read must not matter, either: values of another kind in columns that Ray or posttrain would name so
    for name in {*INNER, "path"}.difference(table.column_names):
        table = table.append_column(name, pa.array([{"other": row} for row in range(table.num_rows)]))
    at = write_under(folders, tmp_path / "train", table)
    one, other = read_both({"train": ParquetSource((at,), *columns, true_label)})
    for found in (one, other):
        assert_the_files_own(found, table, columns, true_label)
    assert_same(one, other)


@pytest.mark.parametrize(
    "name",
    ["_a.parquet", *(pytest.param(name, marks=pytest.mark.long) for name in ("a.pq", "a.PARQUET", "a.parquet.0"))],
)
def test_a_file_is_read_whatever_it_is_called(read_both: Any, digits: Digits, tmp_path: Path, name: str) -> None:
    table = digits.table("train").slice(0, 100)
    at = write_under(("label=3",), tmp_path / "train", table, name)
    one, other = read_both({"train": ParquetSource((f"{at}/label=3/{name}",), *OWN, "true")})
    for found in (one, other):
        assert_the_files_own(found, table, OWN, "true")
    assert_same(one, other)


def test_class_folders_that_are_called_like_partitions(read_both: Any, digits: Digits, tmp_path: Path) -> None:
    classes = ("bytes=1", "label=0", "path=2")
    for number, row in enumerate(digits.table("train").slice(0, 30).to_pylist()):
        path = tmp_path / classes[number % 3] / "label=9" / f"{row['id']}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(row["image"])
    one, other = read_both({"train": FolderSource(str(tmp_path))}, classes=classes)
    assert_same(one, other)
    blocks = pa.concat_tables([ray.get(partition.block) for partition in other["train"].partitions])
    for row in blocks.to_pylist():
        assert classes[row["label"]] == row["sample_id"].split("/")[0]
        assert (tmp_path / row["sample_id"]).read_bytes() == row["image"]


@pytest.mark.parametrize("lacking", ["all", pytest.param("one", marks=pytest.mark.long)])
def test_a_label_that_only_a_folder_names_is_refused(
    read_both: Any, digits: Digits, tmp_path: Path, lacking: str
) -> None:
    table = digits.table("train").slice(0, 100)
    at = write_under(("label=0", "label=1"), tmp_path / "train", table)
    for folder in ("label=0", "label=1") if lacking == "all" else ("label=1",):
        pq.write_table(table.drop_columns("label"), Path(at) / folder / "a.parquet")
    one, other = read_both({"train": ParquetSource((at,), "id", "image", "label")})
    assert isinstance(one, DataError) and isinstance(other, DataError)
    folder = "label=0" if lacking == "all" else "label=1"
    assert f"{folder}/a.parquet: no column 'label' (the name of the folder {folder} is not read)" in str(one)
    assert str(one) == str(other)


def test_a_damaged_file_with_a_column_called_path_is_named(read_both: Any, digits: Digits, tmp_path: Path) -> None:
    table = digits.table("train").slice(0, 200).rename_columns(["path", "image", "label", "true"])
    at = write_under(("x", "y"), tmp_path / "train", table)
    file = Path(at) / "y" / "a.parquet"
    content = bytearray(file.read_bytes())
    content[4:2000] = bytes(1996)
    file.write_bytes(content)
    one, other = read_both({"train": ParquetSource((at,), "path", "image", "label")})
    assert isinstance(one, DataError) and f"{file}: not readable as Parquet" in str(one)
    assert isinstance(other, DataError) and f"{file}: not readable as Parquet" in str(other)


def test_refusals_name_the_same_file_and_value(read_both: Any, digits: Digits, tmp_path: Path) -> None:
    table = digits.table("train")
    labels = table["label"].to_numpy().copy()
    labels[100] = 77
    again = table["id"].to_numpy().copy()
    again[100] = again[0]
    at = {split: write_many(digits.table(split), tmp_path / split, 1) for split in SPLITS}
    columns = {"label": labels, "id": again}
    for name, (values, expected) in {
        "label": (labels, "0.parquet: label 77 at sample_id"),
        "id": (again, "occurs twice in the train data"),
        "test": (None, "is in both the train and the test set"),
    }.items():
        folder = tmp_path / f"wrong {name}"
        if name in columns:
            wrong = table.set_column(table.schema.get_field_index(name), name, pa.array(values))
            locations = {**at, "train": write_many(wrong, folder, 1)}
        else:
            locations = {**at, "test": write_many(table.slice(7, 20), folder, 1)}
        errors = read_both(
            {split: ParquetSource((where,), "id", "image", "label") for split, where in locations.items()}
        )
        for error in errors:
            assert isinstance(error, DataError | DuplicateIdError) and expected in str(error)
        assert str(errors[0]) == str(errors[1])


def test_reading_writes_nothing_to_the_console(
    read_both: Any, digits_parquet: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    found = read_both(
        {split: ParquetSource((str(digits_parquet / split),), "id", "image", "label") for split in SPLITS}
    )
    assert [set(splits) for splits in found] == [set(SPLITS)] * 2
    assert capfd.readouterr() == ("", "")
