"""The errors that posttrain raises, by what the caller can do about them.

`InputError` and its subclasses: the input has to change; nothing was done (exit code 2). All others: the work had begun
and failed (exit code 1).
"""


class PosttrainError(Exception):
    """A failure explained in one sentence: what, where, and the way out."""

    exit_code = 1


class InputError(PosttrainError):
    """The input cannot be used."""

    exit_code = 2


class ConfigError(InputError):
    """The run file, or an override of it, is not valid."""


class DataError(InputError):
    """The data set cannot be read as described."""


class LabelRangeError(DataError):
    """A label lies outside the model's classes."""


class DuplicateIdError(DataError):
    """A sample id occurs more than once, or in two sets that must not share samples."""


class ModelError(InputError):
    """The model cannot be built, or the weights do not fit it."""


class RunFolderError(InputError):
    """The run folder cannot be used, or holds a run with other settings or other data."""


class TrackingError(InputError):
    """The tracking server cannot be used."""


class SingularCurvatureError(PosttrainError):
    """The probe's curvature is not positive definite."""


class StepError(PosttrainError):
    """A step of a round failed after work had begun; the same command again continues."""


class RecipeError(StepError):
    """The step cannot succeed with these settings, however often it is tried."""


class LockedError(PosttrainError):
    """Another process holds the lock on the folder; nothing was done."""
