"""The model registry of MLflow: versions, their aliases and tags. Every call can be repeated without harm.

Aliases: `champion` is the version in use, `previous` the champion before it, `challenger` the last version that did not
pass the gate.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain.config import without_credentials, yaml
from posttrain.errors import PosttrainError, StepError
from posttrain.store.mlflow_client import connect, reason
from posttrain.store.mlflow_weights import fetch_weights

if TYPE_CHECKING:
    from mlflow import MlflowClient

CHAMPION, PREVIOUS, CHALLENGER = "champion", "previous", "challenger"

RUN = "posttrain.run"
"""Tag with the run that made the version; a run makes at most one."""


@dataclass(frozen=True)
class Version:
    """A registered version of the job's model."""

    number: str
    tags: Mapping[str, str]


class Registry:
    """One registered model. Raises TrackingError where it cannot be opened, StepError where a later call fails."""

    def __init__(self, client: MlflowClient, uri: str, name: str) -> None:
        self._client = client
        self.uri = uri
        self.name = name

    @classmethod
    def open(cls, uri: str | None, *, home: Path, name: str) -> Registry:
        """The registry at `uri`; None: of the SQLite database in the folder `home`."""
        client, uri = connect(uri, home)
        return cls(client, uri, name)

    def version(self, alias: str) -> Version | None:
        """The version with this alias; None where there is none."""
        from mlflow.exceptions import MlflowException

        with self._asking(f"for the version with the alias {alias}"):
            try:
                return _version(self._client.get_model_version_by_alias(self.name, alias))
            except MlflowException as error:
                # an unknown alias is an invalid parameter, an unknown model does not exist
                if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                    return None
                raise

    def by_number(self, number: str) -> Version | None:
        """The version with this number; None where there is none (any more)."""
        from mlflow.exceptions import MlflowException

        with self._asking(f"for version {number}"):
            try:
                return _version(self._client.get_model_version(self.name, number))
            except MlflowException as error:
                if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                    return None
                raise

    def of_run(self, run: str) -> Version | None:
        """The version that this run made, found by its tag; None where there is none."""
        with self._asking("for the versions"):
            found = self._client.search_model_versions(f"name = '{self.name}' and tags.`{RUN}` = '{run}'")
            return _version(found[0]) if found else None

    def register(self, model_uri: str, *, run: str, run_id: str, tags: Mapping[str, str]) -> Version:
        """Register a logged model (models:/m-...) as the version of `run`, unless that run has one already."""
        known = self.of_run(run)
        if known is not None:
            return known
        from mlflow.exceptions import MlflowException

        with self._asking("to register the model"):
            try:
                self._client.create_registered_model(self.name)
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
            model_id = model_uri.removeprefix("models:/")
            made = self._client.create_model_version(
                self.name,
                # MLflow would look a models:/ URI up on the server that the process is set to
                self._client.get_logged_model(model_id).artifact_location,
                run_id=run_id,
                # in the same request: a killed job leaves no version without its tags
                tags={**tags, RUN: run},
                await_creation_for=60,
                model_id=model_id,
            )
            return _version(made)

    def promote(self, version: Version) -> None:
        """Make a version the champion, and the current champion `previous`."""
        champion = self.version(CHAMPION)
        if champion is not None and champion.number == version.number:
            return
        if champion is not None:
            # first: if killed in between, the champion is unchanged, and repeating the call completes it
            self.point(PREVIOUS, champion.number)
        self.point(CHAMPION, version.number)

    def point(self, alias: str, number: str) -> None:
        """Give an alias to the version with that number."""
        with self._asking(f"to make version {number} {alias}"):
            self._client.set_registered_model_alias(self.name, alias, number)

    def fetch(self, version: Version, into: Path) -> tuple[Path, dict[str, Any] | None]:
        """The version's weights, downloaded into a folder, and the recipe that builds the network (None if unknown).

        posttrain logs that recipe (`log_model`). Raises ModelError where no weights load without unpickling.
        """
        weights = fetch_weights(f"models:/{self.name}/{version.number}", self.uri, into)
        for described in sorted(into.rglob("MLmodel")):
            flavors = yaml.load(described.read_bytes(), where=str(described)).get("flavors") or {}
            flavor = flavors.get("python_function") or {}
            recipe = flavor.get("config")
            if isinstance(recipe, dict) and {"factory", "arguments", "classes", "head"} <= recipe.keys():
                return weights, recipe
        return weights, None

    @contextmanager
    def _asking(self, what: str) -> Iterator[None]:
        """Within, an error of MLflow becomes a StepError that says what was asked for."""
        try:
            yield
        except PosttrainError:
            raise
        except Exception as error:  # whatever the backend's driver raises
            raise StepError(
                f"the MLflow registry at {without_credentials(self.uri)} did not answer when asked {what} "
                f"({reason(error)}); start the same command again to continue"
            ) from error


def is_unused(database: Path) -> bool:
    """Whether a SQLite database of MLflow holds no run and no registered model, or is not there."""
    if not database.exists():
        return True
    with closing(sqlite3.connect(database)) as connection:
        tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        return not any(
            connection.execute(f"SELECT 1 FROM {table} LIMIT 1").fetchone()
            for table in ("runs", "logged_models", "registered_models")
            if table in tables
        )


def _version(found: Any) -> Version:
    return Version(str(found.version), dict(found.tags or {}))
