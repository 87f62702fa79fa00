"""One run of a job: named by what decides its result, so that the same start again goes on in the same folder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from posttrain.config import JobFile, without_credentials
from posttrain.errors import InputError
from posttrain.jobs.inventory import Inventory
from posttrain.jobs.job_folder import JobFolder, listing_digest
from posttrain.store.folder import RunFolder
from posttrain.store.ledger import settings

if TYPE_CHECKING:
    from posttrain.store.registry import Registry, Version

PARENT = "posttrain.parent"
"""Tag of a version: the champion that it was compared with."""


@dataclass(frozen=True)
class Attempt:
    """A run of the job."""

    name: str
    folder: RunFolder
    champion: Version | None
    """The version that it starts from and is compared with."""

    def decision_path(self) -> str:
        """The file with what the run came to: once it is there, the run itself is over."""
        return self.folder.path("decision.json")


def find_attempt(config: JobFile, job: JobFolder, registry: Registry, inventory: Inventory) -> Attempt:
    """The run that these files, settings and champion ask for. Raises InputError where the champion is gone."""
    from posttrain.store.registry import CHAMPION, RUN

    new = sorted(f"{file.split}\t{file.path}" for file in inventory.new)
    checked = sorted(file.path for file in inventory.checked)
    digest = listing_digest(inventory.files, new, checked, _deciding_settings(config))
    champion = registry.version(CHAMPION)
    if champion is not None and champion.tags.get(RUN, "").startswith(f"{digest}-"):
        # this very run has promoted it, and was killed before it could say so
        parent = champion.tags.get(PARENT)
        champion = registry.by_number(parent) if parent else None
    elif champion is None and inventory.state.champion is not None:
        raise InputError(
            f"the job's champion was version {inventory.state.champion}, but {registry.name} in the registry at "
            f"{without_credentials(registry.uri)} has no version with the alias {CHAMPION}: give one that alias, or "
            "correct job.name or tracking.uri, or begin a job of its own in a new folder"
        )
    name = f"{digest}-v{champion.number if champion else 0}"
    return Attempt(name, job.run(name), champion)


def _deciding_settings(config: JobFile) -> dict[str, Any]:
    """The settings that decide the result of a run."""
    record = settings(config)
    return {
        **{section: record[section] for section in ("data", "model", "pretrain", "probe", "removal", "refine", "gate")},
        "seed": record["run"]["seed"],
        "precision": record["ray"].get("precision"),
    }
