"""Which files a job has: what is new, what is held back, and what may raise an alarm.

Told from names, sizes and times alone: no file is opened, and nothing heavy is imported.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from posttrain.config import Data
from posttrain.data import listing
from posttrain.data.listing import File
from posttrain.jobs.job_folder import JobFolder, State
from posttrain.store.folder import resolve


@dataclass(frozen=True)
class Inventory:
    """The files of the data set as they are now, and what the job knows of them."""

    state: State
    files: list[File]
    """Those that take part in a run."""
    new: list[File]
    """Of these, the new and changed ones, and those that the user has accepted since the last run."""
    held_back: list[File]
    """Training files that take no part, since an alarm."""
    checked: list[File]
    """The new and changed training files: each may raise an alarm."""
    exempt: list[File]
    """Other training files that no champion was trained on: accepted by the user, or of runs that were not promoted."""
    gone: int
    """How many files of the last run are no longer there."""
    seen: dict[tuple[str, str], File]
    """The files that the finished runs have seen, by split and path."""
    local: bool
    """Whether the files lie on this machine's disks."""


def key(file: File) -> tuple[str, str]:
    """What a file is known by: split and path."""
    return file.split, file.path


def take_inventory(data: Data, job: JobFolder) -> Inventory:
    """The files of the section `data` beside what the job has seen. Raises DataError where a location has none."""
    state = job.state()
    seen = job.seen(state)
    now, local = _list_files(data)
    changed = set(map(key, listing.changed(now, seen, local=local)))
    held_back = {("train", path) for path in state.held_back} - changed
    accepted = {("train", path) for path in state.accepted} - held_back
    exempt = (accepted | {("train", path) for path in state.unused}) - changed - held_back
    return Inventory(
        state=state,
        files=[file for file in now if key(file) not in held_back],
        new=[file for file in now if key(file) in changed | accepted],
        held_back=[file for file in now if key(file) in held_back],
        checked=[file for file in now if file.split == "train" and key(file) in changed],
        exempt=[file for file in now if key(file) in exempt],
        gone=len(seen.keys() - set(map(key, now))),
        seen=seen,
        local=local,
    )


def _list_files(data: Data) -> tuple[list[File], bool]:
    """All files of the data set, and whether they lie on this machine's disks."""
    if data.source not in ("parquet", "folder"):
        # shipped with posttrain or downloaded once: it never changes
        return [File("train", data.name or data.source, 0, 0)], False
    locations: dict[str, tuple[str, ...]] = {}
    for split in ("train", "validation", "test"):
        if (given := getattr(data, split)) is not None:
            locations[split] = (given,) if isinstance(given, str) else tuple(given)
    from pyarrow import fs

    local = all(isinstance(resolve(place)[0], fs.LocalFileSystem) for given in locations.values() for place in given)
    return listing.list_files(data.source, locations), local


def new_files_sentence(inventory: Inventory) -> str:
    """What a run is about to take in."""
    parts = []
    for split in ("train", "validation", "test"):
        of_split = [file for file in inventory.new if file.split == split]
        if of_split:
            name = "training" if split == "train" else split
            parts.append(f"{len(of_split):,} {name} {'file' if len(of_split) == 1 else 'files'}")
    held = f"; {len(inventory.held_back):,} held back" if inventory.held_back else ""
    gone = f"; {inventory.gone:,} gone" if inventory.gone else ""
    return f"new or changed: {', '.join(parts)}{held}{gone}"


def nothing_new_sentence(inventory: Inventory) -> str:
    """Why there is nothing to do."""
    held = len(inventory.held_back)
    total = len(inventory.files) + held
    reason = f"none of the {total:,} files is" if total > 1 else "the one file is not"
    reason += " new or changed since the last run"
    if held:
        reason += f"; {held:,} {'is' if held == 1 else 'are'} held back since an alarm (posttrain retrain --accept)"
    if inventory.gone:
        reason += f"; {inventory.gone:,} {'is' if inventory.gone == 1 else 'are'} gone, and the next run does without"
    return reason


# -- as the samples name their files ---------------------------------------------------------------------


def file_names(data: Data, files: Iterable[File]) -> list[str]:
    """What the samples of each of these files have in their column `file`."""
    if data.source == "folder":
        assert isinstance(data.train, str), "inputs.prepare refuses several"
        root = resolve(data.train)[1].strip("/")
        return [file.path.strip("/").removeprefix(f"{root}/") for file in files]
    # tables that come with posttrain, or are downloaded whole, are named by their split
    return [file.path if data.source == "parquet" else f"{file.path}/{file.split}" for file in files]


def batch_names(data: Data, names: list[str]) -> list[str]:
    """By file name, the batch that it is checked with: the file itself, or the class folder that an image lies in."""
    if data.source != "folder":
        return names
    # a URI may hold a key and its secret
    root = resolve(str(data.train))[1] if "://" in str(data.train) else str(data.train)
    return [f"{root.rstrip('/')}/{name.split('/', 1)[0]}" for name in names]
