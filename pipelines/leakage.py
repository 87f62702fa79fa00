"""The leakage guard: images that are trained on and measured on are found, told, and by choice left out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import pyarrow as pa
import pyarrow.compute

from posttrain.cluster import leakage
from posttrain.cluster.leakage import IDENTICAL, OTHER_BUCKET, OTHER_FILE, OTHER_ID, OTHER_ROW, SAME_LABEL, SPLIT
from posttrain.cluster.reading import Split
from posttrain.config import RunFile
from posttrain.errors import DataError
from posttrain.report.progress import StepLog
from posttrain.schema import BUCKET, FILE, ROW, SAMPLE_ID, Excluded, excluded_rows
from posttrain.store.features import quarantined_rows
from posttrain.store.ledger import Ledger

# pyarrow makes these functions when it is imported: a type checker sees none of them
pc = cast(Any, pyarrow.compute)

_MOST_IDENTICAL = 0.05
"""Share of a held-out set: more than that is no oversight of a few, but the wrong file."""


@dataclass(frozen=True)
class Leaks:
    """The pairs that were found, and which of their samples take no part."""

    pairs: pa.Table | None
    """Columns of `cluster.leakage`; None: nobody looked."""
    choice: str

    def excluded(self) -> dict[str, Excluded]:
        """By set, the samples that are left out."""
        if self.pairs is None:
            return {}
        if self.choice == "exclude_training":
            return {"train": excluded_rows(self.pairs[BUCKET].to_numpy(), self.pairs[ROW].to_numpy())}
        if self.choice != "exclude_evaluation":
            return {}
        return {
            name: excluded_rows(found[OTHER_BUCKET].to_numpy(), found[OTHER_ROW].to_numpy())
            for name, found in self._by_split().items()
        }

    def quarantined(self) -> pa.Table:
        """What is left out, as rows of `quarantine.parquet`."""
        rows = []
        seen = set()
        training = self.choice == "exclude_training"
        for pair in self.pairs.to_pylist() if self.pairs is not None and self.excluded() else ():
            mine = ("train", pair[BUCKET], pair[ROW], pair[SAMPLE_ID], pair[FILE])
            other = (pair[SPLIT], pair[OTHER_BUCKET], pair[OTHER_ROW], pair[OTHER_ID], pair[OTHER_FILE])
            (name, bucket, row, identity, file), (of, *_, like, _) = (mine, other) if training else (other, mine)
            if (name, bucket, row) in seen:
                continue
            seen.add((name, bucket, row))
            what = "the same image as" if pair[IDENTICAL] else "nearly the same image as"
            reason = f"{what} {like!r} of the {of} set (data.leakage = {self.choice})"
            rows.append((name, bucket, {ROW: row, SAMPLE_ID: identity, FILE: file, "reason": reason}))
        return quarantined_rows(rows)

    def counts(self) -> dict[str, dict[str, int]] | None:
        """By held-out set: images that are training images, too, how many are the very same, and have another label."""
        if self.pairs is None:
            return None
        return {
            name: {
                "samples": _samples(found),
                "identical": _samples(found.filter(found[IDENTICAL])),
                "other_label": _samples(found.filter(pc.invert(found[SAME_LABEL]))),
            }
            for name, found in self._by_split().items()
        }

    def _by_split(self) -> dict[str, pa.Table]:
        assert self.pairs is not None
        names = sorted(set(self.pairs[SPLIT].to_pylist()))
        return {name: self.pairs.filter(pc.equal(self.pairs[SPLIT], name)) for name in names}


def _samples(found: pa.Table) -> int:
    return len(set(zip(found[OTHER_BUCKET].to_pylist(), found[OTHER_ROW].to_pylist(), strict=True)))


def find(
    config: RunFile,
    splits: Mapping[str, Split],
    shape: tuple[int, ...] | None,
    fingerprint: Mapping[str, str],
    ledger: Ledger,
    progress: StepLog,
) -> Leaks:
    """The leaks of a run's data; those that a former start of it wrote down are not looked for again.

    Raises DataError where they are more than the run file lets pass.
    """
    choice = config.data.leakage
    if choice == "off":
        return Leaks(None, choice)
    path = ledger.folder.path("leakage.parquet")
    started = ledger.started()
    if started is not None and started.get("data") == fingerprint and ledger.folder.exists(path):
        return Leaks(ledger.folder.read_table(path), choice)
    with progress.step("look for leaks") as tell:
        leaks = Leaks(leakage.find(splits, shape, tell), choice)
    refuse(config, splits, leaks)
    for name, count in (leaks.counts() or {}).items():
        progress.say(
            f"  {count['samples']:,} of {splits[name].rows:,} {name} images are training images, too, or nearly "
            f"({count['identical']:,} the very same): see leakage.parquet"
        )
    return leaks


def refuse(config: RunFile, splits: Mapping[str, Split], leaks: Leaks) -> None:
    """Raises DataError where more of a held-out set are training images than the run file lets pass, or all are."""
    choice = config.data.leakage
    for name, count in (leaks.counts() or {}).items():
        rows = splits[name].rows
        most = {"report": _MOST_IDENTICAL * rows, "refuse": 0}.get(choice, rows)
        if count["identical"] > most or (choice == "exclude_evaluation" and count["samples"] == rows):
            assert leaks.pairs is not None
            found = leaks.pairs.filter(pc.equal(leaks.pairs[SPLIT], name))
            pair = found.filter(found[IDENTICAL]).slice(0, 1).to_pylist()[0]
            where = getattr(config.data, name) or "split off the training set"
            raise DataError(
                f"data.{name} = {where}: {count['identical']:,} of {rows:,} images are in the training set, too (the "
                f"first: sample_id {pair[OTHER_ID]!r}, there {pair[SAMPLE_ID]!r}); take them out of one of the two, or "
                "set data.leakage to exclude_evaluation or exclude_training"
            )
