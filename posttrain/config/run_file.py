"""The run file as a whole: `load` reads one, `dump` writes one that `load` reads back unchanged.

`RunFile()` is the embedded digits run. `schema` is its JSON schema; `differences` names the keys in which two differ.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self, TypeVar, overload

from pydantic import JsonValue, ValidationError, model_validator

from posttrain.config import yaml
from posttrain.config.cleaning import Probe, Removal
from posttrain.config.complaints import complaints, known_keys, shown, unknown_key
from posttrain.config.data import Data
from posttrain.config.environment import Ray, Results, Run, Tracking
from posttrain.config.job import Gate, Job
from posttrain.config.model import Augment, Model, Pretrain, Refine
from posttrain.config.search import SEARCHED, Search
from posttrain.config.section import Section
from posttrain.errors import ConfigError

MAX_BYTES = 2**20
"""Size of the largest run file that is read."""


class RunFile(Section):
    """A run of posttrain. Every key has a default; all defaults together are the embedded digits run."""

    run: Run = Run()
    data: Data = Data()
    model: Model = Model()
    pretrain: Pretrain = Pretrain()
    probe: Probe = Probe()
    removal: Removal = Removal()
    refine: Refine = Refine()
    ray: Ray = Ray()
    tracking: Tracking = Tracking()
    results: Results = Results()
    search: Search = Search()

    @property
    def refining(self) -> Refine:
        """`refine`, with `augment` filled in."""
        if self.refine.augment is not None:
            return self.refine
        augment: Augment = self.pretrain.augment if self.model.weights is None else "crop_flip"
        return self.refine.model_copy(update={"augment": augment})

    def with_values(self, values: Mapping[str, JsonValue]) -> RunFile:
        """The run file with other values for some keys, such as removal.budget. Raises ValidationError."""
        sections: dict[str, dict[str, JsonValue]] = {}
        for key, value in values.items():
            section, _, name = key.partition(".")
            sections.setdefault(section, {})[name] = value
        changed = {
            name: type(section := getattr(self, name)).model_validate({**dict(section), **given})
            for name, given in sections.items()
        }
        return self.model_copy(update=changed)

    @model_validator(mode="after")
    def _space_fits_the_keys(self) -> Self:
        wrong: list[str] = []
        for key, distribution in self.search.space.items():
            section, _, name = key.partition(".")
            where = f"search.space.{key}"
            if section in RunFile.model_fields and section not in SEARCHED:
                wrong.append(
                    f"{where}: a search varies keys of {', '.join(SEARCHED)} only; trials that differ in {section} "
                    "could not be compared"
                )
                continue
            if key not in (known := [k for k in known_keys(RunFile) if k.partition(".")[0] in SEARCHED and "." in k]):
                wrong.append(f"{where}: {unknown_key(key, known)}")
                continue
            for value in distribution.examples:
                try:
                    self.with_values({key: value})
                except ValidationError as error:
                    own = getattr(self, section)
                    (complaint,) = complaints(error, own.model_dump(mode="json") | {name: value}, type(own))
                    wrong.append(f"{where}: {section}.{complaint}")
                    break
        if wrong:
            raise ValueError("; ".join(wrong))
        return self

    @model_validator(mode="after")
    def _model_fits_the_data(self) -> Self:
        if self.data.source != "digits":
            missing = [key for key in ("factory", "channels", "image_size") if key not in self.model.model_fields_set]
            if missing:
                keys = ", ".join(f"model.{key}" for key in missing)
                raise ValueError(
                    f"{keys} {'has' if len(missing) == 1 else 'have'} to be set "
                    f"where data.source is {self.data.source}: the defaults are made for digits"
                )
        if (
            self.model.weights is not None
            and self.data.source in ("parquet", "folder")
            and self.data.validation is None
        ):
            raise ValueError(
                "model.weights is set without data.validation: a validation set the model has not seen is required"
            )
        return self


class JobFile(RunFile):
    """A run file with the sections `job` and `gate`; `run.path` is the job's folder, in which its runs have theirs."""

    job: Job
    gate: Gate = Gate()
    results: Results = Results(cleaned="manifest")
    """As in a run file, but manifest by default: each run of the job would else leave a copy of the data behind."""

    @model_validator(mode="before")
    @classmethod
    def _name_job_name_where_job_is_missing(cls, given: object) -> object:
        return {**given, "job": {}} if isinstance(given, Mapping) and given.get("job") is None else given

    def run_file(self, **sections: Section) -> RunFile:
        """The run file of one run of the job; `sections` replace those of the job file."""
        own = {key: getattr(self, key) for key in RunFile.model_fields}
        return RunFile.model_construct(None, **{**own, **sections})


