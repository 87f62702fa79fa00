"""What follows from a decision: the version is registered and promoted, or files are held back; the state is written.

Every step may be done again after an interruption and ends the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from posttrain.config import Data, JobFile, without_credentials
from posttrain.data import listing
from posttrain.data.listing import File
from posttrain.errors import StepError
from posttrain.jobs.attempt import PARENT, Attempt
from posttrain.jobs.champion import BASE
from posttrain.jobs.gate import ClassCounts
from posttrain.jobs.inventory import Inventory, batch_names, file_names, key
from posttrain.jobs.job_folder import JobFolder, State
from posttrain.jobs.previous_runs import ACTED_ON
from posttrain.jobs.summary import summarise_run

if TYPE_CHECKING:
    from posttrain.store.registry import Registry, Version

_RUNS_WITH_FEATURES = 2
"""The latest runs keep their features; so do those of the champion and of the version before it."""


def conclude(
    config: JobFile,
    job: JobFolder,
    registry: Registry,
    inventory: Inventory,
    attempt: Attempt,
    assert_held: Callable[[], None],
) -> dict[str, Any]:
    """Carry out the decision of the attempt; the summary of this start."""
    from posttrain.store.registry import CHAMPION, PREVIOUS, RUN

    record = attempt.folder.read_json(attempt.decision_path())
    verdict, version = record["verdict"], None
    alarming: list[File] = []
    if verdict == "alarm":
        alarming = _alarming_files(config.data, inventory.checked, record["alarming"])
    else:
        assert_held()
        version = registry.register(
            record["model"], run=attempt.name, run_id=record["mlflow_run"], tags=_tags(attempt, record)
        )
        _refuse_other_champion(registry, attempt, version)
        assert_held()
        _move_aliases(registry, version, promoted=verdict == "promoted")
    champion, previous = registry.version(CHAMPION), registry.version(PREVIOUS)
    state = state_after(inventory, attempt.name, verdict, alarming, champion.number if champion else None)
    # after an alarm the other new files stay new: no champion was trained on them
    seen = _seen_after(inventory, alarming if verdict == "alarm" else inventory.new)
    assert_held()
    job.write_state(state, seen)
    serving = [version.tags for version in (champion, previous) if version]
    job.drop_features({*state.runs[-_RUNS_WITH_FEATURES:], *(tags[RUN] for tags in serving if RUN in tags)})
    job.drop_bases({record["base"], *(tags[BASE] for tags in serving if BASE in tags)})
    return summarise_run(config.job.name, record, state, attempt, version.number if version else None)


def _tags(attempt: Attempt, record: dict[str, Any]) -> dict[str, str]:
    """What a version tells of where it comes from."""
    tags = {
        "posttrain.folder": without_credentials(attempt.folder.absolute.location),
        BASE: record["base"],
        "posttrain.data": ", ".join(f"{name} {digest}" for name, digest in record["data"].items()),
        "posttrain.removed": f"{record['acted_on']} samples taken out so far, in {attempt.folder.path(ACTED_ON)}",
        "posttrain.gate": record["reason"],
        "posttrain.accuracy": f"{ClassCounts(**record['challenger']).accuracy:.6f} ({record['measured_on']})",
    }
    if record["parent"] is not None:
        tags[PARENT] = record["parent"]
    return tags


def _refuse_other_champion(registry: Registry, attempt: Attempt, version: Version) -> None:
    """Raises StepError where another version has become champion during the run."""
    from posttrain.store.registry import CHAMPION

    compared = attempt.champion.number if attempt.champion else None
    serving = registry.version(CHAMPION)
    if (serving.number if serving else None) not in (compared, version.number):
        raise StepError(
            f"version {serving.number if serving else 'none'} of {registry.name} has become champion while this "
            f"run compared itself with version {compared or 'none'}; start the same command again"
        )


def _move_aliases(registry: Registry, version: Version, *, promoted: bool) -> None:
    from posttrain.store.registry import CHALLENGER, PREVIOUS

    previous = registry.version(PREVIOUS)
    if not promoted:
        registry.point(CHALLENGER, version.number)
    elif previous is None or previous.number != version.number:
        # else it was promoted before this run was killed, and somebody has rolled it back since
        registry.promote(version)


def _alarming_files(data: Data, checked: list[File], alarming: list[str]) -> list[File]:
    batches = batch_names(data, file_names(data, checked))
    return [file for file, batch in zip(checked, batches, strict=True) if batch in alarming]


def state_after(inventory: Inventory, run: str, verdict: str, alarming: Iterable[File], champion: str | None) -> State:
    """What the job knows after the run of this name, in which these files raised an alarm."""
    before = inventory.state
    held_back = {file.path for file in (*inventory.held_back, *alarming)}
    accepted = tuple(path for path in before.accepted if path not in held_back) if verdict == "alarm" else ()
    return replace(
        before,
        runs=(*(name for name in before.runs if name != run), run),
        champion=champion,
        verdict=verdict,
        held_back=tuple(sorted(held_back)),
        accepted=accepted,
        unused=_unused_after(inventory, verdict),
    )


def _unused_after(inventory: Inventory, verdict: str) -> tuple[str, ...]:
    if verdict == "promoted":
        return ()
    there = {file.path for file in inventory.files if file.split == "train"}
    unused = set(inventory.state.unused)
    if verdict == "not promoted":
        unused |= {file.path for file in inventory.new if file.split == "train"}
    return tuple(sorted(unused & there))


def _seen_after(inventory: Inventory, taken_in: Iterable[File]) -> list[File]:
    """The table of seen files, with these as they are now and the others as they were."""
    taken_in = list(taken_in)
    others = set(map(key, (*inventory.files, *inventory.held_back))) - set(map(key, taken_in))
    seen = [known for name, known in inventory.seen.items() if name in others]
    return seen + listing.with_content(taken_in, local=inventory.local)
