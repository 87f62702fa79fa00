"""Whatever lies in a Parquet file: it is read, or a posttrain error says in one sentence why not."""

from __future__ import annotations

import base64
import io
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from posttrain.data.classes import highest_label, string_labels
from posttrain.data.normalise import normalise
from posttrain.data.sources import ParquetSource, list_source
from posttrain.errors import DataError

CHECKS = [
    HealthCheck.too_slow,
    HealthCheck.data_too_large,
    HealthCheck.filter_too_much,
    HealthCheck.large_base_example,
    HealthCheck.function_scoped_fixture,
]
"""Not of interest: hard cases are slow and large."""

QUIET = settings(max_examples=120, deadline=None, suppress_health_check=CHECKS)

columns: st.SearchStrategy[tuple[list[Any], pa.DataType | None]] = st.one_of(
    *(
        st.tuples(st.lists(st.none() | values, min_size=1, max_size=6), st.just(kind))
        for values, kind in (
            (st.integers(-(2**63), 2**63 - 1), pa.int64()),
            (st.integers(0, 2**64 - 1), pa.uint64()),
            (st.integers(-3, 12), pa.int8()),
            (st.floats(), pa.float64()),
            (st.floats(width=32), pa.float32()),
            (st.text(max_size=5), pa.string()),
            (st.text(max_size=5), pa.large_string()),
            (st.text(max_size=3), pa.dictionary(pa.int32(), pa.string())),
            (st.binary(max_size=5), pa.binary()),
            (st.booleans(), pa.bool_()),
            (st.lists(st.integers(0, 9), max_size=2), pa.list_(pa.int64())),
            (st.fixed_dictionaries({"bytes": st.binary(max_size=3)}), pa.struct({"bytes": pa.binary()})),
            (st.dates(), pa.date32()),
            (st.decimals(0, 9, places=1), pa.decimal128(5, 1)),
        )
    )
)


def read(source: ParquetSource, table: pa.Table, classes: tuple[str, ...]) -> None:
    """What `partitioning.read` does with one file, without Ray."""
    path = pa.array([source.locations[0]] * table.num_rows)
    block = normalise(table.append_column("path", path), split="train", source=source, classes=classes)
    assert block.num_rows == table.num_rows
    labels = block["label"].to_numpy()
    assert ((labels >= -1) & (labels < len(classes))).all()


def listed_and_read(file: Path) -> None:
    source = ParquetSource((str(file),), "id", "image", "label")
    try:
        listing = list_source(source)
        classes = listing.classes or string_labels(source)
        if classes is None:
            classes = tuple(map(str, range(min(highest_label(source), 20) + 1)))
        read(source, pq.read_table(file, columns=["id", "image", "label"]), classes)
    except DataError as error:
        assert str(file) in str(error) and "\n" not in str(error)


@given(
    columns, columns, columns, st.dictionaries(st.sampled_from(["class_names", "image_shape"]), st.text(), max_size=2)
)
@QUIET
def test_columns_of_any_type_are_read_or_refused_in_one_sentence(
    tmp_path_factory: pytest.TempPathFactory, ids: Any, images: Any, labels: Any, metadata: dict[str, str]
) -> None:
    rows = min(len(values) for values, _ in (ids, images, labels))
    table = pa.table(
        {
            name: pa.array(values[:rows], kind)
            for name, (values, kind) in (("id", ids), ("image", images), ("label", labels))
        }
    )
    file = tmp_path_factory.getbasetemp() / "columns.parquet"
    pq.write_table(table.replace_schema_metadata(metadata), file)
    listed_and_read(file)


def whole() -> bytes:
    stream = io.BytesIO()
    table = pa.table({"id": np.arange(20), "image": [bytes([i]) * 30 for i in range(20)], "label": np.arange(20) % 4})
    pq.write_table(table.replace_schema_metadata({"class_names": "a,b,c,d"}), stream, row_group_size=8)
    return stream.getvalue()


WHOLE = whole()


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    data = bytearray(WHOLE)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(data) - 1))
        data[at : at + draw(st.integers(0, 6))] = draw(st.binary(max_size=6))
    return bytes(data[: draw(st.none() | st.integers(0, len(data)))])


@given(mutated())
@QUIET
def test_a_damaged_file_is_read_or_refused_by_its_name(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    file = tmp_path_factory.getbasetemp() / "damaged.parquet"
    file.write_bytes(data)
    source = ParquetSource((str(file),), "id", "image", "label")
    try:
        list_source(source)
        highest_label(source)
    except DataError as error:
        assert str(file) in str(error) and "\n" not in str(error)


# what atheris found: a file that declares integers of 4 bits, which Arrow has not implemented (zlib, base85)
FOUND = (
    b"c-oayJ5D1(5Up;Sky$w~h;H>r6HEXj5MLuqurfi7!GK@|SVES`#%5$&{ES)F$%cD?4fX(gfIR?*AcTy7qtKrj?8PRaWL34QUe$Y5@*H6$&l&gm"
    b"%z+9p1&}Keutt-}flqO<sOmZHaL1FGv?4PpR>0hd?Bt|!6TU7mLdK{XG0kPl^kqilBJJw$IW}O9)Fp{VO!!Z0LImVPt>jG=3}_wB4l}t21(42d"
    b"qZMC9+yTyJsif^Q;92z;Z(l~u*e1s>qI!G*g1Mes48T*Z1#oh%Msq5dcp&1D1iL}zbGLK#9>A&IDyKqm-f;t9s;Eh_35iu=cz%jsB=}8(XEJ!e"
    b"p)pG6;Gk5kU1LD--?89@e(r=HOBR2aU_nOwW8iu+i<Qb@^{YLuyr(PL7Es$UTH8nLVc5hnViQYElM6${Z~9R}+%t)OL|Y2i_3Q9$ROwugHjtJ{"
    b"*7|s3W$o%a<@RZ{r}4D}k9eZp)=AnQ+NQ>+{-~O7ovxXNZOt1dpt8|d!?0&{Z}<00^}L@~vhx&B?Yw3B8#dXeOKfu!q~D3UH+S*(rADW-6m`4T"
    b"J^x4Cy=`A#`D=yc)#bcf^Z@J+p49*BNPY6Jht-#C"
)


def test_what_arrow_has_not_implemented_is_refused_by_the_files_name(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(zlib.decompress(base64.b85decode(FOUND)))
    with pytest.raises(DataError, match=r"a\.parquet: not readable as Parquet \(Integers with less than 8 bits"):
        list_source(ParquetSource((str(tmp_path / "a.parquet"),), "id", "image", "label"))


def test_the_file_is_read_before_it_is_damaged(tmp_path: Path) -> None:
    (tmp_path / "whole.parquet").write_bytes(WHOLE)
    source = ParquetSource((str(tmp_path / "whole.parquet"),), "id", "image", "label")
    assert list_source(source).rows == 20 and highest_label(source) == 3
