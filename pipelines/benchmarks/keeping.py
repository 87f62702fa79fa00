"""What it costs a run that nothing disturbs that nothing can be lost: with and without it, side by side.

`python -m pipelines.benchmarks.keeping --samples 50000 --repeats 5` runs `clean` on that many digits (each of the
1,797 many times over, with a little noise) in one process, on one Ray and one pool of workers, in turn with everything,
without what keeps a run from losing anything, and without the search for images in two sets as well; the order changes
from turn to turn. `--run-file pipelines/configs/cifar10n.yaml --set pretrain.epochs=1 --set refine.epochs=1 --set
removal.max_rounds=1 --output ...` does the same with real images and a network that is trained on.
"""

from __future__ import annotations

import argparse
import contextlib
import shlex
import shutil
import statistics
import tempfile
import types
import unittest.mock
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.benchmarks.hardware import hardware
from pipelines.benchmarks.tables import document, markdown
from posttrain.config import RunFile, load


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
def careless(pool: type[Any]) -> Iterator[None]:
    """Runs in here keep no scores but those of finished rounds, wait for no disk, and hold no lock on their folder."""
    from posttrain.store import folder, lock

    real = pool.leave_one_out

    @contextlib.contextmanager
    def unlocked(folder: object) -> Iterator[Any]:
        yield types.SimpleNamespace(assert_held=lambda: None)

    with (
        unittest.mock.patch.object(pool, "leave_one_out", lambda self, view, plan, number: real(self, view, plan)),
        unittest.mock.patch.object(folder, "_sync", lambda path: None),
        unittest.mock.patch.object(lock, "run_lock", unlocked),
    ):
        yield


KINDS = ("with", "without", "without, and without the search")


def digits_run(folder: Path, samples: int) -> RunFile:
    write_digits(folder, samples)
    return RunFile.model_validate(
        {
            "data": {
                "source": "parquet",
                "image_shape": [8, 8],
                **{split: str(folder / split) for split in ("train", "validation", "test")},
            },
            "model": {"factory": "posttrain.vision.models:mlp", "channels": 1, "image_size": 8},
            "pretrain": {"epochs": 2},
            "removal": {"max_rounds": 3},
            "ray": {"workers": 2},
            "tracking": {"log_model": False, "uri": f"sqlite:///{folder / 'mlflow.db'}"},
            "results": {"cleaned": "manifest"},
        }
    )


def measured(folder: Path, settings: RunFile, repeats: int) -> list[dict[str, dict[str, float]]]:
    """For each turn the seconds of the step `score`, of the search and of the whole run, of each of KINDS."""
    from posttrain.cluster import workers
    from posttrain.cluster.session import session
    from posttrain.runs.clean import clean

    real = workers.Workers

    def one(kind: str) -> dict[str, float]:
        raw = settings.model_dump(exclude_unset=True)
        raw["run"] = {**raw.get("run", {}), "path": str(folder / "run")}
        if kind == KINDS[2]:
            raw["data"] = {**raw["data"], "leakage": "off"}
        config = RunFile.model_validate(raw)
        with contextlib.nullcontext() if kind == KINDS[0] else careless(real):
            summary = clean(config, quiet=True)
        shutil.rmtree(folder / "run")
        steps = summary["steps"]
        return {"score": steps["score"], "search": steps.get("look for leaks", 0.0), "run": summary["seconds"]}

    turns = []
    with session(num_cpus=2), contextlib.ExitStack() as stack:
        pool = real(count=2, cpus=1, gpus=0, on_cluster=False)
        stack.enter_context(unittest.mock.patch.object(workers, "Workers", lambda **options: pool))
        one(KINDS[0])  # pays for what is done once
        for repeat in range(repeats):
            order = [*KINDS[repeat % 3 :], *KINDS[: repeat % 3]]
            turns.append({kind: one(kind) for kind in order})
            print(turns[-1], flush=True)
    return turns


def report(turns: Sequence[dict[str, dict[str, float]]], command: str, remark: str) -> str:
    kept, *others = KINDS
    rows = []
    for what, name in (("score", "step *score*, all rounds"), ("run", "whole run")):
        for bare in others:
            ratios = [turn[kept][what] / turn[bare][what] for turn in turns]
            medians = [f"{statistics.median(turn[kind][what] for turn in turns):.2f}" for kind in (bare, kept)]
            rows.append(
                [name, bare, *medians, f"{statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})"]
            )
    shares = [turn[kept]["search"] / turn[kept]["run"] for turn in turns]
    return document(
        [
            ["# What it costs that nothing is lost", "", f"`{command}`; {hardware()}", *([remark] if remark else [])],
            [
                "*Without*: scores of a round that is not finished are not kept, nothing is waited for until it is on",
                "the disk, and no lock is held on the run folder. *The search*: for images in two sets.",
                "",
                f"Seconds, median of {len(turns)}; ratio within each turn, median (lowest to highest).",
                "",
                *markdown(["", "against", "without, s", "with, s", "ratio"], rows),
                "",
                f"The search by its own clock, of the whole run: {statistics.median(shares):.1%}"
                f" ({min(shares):.1%} to {max(shares):.1%}).",
            ],
        ]
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=50_000, help="of digits, where no run file is named")
    parser.add_argument("--run-file", type=Path, help="what to run instead of digits")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="of the run file")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("results") / "keeping.md")
    parser.add_argument("--remark", default="", help="a line for the report, such as what else ran on the machine")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if options.run_file:
            tracking = f"tracking.uri=sqlite:///{folder / 'mlflow.db'}"
            settings = load(options.run_file, [*options.set, tracking])
            words = [word for one in options.set for word in ("--set", one)]
            what = shlex.join(["--run-file", str(options.run_file), *words])
        else:
            settings = digits_run(folder, options.samples)
            what = f"--samples {options.samples}"
        turns = measured(folder, settings, options.repeats)
    command = f"python -m pipelines.benchmarks.keeping {what} --repeats {options.repeats}"
    text = report(turns, command, options.remark)
    options.output.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
