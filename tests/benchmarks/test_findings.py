"""What a benchmark found, in a folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from pipelines.benchmarks import findings
from pipelines.benchmarks.cases import Case


@dataclass(frozen=True)
class Share:
    of: str
    value: float | None


@dataclass(frozen=True)
class Measured:
    case: Case
    shares: tuple[Share, ...]


CASE = Case("digits", "pair 20", "memorised", 3)
MEASURED = Measured(CASE, (Share("wrong", 0.1 + 0.2), Share("found", None)))


def test_what_is_kept_comes_back_as_it_was(tmp_path: Path):
    path = findings.file("any", CASE, tmp_path)
    assert path == tmp_path / "any" / "digits-pair_20-memorised-seed_3.json"
    assert findings.kept(Measured, path) is None
    findings.keep(MEASURED, path)
    assert findings.kept(Measured, path) == MEASURED
    assert list(path.parent.iterdir()) == [path]


def test_a_number_that_is_not_finite_leaves_the_last_finding_as_it_is(tmp_path: Path):
    path = tmp_path / "found.json"
    findings.keep(MEASURED, path)
    with pytest.raises(ValueError, match="not JSON compliant"):
        findings.keep(Measured(CASE, (Share("wrong", float("nan")),)), path)
    assert findings.kept(Measured, path) == MEASURED


def test_a_file_that_lacks_something_is_refused(tmp_path: Path):
    path = tmp_path / "found.json"
    path.write_text('{"shares": []}')
    with pytest.raises(ValueError, match="case"):
        findings.kept(Measured, path)
