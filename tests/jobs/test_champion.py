"""A champion that somebody else registered is what a run starts from, if it can be trusted and compared."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from sklearn.datasets import load_digits
from small_job import SmallJob, job_file

from posttrain.config import Model
from posttrain.errors import DataError, ModelError
from posttrain.jobs.champion import base_network, prepare_inputs, run_file, trusted_recipe
from posttrain.jobs.inventory import take_inventory
from posttrain.jobs.job_folder import Base
from posttrain.jobs.opening import open_registry
from posttrain.runs.inputs import Inputs
from posttrain.store.registry import CHAMPION
from posttrain.vision import models
from posttrain.vision.weights import to_bytes


def test_a_champion_that_somebody_saved_by_torch_is_what_the_run_starts_from(tmp_path: Path) -> None:
    job = SmallJob(tmp_path)
    job.write("a.parquet", "a")
    model = models.mlp(10)
    (tmp_path / "theirs").mkdir()
    torch.save(model.state_dict(), tmp_path / "theirs" / "weights.pt")
    job.registered(tmp_path / "theirs")
    registry = open_registry(job.config, job.folder)  # leaves alone what is registered in the job's own database
    base = base_network(job.config, job.folder, registry, registry.version(CHAMPION))

    def inputs(**data: str) -> Inputs:
        config = job_file(tmp_path, **data)
        files = take_inventory(config.data, job.folder).files
        return prepare_inputs(run_file(config, job.folder.run("a"), base), files, base)

    digits = inputs_of_digits(tmp_path)
    assert inputs(**digits).weights == to_bytes(model)
    # a tenth of the training data would be what it was trained on
    del digits["validation"]
    with pytest.raises(DataError, match=r"version 2\) was not made by this job, and the data have no validation set"):
        inputs(**digits)


def test_the_initial_weights_of_a_base_are_known_where_the_job_trained_it_or_names_them(tmp_path: Path) -> None:
    job = SmallJob(tmp_path)
    config = job_file(tmp_path, **inputs_of_digits(tmp_path))
    files = take_inventory(config.data, job.folder).files
    given = to_bytes(models.mlp(10))
    (tmp_path / "initial.safetensors").write_bytes(given)
    classes = tuple(str(digit) for digit in range(10))

    def initial(key: str, *, known: bool, named: str | None = None) -> bytes | None:
        job.folder.keep_base(Base(key, {}, classes, to_bytes(models.mlp(10)), initial_weights_known=known))
        own = config.model_copy(update={"model": config.model.model_copy(update={"initial_weights": named})})
        base = job.folder.base(key)
        return prepare_inputs(run_file(own, job.folder.run("a"), base), files, base).initial_weights

    assert initial("trained-here", known=True) is not None
    # the job was given weights, or the champion came from elsewhere: those of the factory are none of them
    assert initial("given", known=False) is None
    assert initial("named", known=False, named=str(tmp_path / "initial.safetensors")) == given


def inputs_of_digits(folder: Path) -> dict[str, str]:
    """The section `data` of a run file on the first digits, in Parquet."""
    digits = load_digits()
    assert not isinstance(digits, tuple)
    pixels = (digits.images[:200] * 15).astype(np.uint8).reshape(200, 64)
    table = pa.table({"id": range(200), "image": [row.tobytes() for row in pixels], "label": digits.target[:200]})
    table = table.replace_schema_metadata({"image_shape": "[8, 8]"})
    for name, part in (("digits_train", table[:150]), ("digits_validation", table[150:])):
        pq.write_table(part, folder / f"{name}.parquet")
    names = {"train": "digits_train", "validation": "digits_validation"}
    return {"source": "parquet", **{split: str(folder / f"{name}.parquet") for split, name in names.items()}}


def test_a_function_that_a_registered_model_names_is_called_only_if_the_job_file_names_it() -> None:
    model = Model(factory="posttrain.vision.models:mlp")
    own = {"factory": "posttrain.vision.models:mlp", "arguments": {}, "head": "head"}
    assert trusted_recipe(own, model, "version 1") == own
    assert trusted_recipe(own | {"factory": "resnet18"}, model, "version 1") is not None
    probed = own | {"factory": "posttrain.vision.probed_network:build", "arguments": {"network": "os:system"}}
    for recipe in (own | {"factory": "os:system"}, probed):
        with pytest.raises(ModelError, match="version 1 is to be built by 'os:system'"):
            trusted_recipe(recipe, model, "version 1")
