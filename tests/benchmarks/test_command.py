"""The command line of the benchmarks: what is measured, told and refused."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

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
            short=lambda found: f"short: {len(found)}",
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
    ],
)
def test_the_command_is_told_without_what_is_usual_and_without_folders(
    run: Callable[..., list[Case]], arguments: Sequence[str], line: str, capsys: pytest.CaptureFixture[str]
):
    assert run("--report", *arguments) == []
    assert capsys.readouterr().out.startswith(f"python -m pipelines.benchmarks.any {line}: ")


def test_the_short_table_is_printed_and_nothing_is_written(
    run: Callable[..., list[Case]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert run("--readme", "--datasets", "digits") == []
    assert capsys.readouterr().out == "short: 2\n"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("main", MAINS)
def test_a_report_of_nothing_is_refused(
    main: Callable[[Sequence[str]], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(SystemExit):
        main(["--report", "--folder", str(tmp_path), "--out", str(tmp_path / "out")])
    assert "measure them first" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
