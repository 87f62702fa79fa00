from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from posttrain.config import RunFile
from posttrain.errors import DataError
from posttrain.runs.inputs import prepare

MODEL = {"factory": "posttrain.vision.models:mlp", "channels": 1, "image_size": 8}


def run_file(folder: Path, ids: dict[str, pa.Array], **model: Any) -> RunFile:
    """Sets of two images each, with these ids."""
    for name, of_set in ids.items():
        table = pa.table({"id": of_set, "image": pa.array([bytes(64)] * 2, pa.binary()), "label": [0, 1]})
        pq.write_table(table, folder / f"{name}.parquet")
    data = {"source": "parquet", "image_shape": [8, 8], **{name: str(folder / f"{name}.parquet") for name in ids}}
    return RunFile.model_validate({"run": {"path": str(folder / "run")}, "data": data, "model": {**MODEL, **model}})


@pytest.mark.parametrize(
    ("train", "test", "says"),
    [
        (pa.array([0, 1]), pa.array(["a", "b"]), "are text, and those of data.train are integers"),
        (pa.array(["0", "1"]), pa.array([2, 3]), "are integers, and those of data.train are text"),
    ],
)
def test_sets_with_ids_of_different_types_are_refused(tmp_path: Path, train: pa.Array, test: pa.Array, says: str):
    with pytest.raises(DataError, match=rf"data\.test = .*test\.parquet: the ids in column 'id' {says}; write ids"):
        prepare(run_file(tmp_path, {"train": train, "test": test}))


@pytest.mark.parametrize(
    ("train", "test"),
    [
        (pa.array([0, 1], pa.int32()), pa.array([2, 3], pa.uint64())),
        (pa.array(["a", "b"]), pa.array(["c", "d"], pa.large_string()).dictionary_encode()),
    ],
)
def test_the_width_of_ids_may_differ_from_set_to_set(tmp_path: Path, train: pa.Array, test: pa.Array):
    assert prepare(run_file(tmp_path, {"train": train, "test": test})).rows == {"train": 2, "test": 2}
