"""One line per step: what, how many, how fast, how long still."""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from posttrain.report.visible import visible

_LOG_EVERY_S = 30.0

_WORTH_A_LINE_S = 0.1
"""A shorter step without samples had nothing to do (all is embedded already), and gets no line."""


class _Count(ProgressColumn):
    def render(self, task: Task) -> Text:
        if not task.total:
            return Text("")
        return Text(f"{int(task.completed):,}/{int(task.total):,}")


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        elapsed = task.elapsed or 0.0
        return Text(f"{task.completed / elapsed:,.0f}/s" if task.completed and elapsed > 0 else "")


class StepLog:
    """Shows the steps on a console, and keeps how long each took.

    On a terminal, the running step is a bar with the remaining time. A finished step is one line, everywhere.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self.seconds: dict[str, float] = {}
        self._of_round: dict[str, float] = {}
        self._round: int | None = None
        self._said: set[str] = set()

    def begin_round(self, number: int) -> None:
        """From now on, steps belong to this round."""
        if number != self._round:
            self._of_round = {}
        self._round = number

    def seconds_of_round(self) -> dict[str, float]:
        """Seconds of each step of the current round."""
        return {name: round(value, 3) for name, value in self._of_round.items()}

    def say(self, text: str) -> None:
        """Print a line; brackets and control characters in it are shown as text."""
        self.console.print(visible(text), markup=False, highlight=False, soft_wrap=True)

    def say_once(self, text: str) -> None:
        """The same, unless it has been said already."""
        if text not in self._said:
            self._said.add(text)
            self.say(text)

    @contextmanager
    def step(self, name: str) -> Iterator[Callable[[int, int], None]]:
        """Time a step and show it; yields a function to call with (done, total), both in samples."""
        label = name if self._round is None else f"round {self._round}  {name}"
        started = time.perf_counter()
        counted = [0, 0]
        said = started
        columns = (
            TextColumn("{task.description:<20}"),
            BarColumn(bar_width=24),
            _Count(),
            _Rate(),
            TimeRemainingColumn(compact=True),
        )
        # a log file or a pipe gets lines instead: one every 30 s, and one when the step ends
        with Progress(*columns, console=self.console, transient=True, disable=not self.console.is_terminal) as bar:
            task = bar.add_task(label, total=None)

            def advance(done: int, total: int) -> None:
                nonlocal said
                counted[:] = done, total
                bar.update(task, completed=done, total=total)
                now = time.perf_counter()
                if not self.console.is_terminal and 0 < done < total and now - said >= _LOG_EVERY_S:
                    said = now
                    rate = done / (now - started)
                    left = datetime.timedelta(seconds=round((total - done) / rate))
                    self.say(f"  {label:<20} {done:>9,}/{total:,} samples {rate:>9,.0f}/s, {left} left")

            yield advance
        took = time.perf_counter() - started
        self.seconds[name] = self.seconds.get(name, 0.0) + took
        self._of_round[name] = self._of_round.get(name, 0.0) + took
        done = counted[0]
        if not done and took < _WORTH_A_LINE_S:
            return
        noun = "sample" if done == 1 else "samples"
        what = f"{done:>9,} {noun:<8} {done / took:>9,.0f}/s" if done and took > 0 else " " * 30
        self.say(f"  {label:<20} {what} {took:>8.1f} s")
