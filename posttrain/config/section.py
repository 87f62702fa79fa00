"""What all sections of a run file have in common, and the types of values that several of them use."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, field_validator


def _without_controls(text: str) -> str:
    if found := re.search(r"[\x00-\x1f\x7f]", text):
        raise ValueError(f"should hold no control character such as {ascii(found[0])[1:-1]}")
    return text


Text = Annotated[str, Field(min_length=1), AfterValidator(_without_controls)]
Paths = Text | Annotated[tuple[Text, ...], Field(min_length=1)]
Positive = Annotated[float, Field(gt=0)]


class Section(BaseModel):
    """Settings that belong together: frozen, and an unknown key is an error."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, validate_default=True, use_attribute_docstrings=True
    )

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_boolean(cls, value: object, info: ValidationInfo) -> object:
        # Python would take true and false for the numbers 1 and 0
        field = cls.model_fields[str(info.field_name)]
        if isinstance(value, bool) and field.annotation is not bool:
            raise ValueError("should not be a boolean (put quotes around a true or false that is meant as text)")
        return value
