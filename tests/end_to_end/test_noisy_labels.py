"""Labels that reading flips on purpose: which ones, whatever the layout of the files; refusals before Ray starts."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from small_data import Digits

from posttrain.cluster import partitioning
from posttrain.config import RunFile, load
from posttrain.data.normalise import normalise
from posttrain.data.sources import TableSource
from posttrain.errors import ConfigError
from posttrain.runs.inputs import Inputs, prepare
from posttrain.schema import ORDER_BITS, SPLITS
from posttrain.vision import noise
from posttrain.vision.datasets import digits as embedded_digits
from posttrain.vision.noise import LabelNoise

CLASSES = tuple(map(str, range(10)))
STEPS = np.random.default_rng(0).dirichlet(np.ones(10), 10).tolist()
KINDS: dict[str, dict[str, Any]] = {
    "symmetric": {"rate": 0.3},
    "pair": {"rate": 0.3},
    "instance": {"rate": 0.3},
    "matrix": {"matrix": STEPS},
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def noise_of(kind: str, seed: int = 0, **settings: Any) -> LabelNoise:
    """What the pipeline makes of a run file's `data.noise` on the embedded digits."""
    made = prepare(RunFile.model_validate({"data": {"noise": {"kind": kind, "seed": seed, **settings}}})).noise
    assert made is not None
    return made


def read_blocks(table: pa.Table, rows: int, flip: LabelNoise | None) -> pa.Table:
    """The table as Ray would hand it to `normalise` in blocks of so many rows, sorted by id."""
    blocks = [
        normalise(
            table.slice(start, rows),
            split="train",
            source=TableSource(table.slice(0, 0), "digits/train"),
            classes=CLASSES,
            noise=flip,
        )
        for start in range(0, table.num_rows, rows)
    ]
    return pa.concat_tables(blocks).sort_by("sample_id")


@pytest.mark.parametrize(("rate", "seed", "digest"), [(0.2, 0, "cfdde35b8e1c29ae"), (0.4, 3, "6b6abfc928e9224d")])
def test_symmetric_noise_flips_the_labels_that_it_has_always_flipped(rate: float, seed: int, digest: str) -> None:
    read = read_blocks(embedded_digits(0)["train"], 2000, noise_of("symmetric", seed, rate=rate))
    labels = read["label"].to_numpy().astype(np.int32)
    assert hashlib.sha256(labels.tobytes()).hexdigest().startswith(digest)


@every_kind
def test_the_flips_are_the_same_for_any_blocks_and_any_order(kind: str) -> None:
    table, flip = embedded_digits(0)["train"], noise_of(kind, **KINDS[kind])
    whole = read_blocks(table, table.num_rows, flip)
    assert (
        0.2 < np.mean(whole["label"].to_numpy() != whole["true_label"].to_numpy()) < (0.95 if kind == "matrix" else 0.4)
    )
    shuffled = table.take(np.random.default_rng(1).permutation(table.num_rows))
    for rows in (97, 500):
        assert read_blocks(table, rows, flip).equals(whole)
        assert read_blocks(shuffled, rows, flip).equals(whole)


@every_kind
def test_the_true_labels_stay_and_another_seed_flips_others(kind: str) -> None:
    table = embedded_digits(0)["train"]
    clean = read_blocks(table, 2000, None)
    one, two = (read_blocks(table, 2000, noise_of(kind, seed, **KINDS[kind])) for seed in (0, 1))
    assert one["true_label"].equals(clean["label"]) and two["true_label"].equals(clean["label"])
    assert not one["label"].equals(two["label"])


def test_instance_noise_sees_the_images_as_the_network_does() -> None:
    table = embedded_digits(0)["train"].slice(0, 600)
    read = read_blocks(table, 600, noise_of("instance", rate=0.4))
    ids, true = read["sample_id"].to_numpy(), read["true_label"].to_numpy()
    # the digits' cells are raw: 64 bytes each, in the order of the ids once sorted
    pixels = np.stack([np.frombuffer(cell, np.uint8) for cell in read["image"].to_pylist()])
    expected = noise.instance_dependent(true, ids, pixels, classes=10, rate=0.4, seed=2)
    assert read["label"].to_numpy().tolist() == expected.tolist()


