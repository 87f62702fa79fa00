"""The command line of the benchmarks: what is measured, told and refused."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from pipelines.benchmarks import command, detection, refinement, safety
from pipelines.benchmarks.cases import Case

MAINS = [detection.main, refinement.main, safety.main]
NOISES = ("clean", "pair 20", "human aggre")


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., list[Case]]:
    """A benchmark that finds the case itself, of all but `pair 20`; returns what it was asked to measure."""

    def measured(*arguments: str) -> list[Case]:
        parser = command.parser("", NOISES, default=NOISES[:2], seeds=[0])
        parser.add_argument("--some-flag", action="store_true")
        asked: list[Case] = []
        command.run(
            "any",
            parser,
            parser.parse_args([*arguments, "--out", str(tmp_path / "out")]),
            measure=asked.append,
            kept=lambda case: None if case.noise == "pair 20" else case,
            report=lambda found, line: f"{line}: {len(found)}",
            table=lambda found: pa.table({"noise": [case.noise for case in found]}),
            flags=("some-flag",),
        )
        return asked

    return measured


def test_every_case_is_measured_and_told_of_if_it_is_kept(
    run: Callable[..., list[Case]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    asked = run("--datasets", "digits", "--networks", "augmented", "--seeds", "1", "2")
    assert asked == [Case("digits", noise, "augmented", seed) for seed in (1, 2) for noise in NOISES[:2]]
    line = "python -m pipelines.benchmarks.any --datasets digits --networks augmented --seeds 1 2"
    printed = capsys.readouterr()
    assert printed.out == f"{line}: 2\n"
    assert printed.err.splitlines()[1] == "[2/4] digits, pair 20, augmented, seed 1"
    assert (tmp_path / "out" / "any.md").read_text() == f"{line}: 2"
    assert pq.read_table(tmp_path / "out" / "any.parquet").to_pydict() == {"noise": ["clean", "clean"]}


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ([], "--seeds 0"),
        (["--noises", "clean", "human aggre"], "--noises clean 'human aggre' --seeds 0"),
        (["--threads", "2", "--some-flag", "--folder", "elsewhere"], "--seeds 0 --some-flag --threads 2"),
        (["--processes", "3", "--device", "cuda"], "--seeds 0 --device cuda --processes 3"),
    ],
)
def test_the_command_is_told_without_what_is_usual_and_without_folders(
    run: Callable[..., list[Case]], arguments: Sequence[str], line: str, capsys: pytest.CaptureFixture[str]
):
    assert run("--report", *arguments) == []
    assert capsys.readouterr().out.startswith(f"python -m pipelines.benchmarks.any {line}: ")


@pytest.mark.parametrize("main", MAINS)
def test_a_report_of_nothing_is_refused(
    main: Callable[[Sequence[str]], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(SystemExit):
        main(["--report", "--folder", str(tmp_path), "--out", str(tmp_path / "out")])
    assert "measure them first" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def noted(case: Case, folder: Path) -> None:
    """Stands for a measurement: the threads that it could have used."""
    if case.noise == "human aggre":
        raise ValueError("cannot be measured")
    (folder / case.key).write_text(str(torch.get_num_threads()))


def in_processes(folder: Path, *arguments: str) -> None:
    parser = command.parser("", NOISES, default=NOISES[:2], seeds=[0])
    command.run(
        "any",
        parser,
        parser.parse_args(["--processes", "2", "--out", str(folder / "out"), *arguments]),
        measure=partial(noted, folder=folder),
        kept=lambda case: case if (folder / case.key).exists() else None,
        report=lambda found, line: str(len(found)),
        table=lambda found: pa.table({"noise": [case.noise for case in found]}),
    )


@pytest.mark.long
@pytest.mark.slow
def test_several_processes_measure_every_case_with_their_threads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    in_processes(tmp_path, "--datasets", "digits", "--threads", "3")
    wanted = [Case("digits", noise, network, 0) for noise in NOISES[:2] for network in ("memorised", "augmented")]
    assert {case.key: (tmp_path / case.key).read_text() for case in wanted} == {case.key: "3" for case in wanted}
    printed = capsys.readouterr()
    assert printed.out == "4\n"
    assert printed.err.splitlines() == [f"[{number}/4] {case}" for number, case in enumerate(wanted, start=1)]


@pytest.mark.long
def test_a_case_that_fails_in_a_process_of_its_own_ends_the_benchmark(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot be measured"):
        in_processes(
            tmp_path, "--datasets", "cifar10n", "--noises", "human aggre", "clean", "pair 20", "--seeds", "0", "1"
        )
    # of twelve cases those that ran beside it, and none that would have come later
    assert len(list(tmp_path.iterdir())) <= 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("main", MAINS)
def test_a_gpu_that_is_not_there_is_refused(
    main: Callable[[Sequence[str]], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["--device", "cuda", "--folder", str(tmp_path), "--out", str(tmp_path / "out")])
    assert "torch sees no GPU; leave --device out to train on the CPU" in capsys.readouterr().err
