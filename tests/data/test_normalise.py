from __future__ import annotations

import pandas as pd
import pyarrow as pa
import pytest

from posttrain.data.normalise import checked_ids
from posttrain.errors import DataError


@pytest.mark.parametrize("values", [[7, 3, 7], ["b", "a", "b"]])
def test_ids_in_a_categorical_column_are_their_values(values: list[int] | list[str]) -> None:
    column = pa.table(pd.DataFrame({"id": pd.Categorical(values)}))["id"]
    ids = checked_ids(column, "a.parquet", "id")
    assert ids.type == pa.array(values).type and ids.to_pylist() == values


def test_a_categorical_id_that_is_empty_is_an_error() -> None:
    # the same column twice: empty beside the dictionary, and in it
    for column in (
        pa.array(["a", None]).dictionary_encode(),
        pa.DictionaryArray.from_arrays(pa.array([0, 1]), pa.array(["a", None])),
    ):
        with pytest.raises(DataError, match="column 'id' has 1 empty ids"):
            checked_ids(pa.chunked_array([column]), "a.parquet", "id")
