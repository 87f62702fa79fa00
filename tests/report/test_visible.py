from __future__ import annotations

import io
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from posttrain.report.progress import StepLog
from posttrain.report.summary import print_summary
from posttrain.report.visible import visible

SUMMARY: dict[str, Any] = {
    **dict.fromkeys(["relabelled", "removed", "live", "rounds", "quarantined"], 1),
    **{f"{split}_accuracy_{when}": 0.5 for split in ("validation", "test") for when in ("before", "after")},
    **dict.fromkeys(["removal_precision", "removal_recall", "relabel_accuracy", "noise"]),
    **dict.fromkeys(["test_accuracy_refit", "test_accuracy_boundary", "leakage", "undelivered"]),
    "seconds": 1.0,
    "steps": {},
}


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("cat/\x1b[2J\x1b]0;title\x07.png", r"cat/\x1b[2J\x1b]0;title\x07.png"),
        ("two\nlines\tand\ra return", r"two\nlines\tand\ra return"),
        ("\x9b31mC1", r"\x9b31mC1"),
        ("invoice\u202egnp.exe", r"invoice\u202egnp.exe"),
        ("half \ud800", r"half \ud800"),
        ("Übergrößenträger 猫 [bold]", "Übergrößenträger 猫 [bold]"),
        ("s3://key:se/cret@bucket/x", "s3://key:se/cret@bucket/x"),
        ("s3://key:secret@bucket/x", "s3://***@bucket/x"),
        ("https://u:p@ss@host/a@b", "https://***@host/a@b"),
        ("postgresql://host/db?user=me&password=hunter2", "postgresql://host/db?user=me&password=***"),
        ("https://host/x?X-Amz-Signature=abc&part=1", "https://host/x?X-Amz-Signature=***&part=1"),
    ],
)
def test_what_steers_a_terminal_is_written_out_and_passwords_are_not(given: str, shown: str) -> None:
    assert visible(given) == shown


@given(st.text())
def test_whatever_is_shown_is_one_line_that_can_be_printed(text: str) -> None:
    shown = visible(text)
    assert len(shown.splitlines()) <= 1 and not any(ord(sign) < 32 or 127 <= ord(sign) < 160 for sign in shown)
    shown.encode()


def test_a_line_of_the_progress_cannot_clear_the_screen() -> None:
    stream = io.StringIO()
    StepLog(Console(file=stream, force_terminal=True)).say("\x1b[2J [red]a label[/red]")
    assert stream.getvalue() == "\\x1b[2J [red]a label[/red]\n"


def test_brackets_in_names_are_text_in_the_summary() -> None:
    stream = io.StringIO()
    boundary = {"members": [{"layer": "[blink]head", "l2": 1}], "tried": [{"layer": "[blink]head"}]}
    summary = {**SUMMARY, "run": "runs/[red]x\x1b[2J", "ended": "\x1b[1m[/]", "files": {"ids": "a/[b]/\x1b[3J"}}
    print_summary(Console(file=stream, width=200), {**summary, "boundary": boundary})
    shown = stream.getvalue()
    assert "\x1b" not in shown
    for part in (r"posttrain  runs/[red]x\x1b[2J", r"ended because \x1b[1m[/]", r"a/[b]/\x1b[3J", "[blink]head (1)"):
        assert part in shown
