"""A job whose runs never happen: its files hold any bytes, and what a run came to is written down by hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from mlflow import MlflowClient

from posttrain.config import JobFile
from posttrain.data.listing import with_content
from posttrain.jobs.attempt import Attempt, find_attempt
from posttrain.jobs.inventory import take_inventory
from posttrain.jobs.job_folder import JobFolder, State
from posttrain.jobs.promotion import conclude
from posttrain.store.folder import RunFolder
from posttrain.store.registry import CHALLENGER, CHAMPION, PREVIOUS, Registry


class SmallJob:
    def __init__(self, root: Path, source: str = "parquet") -> None:
        self.train = root / "train"
        suffix = ".parquet" if source == "parquet" else ""
        for split in ("validation", "test"):
            self.write(f"../{split}{suffix}" if suffix else f"../{split}/cat/1.png", split)
        self.config = job_file(
            root,
            source=source,
            train=str(self.train),
            **{split: str(root / f"{split}{suffix}") for split in ("validation", "test")},
        )
        self.folder = JobFolder(RunFolder(str(root / "job")))

    def write(self, name: str, content: str) -> str:
        path = self.train / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
        return str(path)

    def seen(self, **state: Any) -> None:
        """A run has ended that took in all that is there now."""
        files = with_content(take_inventory(self.config.data, self.folder).files, local=True)
        self.folder.write_state(replace(State(runs=("r",)), **state), files)

    def names(self, part: str) -> list[str]:
        """The training files in that part of the inventory."""
        found = getattr(take_inventory(self.config.data, self.folder), part)
        return sorted(str(Path(file.path).relative_to(self.train)) for file in found if file.split == "train")

    def attempt(self, registry: Registry, config: JobFile | None = None) -> Attempt:
        """The run that is due."""
        config = config or self.config
        return find_attempt(config, self.folder, registry, take_inventory(config.data, self.folder))

    def decided(self, attempt: Attempt, verdict: str, **more: Any) -> None:
        """The attempt has come to this verdict, and nothing has followed from it yet."""
        record: dict[str, Any] = dict.fromkeys(("rounds", "live", "removed", "relabelled", "quarantined"), 0)
        record |= {"verdict": verdict, "reason": "", "champion": None, "challenger": {"samples": [10], "correct": [9]}}
        record |= {"new_data": {"samples": 0, "candidates": 0, "acted_on": 0}, "measured_on": "test", "embedded": {}}
        record |= {"previously_removed": 0, "model": "", "mlflow_run": "", "base": "", "data": {}, "acted_on": 0}
        record["parent"] = attempt.champion.number if attempt.champion else None
        attempt.folder.write_json(attempt.decision_path(), {**record, **more})

    def conclude(self, verdict: str, **more: Any) -> None:
        """The run that was due has ended with this verdict."""
        attempt = Attempt("attempt", self.folder.run("attempt"), None)
        self.decided(attempt, verdict, **more)
        inventory = take_inventory(self.config.data, self.folder)
        conclude(self.config, self.folder, no_registry(), inventory, attempt, lambda: None)

    def registered(self, source: Path | None = None) -> Registry:
        """Two versions by somebody else; the second is champion, the first the one before."""
        registry = Registry.open(None, home=self.folder.folder.local, name="m")
        client = MlflowClient(registry.uri, registry_uri=registry.uri)
        client.create_registered_model("m")
        for alias in (PREVIOUS, CHAMPION):
            made = client.create_model_version("m", str(source or self.train))
            registry.point(alias, made.version)
        return registry


def job_file(root: Path, **data: str) -> JobFile:
    model = {"factory": "posttrain.vision.models:mlp", "channels": 1, "image_size": 8}
    return JobFile.model_validate(
        {"run": {"path": str(root / "job")}, "job": {"name": "m"}, "model": model, "data": data}
    )


def no_registry() -> Registry:
    """A registry without versions, which takes whatever it is told."""

    def nothing(*given: object, **more: object) -> None:
        return None

    made = SimpleNamespace(number="1", tags={})
    found = SimpleNamespace(name="m", version=nothing, point=nothing, promote=nothing)
    found.register = lambda model, **given: made
    return cast(Registry, found)


def aliases(registry: Registry) -> dict[str, str]:
    found = {alias: registry.version(alias) for alias in (CHAMPION, PREVIOUS, CHALLENGER)}
    return {alias: version.number for alias, version in found.items() if version}


def killed_at(work: Callable[..., Any], job: SmallJob, owner: type, step: str, *, done: bool) -> None:
    """The command is killed at the first call of this step, before it or once it is done."""
    real = getattr(owner, step)

    def killed(*arguments: Any, **keywords: Any) -> None:
        if done:
            real(*arguments, **keywords)
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(owner, step, killed)
        work(job.config, quiet=True)
