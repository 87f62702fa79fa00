"""Read: all sets of samples, in partitions."""

from __future__ import annotations

from typing import TYPE_CHECKING

from posttrain.config import RunFile
from posttrain.errors import DataError
from posttrain.report.progress import StepLog

if TYPE_CHECKING:
    from posttrain.cluster.partitioning import Split
    from posttrain.runs.inputs import Inputs


def read(config: RunFile, inputs: Inputs, progress: StepLog) -> tuple[dict[str, Split], dict[str, str]]:
    """All sets in partitions, and the fingerprint of the data: digests of files, ids and labels."""
    from posttrain.cluster import partitioning

    with progress.step("read") as tell:
        splits = partitioning.read(
            inputs.sources,
            classes=inputs.classes,
            validation_share=inputs.validation_share,
            noise=inputs.noise,
            seed=config.run.seed,
            ids_span_sets=config.data.id_scope == "all",
            progress=tell,
        )
    refuse_changed(config, inputs, splits)
    from posttrain.runs.inputs import refuse_one_class

    counts = splits["train"].class_counts
    split_off = (
        " Or has the validation set taken the others (data.validation_share)?" if inputs.validation_share else ""
    )
    refuse_one_class(config, [name for name, count in zip(inputs.classes, counts, strict=True) if count], split_off)
    _warn_of_few(config, splits["validation"].rows, progress)
    return splits, {"files": inputs.listing, **{name: split.digest for name, split in splits.items()}}


def _warn_of_few(config: RunFile, validation_samples: int, progress: StepLog) -> None:
    from posttrain.influence.noise_rate import MIN_CONFIDENT
    from posttrain.runs.noise_report import OF_RUN

    if validation_samples < MIN_CONFIDENT and config.removal.max_share == "estimated":
        progress.say(
            f"warning: there are {validation_samples} validation samples, so that nothing will be removed: fewer than "
            f"{MIN_CONFIDENT} {OF_RUN.few}"
        )


def refuse_changed(config: RunFile, inputs: Inputs, splits: dict[str, Split]) -> None:
    """Raises DataError where other samples were read than the files held when they were listed."""
    found = {name: split.rows for name, split in splits.items()}
    if inputs.validation_share is not None:
        found["train"] += found.pop("validation")
    for name, rows in inputs.rows.items():
        if found[name] != rows:
            raise DataError(
                f"data.{name} = {getattr(config.data, name)}: held {rows:,} samples when its files were listed, and "
                f"{found[name]:,} when they were read; leave them as they are, and start again"
            )
