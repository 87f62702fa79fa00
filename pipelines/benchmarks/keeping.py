"""What keeping the finished scores of a round costs a run that nothing disturbs: with and without it, side by side.

`python -m pipelines.benchmarks.keeping --samples 50000 --repeats 7` runs `clean` on that many digits (each of the
1,797 many times over, with a little noise) in one process, on one Ray and one pool of workers, in turn with and
without; which is first changes from pair to pair.
"""

from __future__ import annotations

import argparse
import contextlib
import shutil
import statistics
import tempfile
import unittest.mock
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.benchmarks.hardware import hardware
from pipelines.benchmarks.tables import document, markdown


def write_digits(folder: Path, samples: int) -> None:
    """train (of so many samples), validation and test, as raw pixels; a fifth of the labels is wrong."""
    from sklearn.datasets import load_digits

    data: Any = load_digits()
    draw = np.random.default_rng(0)
    start = 0
    for split, count in {"train": samples, "validation": 3000, "test": 3000}.items():
        at = draw.integers(0, len(data.target), count)
        pixels = data.images[at] * 255 / 16 + draw.normal(0, 12, (count, 8, 8))
        true = data.target[at]
        wrong = (draw.random(count) < 0.2) & (split != "test")
        table = pa.table(
            {
                "id": pa.array(range(start, start + count), pa.int64()),
                "image": pa.array([one.tobytes() for one in pixels.round().clip(0, 255).astype(np.uint8)]),
                "label": np.where(wrong, (true + draw.integers(1, 10, count)) % 10, true),
            }
        )
        start += count
        (folder / split).mkdir()
        pq.write_table(table, folder / split / "a.parquet")


@contextlib.contextmanager
def without_keeping() -> Iterator[None]:
    """Runs in here keep no scores but those of finished rounds."""
    from posttrain.cluster.workers import Workers

    real = Workers.score
    with unittest.mock.patch.object(Workers, "score", lambda self, view, verdict, kept: real(self, view, verdict)):
        yield


def measured(folder: Path, samples: int, repeats: int) -> list[dict[str, dict[str, float]]]:
    """For each pair the seconds of the step `score` and of the whole run, `with` and `without`."""
    from pipelines.clean import clean
    from posttrain.cluster import workers
    from posttrain.cluster.session import session
    from posttrain.config import RunFile

    write_digits(folder, samples)
    raw: dict[str, Any] = {
        "data": {
            "source": "parquet",
            "image_shape": [8, 8],
            **{split: str(folder / split) for split in ("train", "validation", "test")},
        },
        "pretrain": {"epochs": 2},
        "removal": {"max_rounds": 3},
        "ray": {"workers": 2},
        "tracking": {"log_model": False, "uri": f"sqlite:///{folder / 'mlflow.db'}"},
        "results": {"cleaned": "manifest"},
    }

    def one(name: str) -> dict[str, float]:
        summary = clean(RunFile.model_validate({**raw, "run": {"path": str(folder / name)}}), quiet=True)
        shutil.rmtree(folder / name)
        return {"score": summary["steps"]["score"], "run": summary["seconds"]}

    real = workers.Workers
    pairs = []
    with session(num_cpus=2), contextlib.ExitStack() as stack:
        pool = real(count=2, cpus=1, gpus=0, on_cluster=False)
        stack.enter_context(unittest.mock.patch.object(workers, "Workers", lambda **options: pool))
        one("first")  # pays for what is done once
        for repeat in range(repeats):
            pair = {}
            for kind in ("with", "without") if repeat % 2 else ("without", "with"):
                with without_keeping() if kind == "without" else contextlib.nullcontext():
                    pair[kind] = one(f"{kind}-{repeat}")
            pairs.append(pair)
    return pairs


def report(pairs: Sequence[dict[str, dict[str, float]]], command: str, remark: str) -> str:
    rows = []
    for what, name in (("score", "step *score*, three rounds"), ("run", "whole run")):
        kept, bare = ([pair[kind][what] for pair in pairs] for kind in ("with", "without"))
        ratios = [a / b for a, b in zip(kept, bare, strict=True)]
        medians = [f"{statistics.median(seconds):.2f}" for seconds in (bare, kept)]
        ratio = f"{statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})"
        rows.append([name, *medians, ratio])
    return document(
        [
            ["# Keeping finished scores", "", f"`{command}`; {hardware()}", *([remark] if remark else [])],
            [
                f"Seconds, median of {len(pairs)}; ratio of each pair, median (lowest to highest).",
                "",
                *markdown(["", "without, s", "with, s", "ratio"], rows),
            ],
        ]
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=50_000)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("results") / "keeping.md")
    parser.add_argument("--remark", default="", help="a line for the report, such as what else ran on the machine")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        pairs = measured(Path(folder), options.samples, options.repeats)
    command = f"python -m pipelines.benchmarks.keeping --samples {options.samples} --repeats {options.repeats}"
    text = report(pairs, command, options.remark)
    options.output.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
