"""A run that is started again: interrupted, killed, or finished; with other settings or data it is refused."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from small_data import (
    BOTH,
    NETWORK,
    Digits,
    assert_same_result,
    interrupted_after,
    png,
    rounds,
)

from posttrain.errors import RunFolderError
from posttrain.runs import begin, fit

pytestmark = pytest.mark.ray

Run = Callable[..., dict[str, Any]]
Undisturbed = Callable[..., dict[str, Any]]

STEPS = ("embed", "fit", "score", "select", "refine", "evaluate", "commit", "tell_round")


@pytest.mark.parametrize(
    ("scope", "step"),
    [
        ("head", "commit"),
        *[
            pytest.param(scope, step, marks=pytest.mark.long)
            for scope, steps in {
                "head": [step for step in STEPS if step != "commit"],
                "network": ["embed", "fit", "refine"],
                "both": ["refine", "commit"],
            }.items()
            for step in steps
        ],
    ],
)
def test_a_run_interrupted_after_a_step_and_continued_ends_the_same(
    run: Run, undisturbed: Undisturbed, tmp_path: Path, step: str, scope: str
) -> None:
    refine = {"head": {}, "network": NETWORK, "both": BOTH}[scope]
    with interrupted_after(step, call=3):
        run(tmp_path / "run", refine=refine)
    committed = len(list((tmp_path / "run" / "rounds").glob("*/round.json"))) - 1
    assert 1 <= committed <= 3
    run(tmp_path / "run", refine=refine)
    assert_same_result(tmp_path / "run", undisturbed(scope)["run"])


@pytest.mark.long
@pytest.mark.parametrize(("scope", "committed"), [("head", 0), ("network", 2)])
def test_a_run_interrupted_once_its_layers_are_chosen_chooses_the_same_again(
    run: Run, undisturbed: Undisturbed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scope: str, committed: int
) -> None:
    refine = NETWORK if scope == "network" else {}
    after = fit.fitted

    def interrupted(run: Any, backbone: str, live: Any, history: Any, number: int, **options: Any) -> Any:
        fitted = after(run, backbone, live, history, number, **options)
        if number > committed or committed == 0:
            raise KeyboardInterrupt
        return fitted

    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        for module in (begin, fit):
            patch.setattr(module, "fitted", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(folder, refine=refine)
    assert len(rounds(folder)) == (committed + 1 if committed else 0)
    choices = sorted(folder.glob("rounds/*/probes.json"))
    chosen = choices[-1].read_bytes()
    assert int(choices[-1].parent.name) == (committed + 1 if committed else 0)
    again = run(folder, refine=refine)
    assert choices[-1].read_bytes() == chosen
    assert again["boundary"] == undisturbed(scope)["boundary"]
    assert_same_result(folder, undisturbed(scope)["run"])


@pytest.mark.long
@pytest.mark.parametrize("moment", ["write_checkpoint", "tell_round"])
def test_a_run_interrupted_while_it_puts_the_last_boundary_on_ends_the_same(
    run: Run, tmp_path: Path, moment: str
) -> None:
    nothing_goes = {"threshold": 1.0}
    whole = run(tmp_path / "whole", removal=nothing_goes)
    assert (whole["rounds"], whole["removed"]) == (0, 0)
    with interrupted_after(moment, call=2):
        run(tmp_path / "run", removal=nothing_goes)
    assert len(rounds(tmp_path / "run")) == (2 if moment == "tell_round" else 1)
    again = run(tmp_path / "run", removal=nothing_goes)
    assert_same_result(tmp_path / "run", tmp_path / "whole")
    varying = {"run", "seconds", "steps", "files"}
    assert {key: value for key, value in again.items() if key not in varying} == {
        key: value for key, value in whole.items() if key not in varying
    }


def test_a_finished_run_says_so_and_does_nothing(
    run: Run, undisturbed: Undisturbed, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(undisturbed()["run"])
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    capsys.readouterr()
    assert run(folder) == undisturbed()
    assert "this run is finished" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()} == before


def test_a_run_folder_of_other_settings_or_data_is_refused_with_what_differs(
    run: Run, undisturbed: Undisturbed, digits: Digits, tmp_path: Path
) -> None:
    with pytest.raises(RunFolderError, match=r"removal\.budget: 0\.05 -> 0\.1"):
        run(Path(undisturbed()["run"]), removal={"budget": 0.1})
    folder = tmp_path / "train"
    folder.mkdir()
    pq.write_table(digits.table("train"), folder / "a.parquet")
    run(tmp_path / "run", data={"train": str(folder)}, removal={"max_rounds": 1})
    pq.write_table(digits.table("train").slice(0, 899), folder / "a.parquet")
    with pytest.raises(RunFolderError, match="other data"):
        run(tmp_path / "run", data={"train": str(folder)}, removal={"max_rounds": 1})


@pytest.mark.long
def test_features_of_other_data_are_not_taken_up(
    run: Run, digits: Digits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dies(*arguments: Any) -> Any:
        raise KeyboardInterrupt

    one_round = {"max_rounds": 1}
    with monkeypatch.context() as patch:
        patch.setattr(begin, "evaluate", dies)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "run", removal=one_round)
    rotated = [png(np.rot90(digits.images[i]).copy()) for i in digits.splits["train"]]
    (tmp_path / "train").mkdir()
    pq.write_table(digits.table("train", image=pa.array(rotated, pa.binary())), tmp_path / "train" / "a.parquet")
    run(tmp_path / "run", data={"train": str(tmp_path / "train")}, removal=one_round)
    run(tmp_path / "fresh", data={"train": str(tmp_path / "train")}, removal=one_round)
    assert_same_result(tmp_path / "run", tmp_path / "fresh")


@pytest.mark.slow
@pytest.mark.parametrize(
    "signals",
    [[signal.SIGKILL], pytest.param([signal.SIGTERM, signal.SIGKILL], marks=pytest.mark.long)],
    ids=["killed", "terminated, then killed"],
)
def test_a_process_that_is_ended_and_started_again_ends_the_same(
    runfile: Callable[..., dict[str, Any]], undisturbed: Undisturbed, tmp_path: Path, signals: list[signal.Signals]
) -> None:
    ended = tmp_path / "ended"
    file, said = tmp_path / "run.yaml", tmp_path / "said"
    # one worker, as each start takes seconds to import torch in every one
    file.write_text(yaml.safe_dump(runfile(ended, ray={"workers": 1})))

    def start() -> subprocess.Popen[bytes]:
        with said.open("wb") as stream:
            return subprocess.Popen(
                [sys.executable, "-m", "posttrain.cli", "clean", str(file)],
                stdout=subprocess.DEVNULL,
                stderr=stream,
                process_group=0,
            )

    def started_until_committed(number: int) -> subprocess.Popen[bytes]:
        process, deadline = start(), time.monotonic() + 200
        while not (ended / "rounds" / f"{number:04d}" / "round.json").exists():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        return process

    for number, how in enumerate(signals, start=1):
        process = started_until_committed(number)
        if how == signal.SIGTERM:
            # as `timeout` and systemd do: Ray's processes must not hear of it
            os.killpg(process.pid, how)
            assert process.wait(timeout=60) == 143
            assert said.read_text().endswith("terminated; start the same command again to continue\n")
            assert "***" not in said.read_text() and "Traceback" not in said.read_text()
        else:
            process.send_signal(how)
            process.wait(timeout=60)
        assert not (ended / "summary.json").exists()

    assert start().wait(timeout=600) == 0
    assert_same_result(ended, undisturbed()["run"])
