"""What the refinement benchmark finds on a case: a row for each network or boundary; kept in a folder."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipelines.benchmarks import findings, in_memory, training
from pipelines.benchmarks.cases import Case
from pipelines.benchmarks.in_memory import Estimate, Mode

MODES: tuple[Mode, ...] = ("head", "network", "both")

UNTOUCHED = "the network as it came"
OURS: dict[Mode, str] = {mode: f"posttrain, {mode}" for mode in MODES}
NEW_HEAD = "new head, nothing removed"
CHOSEN = "chosen boundary, nothing removed"
RIGHT = "chosen boundary, the right labels alone"
NO_REMOVAL = "no removal, same steps"
EMA = "same, EMA"
THEN_BOUNDARY = "same, then the boundary"
RANDOM = "random removal"
BY_LOSS = "removal by loss"
CLEANLAB = "cleanlab's removal, same steps"
SCRATCH = "from scratch, all"
SCRATCH_OURS = "from scratch, what posttrain (network) kept"
SCRATCH_BY_LOSS = "from scratch, what removal by loss kept"
SCRATCH_CLEANLAB = "from scratch, what cleanlab kept"
ORACLE = "from scratch, the right labels alone"

REFINED = (OURS["network"], OURS["both"], NO_REMOVAL, EMA, THEN_BOUNDARY, RANDOM, BY_LOSS, CLEANLAB)
"""The rows that take the same gradient steps from the trained network."""
FROM_SCRATCH = (SCRATCH, SCRATCH_OURS, SCRATCH_BY_LOSS, SCRATCH_CLEANLAB, ORACLE)
ROWS = (UNTOUCHED, OURS["head"], NEW_HEAD, CHOSEN, RIGHT, *REFINED, *FROM_SCRATCH)
CONTROLS = (UNTOUCHED, NO_REMOVAL, EMA, RANDOM, BY_LOSS, CLEANLAB, NEW_HEAD)
"""What a user could do instead of posttrain."""
ABLATIONS: dict[Mode, str] = {"head": CHOSEN, "network": NO_REMOVAL, "both": THEN_BOUNDARY}
"""The same without the removal: what of posttrain's gain is not due to it."""
AFTER_FOLDS = (CLEANLAB, SCRATCH_CLEANLAB)
"""The rows that need out-of-sample predictions, thus `cases.FOLDS` more networks."""


@dataclass(frozen=True)
class Row:
    """A network or a boundary, and what it was made of."""

    name: str
    test_accuracy: float
    validation_accuracy: float
    """On labels that are as noisy as the rest."""
    steps: int
    """Gradient steps of the whole network, since the trained network or from scratch."""
    samples: int
    """Training samples that are left in the end."""
    wrong: int
    """Of these, with a wrong label."""


@dataclass(frozen=True)
class Cleaning:
    """How one of posttrain's modes went; the tuples are by round."""

    reason: str
    """Why there was no further round."""
    new_boundary: bool
    """Whether a boundary took the head's place after the last round."""
    removed: tuple[int, ...]
    steps: tuple[int, ...]
    """Gradient steps of the whole network; empty for the head."""
    test_accuracies: tuple[float, ...]
    estimates: tuple[Estimate, ...]
    """Also of the last one, in which nothing was removed."""


@dataclass(frozen=True)
class Finding:
    """Everything that was measured on a case."""

    case: Case
    samples: int
    wrong: int
    """Training samples with a wrong label."""
    cleanings: dict[Mode, Cleaning]
    rows: tuple[Row, ...]
    hardware: str
    threads: int
    settings: dict[str, Any]

    def row(self, name: str) -> Row | None:
        """The row of that name, None where it was not measured."""
        return next((row for row in self.rows if row.name == name), None)

    def ours(self, mode: Mode) -> Row:
        """The mode's row."""
        row = self.row(OURS[mode])
        assert row is not None, "measured in every case"
        return row

    @property
    def best(self) -> Mode:
        """The mode with the highest validation accuracy, by which a user could choose; the first one of equals."""
        return max(MODES, key=lambda mode: self.ours(mode).validation_accuracy)


def settings(dataset: str) -> dict[str, Any]:
    """Everything that was set, as it comes back from a file."""
    used = {
        "probe": in_memory.PROBE.model_dump(),
        "removal": in_memory.REMOVAL.model_dump(),
        "refine": asdict(training.refining(dataset)),
        "decay": training.DECAY,
    }
    return json.loads(json.dumps(used))


def kept(case: Case, folder: Path) -> Finding | None:
    """The case's finding from the folder, None where there is none.

    Raises ValueError where it was measured with other settings.
    """
    path = findings.file("refinement", case, folder)
    found = findings.kept(Finding, path)
    if found is not None and found.settings != settings(case.dataset):
        raise ValueError(f"{path} was measured with other settings than these; name another --folder, or remove it")
    return found


def keep(found: Finding, folder: Path) -> None:
    """The case's finding goes into the folder."""
    findings.keep(found, findings.file("refinement", found.case, folder))


def table(found: Iterable[Finding]) -> pa.Table:
    """One row for each case and row; what is known of posttrain's own rounds stands in its rows alone."""
    unknown: dict[str, Any] = dict.fromkeys(Cleaning.__dataclass_fields__)
    rows: list[dict[str, Any]] = []
    for finding in found:
        known = {OURS[mode]: asdict(cleaning) for mode, cleaning in finding.cleanings.items()}
        whole = {"all_samples": finding.samples, "all_wrong": finding.wrong}
        machine = {"hardware": finding.hardware, "threads": finding.threads}
        for row in finding.rows:
            removal = {"removal_precision": precision(finding, row), "removal_recall": recall(finding, row)}
            own = {f"posttrain_{name}": value for name, value in known.get(row.name, unknown).items()}
            rows.append({**asdict(finding.case), **asdict(row), **whole, **removal, **own, **machine})
    return pa.Table.from_pylist(rows)


def precision(finding: Finding, row: Row) -> float | None:
    """Share of wrong labels in what the row does without; None where that is nothing."""
    removed = finding.samples - row.samples
    return (finding.wrong - row.wrong) / removed if removed else None


def recall(finding: Finding, row: Row) -> float | None:
    """Share of the wrong labels that the row does without; None where there are none."""
    return (finding.wrong - row.wrong) / finding.wrong if finding.wrong else None