_File = TypeVar("_File", bound=RunFile)


def load(path: str | Path | None, overrides: Sequence[str] = ()) -> RunFile:
    """The validated run file at `path`, or the embedded digits run for None, with `overrides` applied.

    An override is `section.key=value`, its value read as YAML. Raises ConfigError, with all that is wrong in
    one sentence.
    """
    return _loaded(RunFile, path, overrides)


def load_job(path: str | Path, overrides: Sequence[str] = ()) -> JobFile:
    """The validated job file at `path`, as `load` does."""
    return _loaded(JobFile, path, overrides)


def load_either(path: str | Path | None, overrides: Sequence[str] = (), *, given_by: str = "--set") -> RunFile:
    """The validated run file at `path`, as `load` does; a JobFile where it has a section `job`.

    `given_by`: what complaints call the overrides.
    """
    return _loaded(None, path, overrides, given_by)


@overload
def _loaded(kind: type[_File], path: str | Path | None, overrides: Sequence[str]) -> _File: ...
@overload
def _loaded(kind: None, path: str | Path | None, overrides: Sequence[str], given_by: str) -> RunFile: ...
def _loaded(
    kind: type[RunFile] | None, path: str | Path | None, overrides: Sequence[str], given_by: str = "--set"
) -> RunFile:
    raw = {} if path is None else _read(Path(path))
    for override in overrides:
        _override(raw, override, given_by)
    if kind is None:
        kind = JobFile if "job" in raw else RunFile
    try:
        return kind.model_validate(raw)
    except ValidationError as error:
        where = " and ".join([str(path)] * (path is not None) + [given_by] * bool(overrides))
        raise ConfigError(f"{where}: {'; '.join(complaints(error, raw, kind))}") from None


def dump(runfile: RunFile) -> str:
    """The run file as YAML with every key, which `load` reads back unchanged."""
    return yaml.dump(runfile.model_dump())


def schema(kind: type[RunFile] = RunFile) -> dict[str, Any]:
    """The JSON schema of a run file (or job file), for editors and checks: types, bounds, defaults, meanings."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **kind.model_json_schema()}


def differences(a: RunFile, b: RunFile) -> list[str]:
    """The keys in which two run files differ, as `key: old -> new`; empty where they are the same."""
    return list(_changes(a.model_dump(), b.model_dump()))


def _read(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as stream:
            content = stream.read(MAX_BYTES + 1)
        text = content.decode("utf-8-sig")
    except FileNotFoundError:
        raise ConfigError(f"{path}: there is no such run file; without one, the embedded digits run is taken") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: a run file is YAML in UTF-8, and this is not UTF-8 text") from None
    except OSError as error:
        raise ConfigError(f"{path}: the run file cannot be read: {error.strerror}") from None
    if len(content) > MAX_BYTES:
        raise ConfigError(f"{path}: is larger than {MAX_BYTES:,} bytes; a run file is a page of YAML, name that one")
    raw = yaml.load(text, where=str(path))
    if not isinstance(raw, dict):
        raise ConfigError(
            f"{path}: a run file is a mapping with sections such as data: and model:, and this is not one"
        )
    return raw


def _override(raw: dict[str, Any], override: str, given_by: str) -> None:
    """Set one key of the nested mapping `raw`, in place."""
    key, sign, value = override.partition("=")
    *sections, last = (part.strip() for part in key.split("."))
    if not sign or not all([*sections, last]):
        raise ConfigError(f"{given_by} {override}: should be section.key=value, as in removal.budget=0.03")
    target = raw
    for section in sections:
        if target.get(section) is None:
            target[section] = {}
        target = target[section]
        if not isinstance(target, dict):
            raise ConfigError(f"{given_by} {override}: {section} is a value, it has no keys beneath it")
    target[last] = yaml.load(value, where=f"{given_by} {override}")


def _changes(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key in dict.fromkeys([*old, *new]):
        before, after = (shown(side[key]) if key in side else "(not set)" for side in (old, new))
        if isinstance(old.get(key), Mapping) and isinstance(new.get(key), Mapping):
            yield from _changes(old[key], new[key], f"{prefix}{key}.")
        elif key not in old or key not in new or old[key] != new[key]:
            yield f"{prefix}{key}: {before} -> {after}"
