"""What the reports of the benchmarks are made of: Markdown tables, groups of findings, means with their spread."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from typing import Protocol, TypeVar

from pipelines.benchmarks.cases import DATASETS, NETWORKS, NOISES, Case


class OfACase(Protocol):
    """A finding."""

    @property
    def case(self) -> Case: ...


F = TypeVar("F", bound=OfACase)


def row(cells: Iterable[object]) -> str:
    """A row of a Markdown table."""
    return f"| {' | '.join(map(str, cells))} |"


def markdown(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a table."""
    return [row(cells) for cells in (columns, ["---"] * len(columns), *rows)]


def document(sections: Iterable[Sequence[str]]) -> str:
    """The sections' lines with an empty line between two sections; an empty section is left out."""
    return "\n".join("\n".join(section) + "\n" for section in sections if section)


def head(
    title: str,
    command: str,
    cases: Sequence[Case],
    *,
    noisy: int,
    machines: Iterable[tuple[str, int]],
    note: str = "",
) -> list[str]:
    """What a report begins with: the command, the cases, of which so many are noisy, hardware and threads."""
    sizes = [
        f"{name} ({size.train} / {size.validation} / {size.test})"
        for name, size in DATASETS.items()
        if any(case.dataset == name for case in cases)
    ]
    seeds = sorted({case.seed for case in cases})
    return [
        f"# {title}",
        "",
        f"`{command}`",
        "",
        f"- data sets (training / validation / test images): {', '.join(sizes)}",
        f"- seeds: {', '.join(map(str, seeds))} (the sample, the wrong labels and the network depend on them)",
        f"- cases: {len(cases)}, of which {noisy} with wrong labels{note}",
        *sorted({f"- measured on: {hardware}; {threads} thread(s)" for hardware, threads in machines}),
    ]


def grouped(findings: Iterable[F], *names: str) -> dict[tuple[str, ...], list[F]]:
    """Findings by these attributes of their case, sorted by them in the order of the benchmarks' lists."""
    orders: dict[str, Sequence[str]] = {"dataset": list(DATASETS), "noise": NOISES, "network": NETWORKS}
    found: dict[tuple[str, ...], list[F]] = {}
    for finding in findings:
        found.setdefault(tuple(getattr(finding.case, name) for name in names), []).append(finding)
    return dict(
        sorted(found.items(), key=lambda item: [orders[n].index(v) for n, v in zip(names, item[0], strict=True)])
    )


def percent(values: Sequence[float | None], *, signed: bool = False) -> str:
    """Mean ± standard deviation in percent, in brackets the number of values, where some are not known."""
    known = [100 * value for value in values if value is not None]
    return with_spread(statistics.mean(known), known, signed=signed) + fewer(known, values) if known else ""


def with_spread(mean: float, values: Sequence[float], *, signed: bool = False) -> str:
    """The mean ± the standard deviation of the values; of a single value there is none."""
    deviation = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{mean:{'+' if signed else ''}.1f}{deviation}"


def percent_with_error(values: Sequence[float | None], *, signed: bool = False) -> str:
    """Mean ± standard error of the mean in percent, in brackets the number of values, where some are not known."""
    known = [100 * value for value in values if value is not None]
    if not known:
        return ""
    error = f" ± {statistics.stdev(known) / len(known) ** 0.5:.1f}" if len(known) > 1 else ""
    return f"{statistics.mean(known):{'+' if signed else ''}.1f}{error}{fewer(known, values)}"


def fewer(known: Sequence[object], wanted: Sequence[object]) -> str:
    """In brackets how many are known, where some are not."""
    return f" ({len(known)})" if len(known) < len(wanted) else ""