def test_an_unreadable_image_keeps_its_label_and_the_others_flip_as_if_it_were_not_there() -> None:
    table = embedded_digits(0)["train"]
    flip = noise_of("instance", rate=0.95)
    whole = read_blocks(table, table.num_rows, flip)
    images, labels = table["image"].to_pylist(), table["label"].to_pylist()
    images[3], images[7], labels[11] = b"no image", None, None
    broken = table.set_column(table.schema.get_field_index("image"), "image", pa.array(images, pa.binary()))
    broken = broken.set_column(broken.schema.get_field_index("label"), "label", pa.array(labels, pa.int64()))
    read = read_blocks(broken, table.num_rows, flip)
    ids = table["id"].to_numpy()
    for row in range(table.num_rows):
        at = int(np.searchsorted(np.sort(ids), ids[row]))
        found = read["label"][at].as_py()
        if row in (3, 7):
            assert found == labels[row] == read["true_label"][at].as_py()
        elif row == 11:
            assert found == -1
        else:
            assert found == whole["label"][at].as_py()


@pytest.mark.long
@pytest.mark.ray
def test_instance_noise_on_files_of_any_layout_reads_the_same_data(
    ray_session: None, runfile: Callable[..., dict[str, Any]], digits: Digits, tmp_path: Path
) -> None:
    (tmp_path / "parts").mkdir()
    table = digits.table("train")
    table = table.take(np.random.default_rng(2).permutation(table.num_rows))
    for number in range(5):
        pq.write_table(table.slice(number * 180, 180), tmp_path / "parts" / f"{number}.parquet", row_group_size=50)

    def read(inputs: Inputs) -> dict[str, partitioning.Split]:
        return partitioning.read(
            inputs.sources, classes=inputs.classes, validation_share=None, noise=inputs.noise, seed=0
        )

    flip = {"noise": {"kind": "instance", "rate": 0.4}}
    one = read(prepare(RunFile.model_validate(runfile(tmp_path / "run", data=flip))))
    other = read(
        prepare(RunFile.model_validate(runfile(tmp_path / "run", data={**flip, "train": str(tmp_path / "parts")})))
    )
    clean = read(prepare(RunFile.model_validate(runfile(tmp_path / "run"))))
    assert {name: split.digest for name, split in one.items()} == {name: split.digest for name, split in other.items()}
    differing = {name for name in one if one[name].digest != clean[name].digest}
    assert differing == {"train", "validation"}


@pytest.mark.parametrize("classes", [2, 11])
def test_a_matrix_for_another_number_of_classes_is_refused(classes: int) -> None:
    config = load(None, [f"data.noise={{kind: matrix, matrix: {np.eye(classes).tolist()}}}"])
    expected = (
        rf"data\.noise\.matrix has {classes} rows, and there are 10 classes \(0, 1, 2, 3, 4, \.\.\.\): give one row"
    )
    with pytest.raises(ConfigError, match=expected):
        prepare(config)


@every_kind
def test_who_is_held_out_says_nothing_of_whose_label_is_flipped(kind: str) -> None:
    n = 20_000
    columns = {"id": np.arange(n), "image": pa.array([bytes(range(64))] * n, pa.binary()), "label": np.arange(n) % 10}
    read = normalise(
        pa.table(columns),
        split="train",
        source=TableSource(pa.table(columns).slice(0, 0), "many"),
        classes=CLASSES,
        validation_share=0.3,
        noise=noise_of(kind, **KINDS[kind]),
    )
    held_out = read["order"].to_numpy() >> ORDER_BITS == SPLITS.index("validation")
    flipped = read["label"].to_numpy() != read["true_label"].to_numpy()
    assert held_out.mean() == pytest.approx(0.3, abs=0.02)
    assert abs(np.corrcoef(held_out, flipped)[0, 1]) < 4 / np.sqrt(n)
