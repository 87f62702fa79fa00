from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from posttrain.data.parquet_files import open_dataset
from posttrain.errors import DataError


@pytest.fixture
def file(tmp_path: Path) -> str:
    pq.write_table(pa.table({"id": [1, 2]}), tmp_path / "a.parquet")
    return str(tmp_path / "a.parquet")


def test_locations_on_different_file_systems_are_refused_and_not_asked(file: str) -> None:
    # nobody listens at that port
    bucket = "s3://bucket/x?region=eu-west-1&scheme=http&endpoint_override=localhost:1"
    for locations, said in (([bucket, file], file), ([file, bucket], "s3://bucket/x")):
        with pytest.raises(DataError, match="another file system than") as caught:
            open_dataset(locations, None)
        assert str(caught.value).startswith(said)


def test_a_path_and_a_file_uri_are_on_the_same_file_system(file: str) -> None:
    assert open_dataset([file, f"file://{file}"], None).count_rows() == 4
