"""The sections `job` and `gate` of a job file: scheduled retraining."""

from __future__ import annotations

import re

from pydantic import Field, field_validator

from posttrain.config.section import Section, Text


class Job(Section):
    """A job that keeps a model up to date; a scheduler starts it again and again."""

    name: Text
    """Name of the registered model in MLflow that gets a new version from each promoted run. The alias `champion` names
    the version in use."""
    lock_lease_s: float = Field(default=120, ge=1)
    """Seconds after which the lock of a run of this job counts as abandoned, if that run no longer renews it."""
    lock_wait_s: float = Field(default=0, ge=0)
    """Seconds to wait for the lock while another run of this job holds it. 0: fail immediately."""

    @field_validator("name")
    @classmethod
    def _name_fits_the_registry(cls, name: str) -> str:
        if re.search("[/:%'\"\\s]", name):
            raise ValueError("should be a name without / : % quotes and spaces")
        return name


class Gate(Section):
    """What a new model, the challenger, must achieve to replace the champion.

    Both are measured on the test set or, without one, on the validation set.
    """

    margin: float = Field(default=0.0, ge=-1, le=1)
    """Accuracy that the challenger must gain over the champion, as a share (0.01 is one percentage point). Negative:
    the loss that is accepted."""
    class_drop: float = Field(default=0.05, ge=0, le=1)
    """Largest accepted loss of accuracy in any one class, as a share."""
    class_samples: int = Field(default=20, ge=1)
    """Classes with fewer held-out samples than this are not checked one by one."""
    alarm_share: float = Field(default=0.5, gt=0, le=1)
    """If more than this share of a new file's labels look wrong, the file is held back and the run is an alarm."""
    alarm_samples: int = Field(default=20, ge=1)
    """Files with fewer new samples than this are checked together instead of one by one; with fewer in total, there is
    no alarm."""
    alarm_older_share: float = Field(default=0.2, gt=0, le=1)
    """If the run removes or relabels more than this share of the samples that previous runs kept, the run is an
    alarm."""
