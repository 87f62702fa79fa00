"""The leakage guard: finds images that are both trained on and measured on, says so, and leaves them out by choice."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from posttrain.arrow_compute import pc
from posttrain.cluster import leakage
from posttrain.cluster.leakage import (
    IDENTICAL,
    OTHER_FILE,
    OTHER_ID,
    OTHER_PARTITION,
    OTHER_ROW,
    SAME_LABEL,
    SPLIT,
    CrashingImage,
)
from posttrain.cluster.partitioning import Split
from posttrain.config import RunFile
from posttrain.errors import DataError
from posttrain.live import Rows
from posttrain.report.progress import StepLog
from posttrain.schema import FILE, PARTITION, ROW, SAMPLE_ID
from posttrain.store.features import quarantined_rows
from posttrain.store.ledger import Ledger, settings

_CRASHING = b"crashing"


@dataclass(frozen=True)
class Leaks:
    """The pairs that were found, and which of their samples take no part."""

    pairs: pa.Table | None
    """Columns of `cluster.leakage`; None: nobody looked."""
    choice: str
    split_off: frozenset[str] = frozenset()
    """Held-out sets that were split off the training data. With the choice `refuse`, their images that are identical to
    a training image are left out: there is no file from which the user could take them."""
    crashing: tuple[CrashingImage, ...] = ()
    """Images that end the process which decodes them: they are left out as well."""

    @classmethod
    def read(cls, table: pa.Table, choice: str, split_off: frozenset[str]) -> Leaks:
        """What `table` wrote down."""
        kept = json.loads((table.schema.metadata or {}).get(_CRASHING, b"[]"))
        return cls(table, choice, split_off, tuple((split, partition, row) for split, partition, row in kept))

    def table(self) -> pa.Table | None:
        """What goes into `leakage.parquet`: the pairs, with the other images in its metadata."""
        if self.pairs is None:
            return None
        return self.pairs.replace_schema_metadata(
            {**(self.pairs.schema.metadata or {}), _CRASHING: json.dumps(self.crashing)}
        )

    def excluded(self) -> dict[str, Rows]:
        """By set, the samples that are left out."""
        found = self._leaking()
        for split, partition, row in self.crashing:
            found[split] = Rows.of(partition, np.array([row[ROW]])) | found.get(split, Rows())
        return found

    def _leaking(self) -> dict[str, Rows]:
        if self.choice == "exclude_training" and self.pairs is not None:
            return {"train": Rows.of_table(self.pairs)}
        return {
            name: Rows.of(found[OTHER_PARTITION].to_numpy(), found[OTHER_ROW].to_numpy())
            for name, found in _by_split(self._not_measured_on()).items()
        }

    def quarantined(self) -> pa.Table:
        """The samples that are left out, as rows of `quarantine.parquet`."""
        training = self.choice == "exclude_training"
        left_out = self.pairs if training else self._not_measured_on()
        rows = []
        seen = set()
        for pair in left_out.to_pylist() if left_out is not None else ():
            mine = ("train", pair[PARTITION], pair[ROW], pair[SAMPLE_ID], pair[FILE])
            other = (pair[SPLIT], pair[OTHER_PARTITION], pair[OTHER_ROW], pair[OTHER_ID], pair[OTHER_FILE])
            (name, partition, row, identity, file), (of, *_, like, _) = (mine, other) if training else (other, mine)
            if (name, partition, row) in seen:
                continue
            seen.add((name, partition, row))
            what = "the same image as" if pair[IDENTICAL] else "nearly the same image as"
            reason = f"{what} {like!r} of the {of} set (data.leakage = {self.choice})"
            rows.append((name, partition, {ROW: row, SAMPLE_ID: identity, FILE: file, "reason": reason}))
        return quarantined_rows([*rows, *self.crashing])

    def _not_measured_on(self) -> pa.Table | None:
        """The pairs whose held-out sample is left out."""
        if self.choice == "exclude_evaluation" or self.pairs is None:
            return self.pairs
        if self.choice != "refuse":
            return None
        own = pc.is_in(self.pairs[SPLIT], pa.array(sorted(self.split_off), pa.string()))
        return self.pairs.filter(pc.and_(own, self.pairs[IDENTICAL]))

    def counts(self) -> dict[str, dict[str, int]] | None:
        """By held-out set: images that are also training images; how many are identical, and have another label."""
        if self.pairs is None:
            return None
        return {
            name: {
                "samples": _samples(found),
                "identical": _samples(found.filter(found[IDENTICAL])),
                "other_label": _samples(found.filter(pc.invert(found[SAME_LABEL]))),
            }
            for name, found in _by_split(self.pairs).items()
        }


def _by_split(pairs: pa.Table | None) -> dict[str, pa.Table]:
    if pairs is None:
        return {}
    names = sorted(set(pairs[SPLIT].to_pylist()))
    return {name: pairs.filter(pc.equal(pairs[SPLIT], name)) for name in names}


def _samples(found: pa.Table) -> int:
    return len(set(zip(found[OTHER_PARTITION].to_pylist(), found[OTHER_ROW].to_pylist(), strict=True)))


def find(
    config: RunFile,
    splits: Mapping[str, Split],
    shape: tuple[int, ...] | None,
    fingerprint: Mapping[str, str],
    ledger: Ledger,
    progress: StepLog,
) -> Leaks:
    """The leaks of a run's data; those that an earlier start of it wrote down are not looked for again.

    Raises DataError where they are more than the run file lets pass.
    """
    choice = config.data.leakage
    if choice == "off":
        return Leaks(None, choice)
    split_off = frozenset() if config.data.validation else frozenset({"validation"})
    path = ledger.folder.path("leakage.parquet")
    if ledger.folder.exists(path) and _is_of(ledger, config, fingerprint):
        leaks = Leaks.read(ledger.folder.read_table(path), choice, split_off)
        refuse(config, splits, leaks)
        return leaks
    with progress.step("look for leaks") as tell:
        pairs, crashing = leakage.find(splits, shape, tell, progress.say)
    leaks = Leaks(pairs, choice, split_off, tuple(crashing))
    for split, _, row in crashing:
        progress.say(f"  quarantined: {row[FILE]} (sample_id {row[SAMPLE_ID]}) of the {split} set: {row['reason']}")
    refuse(config, splits, leaks)
    excluded = leaks.excluded()
    for name, count in (leaks.counts() or {}).items():
        left_out = ", which are left out" if name in excluded and choice == "refuse" else ""
        progress.say(
            f"  {count['samples']:,} of {splits[name].rows:,} {name} images are training images, too, or nearly "
            f"({count['identical']:,} the very same{left_out}): see leakage.parquet"
        )
    return leaks


def _is_of(ledger: Ledger, config: RunFile, fingerprint: Mapping[str, str]) -> bool:
    """Whether what an earlier start wrote down is of these images: fingerprints are of ids and labels alone."""
    started = ledger.started() or {}
    return started.get("data") == fingerprint and started["config"]["data"] == settings(config)["data"]


def record(leaks: Leaks, ledger: Ledger) -> None:
    """Write down what was found and what is left out, unless rounds were made by it already."""
    if ledger.rounds():
        return
    folder = ledger.folder
    if (table := leaks.table()) is not None:
        folder.write_table(folder.path("leakage.parquet"), table)
    rows = leaks.quarantined()
    if rows.num_rows:
        folder.write_table(folder.path("quarantine.parquet"), rows)


def refuse(config: RunFile, splits: Mapping[str, Split], leaks: Leaks) -> None:
    """Raises DataError where a held-out set holds training images and may not, or would be left out as a whole."""
    excluded = leaks.excluded()
    for name, count in (leaks.counts() or {}).items():
        rows = splits[name].rows
        refused = leaks.choice == "refuse" and name not in leaks.split_off and count["identical"]
        all_excluded = rows == len(excluded.get(name, ()))
        if refused or all_excluded:
            assert leaks.pairs is not None
            found = leaks.pairs.filter(pc.equal(leaks.pairs[SPLIT], name))
            [pair] = found.sort_by([(IDENTICAL, "descending")]).slice(0, 1).to_pylist()
            where = getattr(config.data, name) or "split off the training set"
            how = f"{count['identical']:,} of {rows:,} images are" if refused else f"all {rows:,} images (nearly) are"
            raise DataError(
                f"data.{name} = {where}: {how} in the training set, too (the first: sample_id {pair[OTHER_ID]!r}, "
                f"there {pair[SAMPLE_ID]!r}); take them out of one of the two, or set data.leakage to "
                "exclude_evaluation, exclude_training or report"
            )
