"""The only errors that a user's mistake raises.

The command line turns each into one line on stderr and exit status 2, so a message must stand alone: what is wrong,
where, the value seen, and what to do. Broken invariants of our own are `assert`s and keep their traceback.
"""


class SparsecodError(ValueError):
    """Base of all errors that are the user's to fix; its text is the one line they read."""


class ConfigError(SparsecodError):
    """A configuration key, value or combination that cannot run."""


class DataError(SparsecodError):
    """Text, token files or tokenizers that are missing, damaged or do not fit the model."""


class CheckpointError(SparsecodError):
    """A checkpoint that is missing, damaged or belongs to another model."""


class ConversionError(SparsecodError):
    """A model that the other format cannot express, or whose conversion does not reproduce its outputs."""


def first_line(error: BaseException) -> str:
    """What a library's error says, short enough for a line of ours."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
