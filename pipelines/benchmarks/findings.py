"""What a benchmark found, in a folder: one file for each benchmark and case."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import TypeAdapter

from pipelines.benchmarks.cases import Case

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Found = TypeVar("Found")


def file(benchmark: str, case: Case, folder: Path) -> Path:
    """Where the benchmark's finding on a case is kept."""
    return folder / benchmark / f"{case.key}.json"


def kept(kind: type[Found], path: Path) -> Found | None:
    """The finding in the file, None where there is no file; pydantic's ValidationError where it is no such finding."""
    return TypeAdapter(kind).validate_python(json.loads(path.read_text())) if path.exists() else None


def keep(found: DataclassInstance, path: Path) -> None:
    """Writes the finding aside and moves it: the file is there as a whole, or not at all.

    Raises ValueError where a number is not finite.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(".tmp")
    aside.write_text(json.dumps(asdict(found), indent=1, allow_nan=False))
    os.replace(aside, path)


def measured(
    wanted: Iterable[Case], folder: Path, measure: Callable[[Case], DataclassInstance]
) -> list[dict[str, Any]]:
    """All findings in the folder, one file for each case; of those wanted, what is not there is measured and kept."""
    for case in wanted:
        path = folder / f"{case.key}.json"
        if not path.exists():
            began = time.perf_counter()
            keep(measure(case), path)
            print(f"{case}: {time.perf_counter() - began:.0f} s", flush=True)
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
