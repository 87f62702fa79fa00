"""What can go wrong, named by what the caller can do about it.

`InputError` and below: the user's input has to change; nothing was done (exit code 2).
Everything else that posttrain raises on purpose: the work was begun and failed (exit code 1).
"""


class PosttrainError(Exception):
    """A failure that posttrain explains in one sentence: what, where, and the way out."""

    exit_code = 1


class InputError(PosttrainError):
    """Something that the user gave cannot be worked with."""

    exit_code = 2


class ConfigError(InputError):
    """The run file, or an override of it, is not valid."""


class DataError(InputError):
    """The data set cannot be read as described."""


class LabelRangeError(DataError):
    """A label lies outside the model's classes."""


class DuplicateIdError(DataError):
    """The same sample id occurs more than once, or in two sets that must not share samples."""


class ModelError(InputError):
    """The model cannot be built, or the weights do not fit it."""


class RunFolderError(InputError):
    """The run folder holds a run that was made with other settings or other data."""


class TrackingError(InputError):
    """The tracking server cannot be reached or refuses."""


class SingularCurvatureError(PosttrainError):
    """The probe's curvature is not positive definite."""


class StepError(PosttrainError):
    """A step of a round failed after work had begun; starting the same command again goes on."""


class RecipeError(StepError):
    """With these settings the step cannot be done, however often it is tried."""


class LockedError(PosttrainError):
    """Another process holds the lock on the folder; nothing was done."""
