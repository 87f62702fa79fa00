"""Images that crash the decoder, in real runs in processes of their own."""

from __future__ import annotations

import io
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from harness.surroundings import environment
from PIL import Image
from sklearn.datasets import load_digits

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]

FATAL = {"train": [3, 700], "validation": [1003], "test": [1400]}


def write_digits(folder: Path) -> dict[str, str]:
    """The digits in Parquet, of which some crash the decoder."""
    digits: Any = load_digits()
    fatal = {i for ids in FATAL.values() for i in ids}
    images = []
    for i, pixels in enumerate(digits.images):
        Image.fromarray((pixels * 15).astype(np.uint8)).save(stream := io.BytesIO(), "PNG")
        images.append(b"FATAL" + stream.getvalue() if i in fatal else stream.getvalue())
    table = pa.table({"id": np.arange(len(images)), "image": images, "label": digits.target.astype(np.int32)})
    for split, rows in {"train": (0, 1000), "validation": (1000, 1300), "test": (1300, len(images))}.items():
        pq.write_table(table.slice(rows[0], rows[1] - rows[0]), folder / f"{split}.parquet")
    return {split: str(folder / f"{split}.parquet") for split in FATAL}


def clean(folder: Path, **data: object) -> subprocess.CompletedProcess[str]:
    """A run on this data with a first network of its own."""
    raw = {
        "run": {"path": str(folder / "run")},
        "data": {"source": "parquet", **write_digits(folder), **data},
        "model": {"factory": "posttrain.vision.models:mlp", "channels": 1, "image_size": 8},
        "pretrain": {"epochs": 10},
        "removal": {"max_rounds": 1},
        "ray": {"workers": 2},
        "tracking": {"log_model": False},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(raw))
    with tempfile.TemporaryDirectory(prefix="pt", dir="/tmp") as short:
        env = environment(short)
        env["PYTHONPATH"] = f"{Path(__file__).parent / 'fatal_decoder'}:{env['PYTHONPATH']}"
        command = [sys.executable, "-m", "posttrain.cli", "clean", str(folder / "run.yaml")]
        return subprocess.run(command, env=env, capture_output=True, text=True)


@pytest.mark.long
def test_images_that_crash_the_decoder_are_quarantined_before_they_can_end_the_training(tmp_path: Path) -> None:
    done = clean(tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = pq.read_table(tmp_path / "run" / "quarantine.parquet").to_pylist()
    assert {split: [row["sample_id"] for row in rows if row["split"] == split] for split in FATAL} == FATAL
    assert {row["reason"] for row in rows} == {"each of 3 processes where it was decoded ended by SIGSEGV"}
    assert "processes ended at the images of partition 0 of train; looking for the one that does it" in done.stderr
    manifest = pq.read_table(tmp_path / "run" / "manifest.parquet")["sample_id"].to_pylist()
    removed = pq.read_table(tmp_path / "run" / "removed.parquet")["sample_id"].to_pylist()
    assert sorted([*manifest, *removed, *FATAL["train"]]) == list(range(1000))


@pytest.mark.long
def test_an_image_that_crashes_the_reading_ends_the_run_with_what_to_do(tmp_path: Path) -> None:
    done = clean(tmp_path, noise={"kind": "instance", "rate": 0.2})
    assert done.returncode == 1
    [line] = [line for line in done.stderr.splitlines() if "error: " in line]
    assert "4 processes ended one after another while they read the data" in line
    assert "a run without data.noise quarantines it and names it" in line
    assert not (tmp_path / "run" / "run.yaml").exists()
