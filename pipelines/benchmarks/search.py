"""What a search costs beside the same recipes as separate runs: one `posttrain tune`, then a `posttrain clean` each.

`python -m pipelines.benchmarks.search [RUNFILE]` runs one after the other on the same machine, each in a process of its
own: the search; the best recipe, whose figure `posttrain clean best.yaml` has to repeat; and every recipe of the search
as a run of its own, to its end. Where the run file names no weights, the search trains its network once, and each of
the separate runs its own.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipelines.benchmarks.hardware import hardware
from pipelines.benchmarks.tables import document, markdown
from posttrain.config import RunFile, Search, dump, load

_CLI = [sys.executable, "-m", "posttrain.cli"]


def recipe(config: RunFile, values: dict[str, Any], path: Path) -> RunFile:
    """The run file of one trial as a run of its own."""
    own = {"run": config.run.model_copy(update={"path": str(path)}), "search": Search()}
    return config.with_values(values).model_copy(update=own)


def timed(command: str, runfile: Path) -> tuple[dict[str, Any], float]:
    """What a command of posttrain prints as JSON, and the wall seconds of its process."""
    began = time.perf_counter()
    done = subprocess.run([*_CLI, command, str(runfile), "--json"], check=True, stdout=subprocess.PIPE)
    return json.loads(done.stdout), time.perf_counter() - began


def measure(config: RunFile, folder: Path) -> dict[str, Any]:
    """Summaries and seconds of the search, of its best recipe again, and of all recipes as separate runs."""
    folder.mkdir(parents=True, exist_ok=True)

    def written(name: str, run: RunFile) -> Path:
        path = folder / f"{name}.yaml"
        path.write_text(dump(run))
        return path

    config = config.model_copy(update={"run": config.run.model_copy(update={"path": str(folder / "search")})})
    search, seconds = timed("tune", written("search", config))
    best, best_seconds = timed("clean", Path(search["files"]["best run file"]))
    runs = []
    for number, values in enumerate(json.loads((folder / "search" / "trials.json").read_text())):
        summary, own_seconds = timed("clean", written(f"{number}", recipe(config, values, folder / f"{number}")))
        runs.append({"summary": summary, "seconds": own_seconds})
    return {
        "search": search,
        "seconds": seconds,
        "best": best,
        "best_seconds": best_seconds,
        "runs": runs,
        "hardware": hardware(),
    }


def report(found: dict[str, Any], command: str) -> str:
    """The table in Markdown. Raises ValueError where the best recipe does not repeat the search's figure."""
    search, runs = found["search"], found["runs"]
    best = search["trials"][search["best"]]
    again = found["best"]["validation_accuracy_after"]
    if (again, found["best"]["live"]) != (best["validation_accuracy"], best["live"]):
        raise ValueError(f"best.yaml ends at {again}, the search's trial {best['number']} at {best}")
    rows = [
        (
            str(trial["number"]),
            trial["how"],
            str(trial["rounds"]),
            _percent(trial["validation_accuracy"]),
            str(run["summary"]["rounds"]),
            _percent(run["summary"]["validation_accuracy_after"]),
            f"{run['seconds']:.1f}",
        )
        for trial, run in zip(search["trials"], runs, strict=True)
    ]
    apart = sum(run["seconds"] for run in runs)
    heads = ("trial", "its end", "rounds", "validation", "rounds as a run", "validation as a run", "seconds as a run")
    return document(
        [
            ["# A search beside separate runs", "", f"`{command}`; {found['hardware']}"],
            [
                f"{len(runs)} recipes: `posttrain tune` {found['seconds']:.1f} s, `posttrain clean` of each one after "
                f"the other {apart:.1f} s; ratio {found['seconds'] / apart:.2f}. "
                "Where no weights are given, the search trains the network once.",
                "",
                f"Trial 0 is the run file as it is. `posttrain clean best.yaml` (trial {search['best']}) repeats the "
                f"search's figure: validation accuracy {_percent(again)}, {found['best']['live']} live, in "
                f"{found['best_seconds']:.1f} s.",
            ],
            markdown(heads, rows),
        ]
    )


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.2f} %"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runfile", type=Path, nargs="?", help="default: the embedded digits")
    parser.add_argument("--folder", type=Path, default=Path("runs/search_benchmark"), help="a new folder for the runs")
    parser.add_argument("--out", type=Path, default=Path("pipelines/benchmarks/results"), help="the table")
    options = parser.parse_args(arguments)
    found = measure(load(options.runfile), options.folder)
    (options.folder / "search.json").write_text(json.dumps(found, indent=1))
    runfile = f" {options.runfile}" if options.runfile else ""
    text = report(found, f"python -m pipelines.benchmarks.search{runfile}")
    options.out.mkdir(parents=True, exist_ok=True)
    options.out.joinpath("search.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
