"""What a benchmark found, in a folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

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
