"""The section `search` of a run file: what `posttrain tune` tries."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BeforeValidator,
    Field,
    JsonValue,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from posttrain.config.section import Positive, Section

SEARCHED = ("probe", "removal", "refine")
"""Sections whose keys a search may vary: trials with other data or another model could not be compared."""


class Distribution(Section):
    """Where a search takes the values of one key from: exactly one of these."""

    choice: Annotated[tuple[JsonValue, ...], Field(min_length=1)] | None = None
    """List of values, all equally likely."""
    uniform: tuple[float, float] | None = None
    """[lowest, highest]: numbers between them, all equally likely."""
    loguniform: tuple[Positive, Positive] | None = None
    """[lowest, highest]: numbers between them whose logarithms are equally likely."""
    integers: tuple[int, int] | None = None
    """[smallest, largest]: whole numbers, both ends included."""

    @property
    def kind(self) -> Literal["choice", "uniform", "loguniform", "integers"]:
        """Name of the key that is set."""
        (kind,) = self.model_fields_set
        return kind  # pyright: ignore[reportReturnType]

    @property
    def examples(self) -> tuple[JsonValue, ...]:
        """Values with which to check type and bounds of the searched key: all choices, or both ends and one between."""
        if self.choice is not None:
            return self.choice
        low, high = self.uniform or self.loguniform or self.integers or (0, 0)
        return (low, high) if self.integers else (low, low + (high - low) * 0.381966, high)

    @model_validator(mode="before")
    @classmethod
    def _exactly_one(cls, given: object) -> object:
        known = isinstance(given, Mapping) and set(given) <= set(cls.model_fields)
        if isinstance(given, Mapping) and known and (len(given) != 1 or None in given.values()):
            raise ValueError(f"should be exactly one of {', '.join(cls.model_fields)}")
        return given

    @model_validator(mode="after")
    def _low_comes_first(self) -> Self:
        if self.choice is None:
            low, high = self.uniform or self.loguniform or self.integers or (0, 0)
            if low >= high:
                raise ValueError(f"should be [lowest, highest], and {low:g} is not below {high:g}")
        return self

    @model_serializer(mode="wrap")
    def _only_the_one_set(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {key: value for key, value in write(self).items() if value is not None}


def _is_section(key: object, given: Mapping[object, object]) -> bool:
    return "." not in str(key) and not set(given) & set(Distribution.model_fields)


def _flattened(value: object) -> object:
    """{removal: {budget: ...}}, which `--set` makes, becomes {removal.budget: ...}."""
    if not isinstance(value, Mapping):
        return value
    flat: dict[object, object] = {}
    for key, given in value.items():
        if isinstance(given, Mapping) and _is_section(key, given):
            flat |= {f"{key}.{name}": distribution for name, distribution in given.items()}
        else:
            flat[key] = given
    return flat


_DEFAULT_SPACE = {
    "removal.score": Distribution(choice=("mislabel_odds", "loo_margin", "parameter", "data")),
    "removal.budget": Distribution(loguniform=(0.02, 0.1)),
    "removal.max_rounds": Distribution(integers=(4, 12)),
    "probe.layers": Distribution(choice=("auto", "last")),
    "probe.l2": Distribution(loguniform=(0.003, 1.0)),
    # not both: it installs its boundary only at the end, so that its rounds look worse than they are
    "refine.scope": Distribution(choice=("head", "network")),
    "refine.learning_rate": Distribution(loguniform=(0.001, 0.03)),
}


class Search(Section):
    """What `posttrain tune` tries: trials, each with other values for some keys of the run file."""

    trials: int = Field(default=8, ge=1)
    """Number of trials. The first is the run file as it is; it is never stopped early."""
    metric: Literal["validation_accuracy", "validation_loss"] = "validation_accuracy"
    """What the best trial is chosen by, on the validation set: highest accuracy, or lowest loss."""
    grace_rounds: int = Field(default=1, ge=1)
    """Rounds that every trial completes before it may be stopped for being worse than others."""
    reduction_factor: float = Field(default=2, ge=2)
    """Asynchronous successive halving: of the trials that reach a milestone, the best 1/reduction_factor continue."""
    max_concurrent_trials: int | None = Field(default=None, ge=1)
    """Largest number of trials that run at the same time. null: as many as the resources allow."""
    space: Annotated[
        dict[str, Distribution],
        Field(min_length=1),
        BeforeValidator(_flattened, json_schema_input_type=dict[str, Distribution]),
    ] = _DEFAULT_SPACE
    """Keys of the sections probe, removal and refine, each with the values to try. Keys that you give replace all the
    default ones."""
