"""The command line of the benchmarks on `cases`: which cases, where their findings are, what is written of them."""

from __future__ import annotations

import argparse
import multiprocessing
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path
from typing import TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from threadpoolctl import threadpool_limits

from pipelines.benchmarks import cases
from pipelines.benchmarks.cases import DATASETS, FEATURES, NETWORKS, PRETRAINED, Case

F = TypeVar("F")


def parser(
    description: str | None, noises: Sequence[str], *, default: Sequence[str] | None = None, seeds: Sequence[int]
) -> argparse.ArgumentParser:
    """The options of every benchmark; `default` are the noises that are taken where none is named, else all."""
    found = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    own = [name for name in DATASETS if name not in PRETRAINED | FEATURES]
    found.add_argument("--datasets", nargs="+", choices=own, default=own)
    found.add_argument("--noises", nargs="+", choices=noises, default=list(default or noises))
    found.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    found.add_argument("--seeds", type=int, nargs="+", default=list(seeds))
    found.add_argument("--folder", type=Path, default=Path("runs/detection"), help="networks and findings")
    found.add_argument("--out", type=Path, default=Path("pipelines/benchmarks/results"), help="the tables")
    found.add_argument("--threads", type=_positive, default=1)
    found.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="where the networks are trained")
    found.add_argument("--processes", type=_positive, default=1, help="so many cases are measured at a time")
    found.add_argument("--report", action="store_true", help="measure nothing, write the tables of what is there")
    return found


def run(
    name: str,
    parser: argparse.ArgumentParser,
    options: argparse.Namespace,
    *,
    measure: Callable[[Case], object],
    kept: Callable[[Case], F | None],
    report: Callable[[Sequence[F], str], str],
    table: Callable[[Sequence[F]], pa.Table],
    flags: Sequence[str] = (),
) -> None:
    """Measures the cases, unless only a report is asked for; writes and prints what is told of those that are kept.

    `measure` is pickled where there are several processes. `report` is handed the command, with those of the `flags`
    that are set. Exits with an error where nothing is kept, or the device is not there.
    """
    chosen = list(cases.cases(options.datasets, options.noises, options.networks, options.seeds))
    if not options.report:
        try:
            cases.train_on(options.device)
            for dataset in set(options.datasets) - {"digits"}:
                cases.folder_of(dataset)
        except (ValueError, FileNotFoundError) as error:
            parser.error(str(error))
        for number, case in enumerate(_begun(chosen, measure, options), start=1):
            print(f"[{number}/{len(chosen)}] {case}", file=sys.stderr)
    findings = [found for case in chosen if (found := kept(case)) is not None]
    if not findings:
        parser.error(f"{options.folder} holds nothing of these {len(chosen)} cases; measure them first")
    options.out.mkdir(parents=True, exist_ok=True)
    pq.write_table(table(findings), options.out / f"{name}.parquet")
    text = report(findings, _line(name, parser, options, flags))
    options.out.joinpath(f"{name}.md").write_text(text)
    print(text)


def _begun(chosen: Sequence[Case], measure: Callable[[Case], object], options: argparse.Namespace) -> Iterator[Case]:
    """Each case when its measurement begins; at the end all are measured. The first that fails ends it."""
    if options.processes == 1:
        torch.set_num_threads(options.threads)
        with threadpool_limits(limits=options.threads):
            for case in chosen:
                yield case
                measure(case)
        return
    with ProcessPoolExecutor(
        options.processes,
        # a process that was forked could not use a GPU that its parent has used
        multiprocessing.get_context("spawn"),
        _prepare_process,
        (options.threads, options.device),
    ) as pool:
        running: set[Future[object]] = set()
        for case in chosen:
            # none waits in the pool: it could not be called back
            while len(running) == options.processes:
                running -= _ended(running)
            running.add(pool.submit(measure, case))
            yield case
        while running:
            running -= _ended(running)


def _ended(running: set[Future[object]]) -> set[Future[object]]:
    """Waits for one to end; raises what it raised."""
    done, _ = wait(running, return_when=FIRST_COMPLETED)
    for future in done:
        future.result()
    return done


def _prepare_process(threads: int, device: str) -> None:
    """What a process of the pool does first: its threads, and where it trains."""
    torch.set_num_threads(threads)
    threadpool_limits(limits=threads)
    cases.train_on(device)


def _positive(text: str) -> int:
    """An integer from 1 on; argparse reports what is none."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not 1 or more")
    return value


def _line(name: str, parser: argparse.ArgumentParser, options: argparse.Namespace, flags: Sequence[str]) -> str:
    """What was asked for, without the folders, which are of one machine."""
    parts = ["python", "-m", f"pipelines.benchmarks.{name}"]
    for own in ("datasets", "noises", "networks"):
        given = getattr(options, own)
        parts += [] if given == parser.get_default(own) else [f"--{own}", *given]
    parts += ["--seeds", *(str(seed) for seed in options.seeds)]
    parts += [f"--{flag}" for flag in flags if getattr(options, flag.replace("-", "_"))]
    for own in ("threads", "device", "processes"):
        given = getattr(options, own)
        parts += [] if given == parser.get_default(own) else [f"--{own}", str(given)]
    return shlex.join(parts)
