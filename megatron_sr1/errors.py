"""Errors that a user can act on: what came, what was expected, what to do.

They are raised at the borders (command line, files, engine); inside the house it is `assert`.
The command line prints one as a single line and exits non-zero, without a traceback.
"""


class SR1Error(Exception):
    """Base of all errors that a user can mend."""


class ConfigError(SR1Error):
    """A configuration key or value that cannot be used."""


class DataError(SR1Error):
    """A sample, shard or source file that cannot be read; names the file and the sample.

    Attributes:
        kind: the fault without names and numbers, by which reports count; may be empty.
    """

    def __init__(self, message: str, kind: str = "") -> None:
        """Take the message and the kind."""
        super().__init__(message)
        self.kind = kind


class CheckpointError(SR1Error):
    """A checkpoint that is absent, incomplete or does not fit the model."""


class EngineError(SR1Error):
    """The rollout engine refused a request, died, or disagrees with the actor."""


class GradingError(SR1Error):
    """A grader broke; it names the sample and never scores 0."""


class GradingLimit(GradingError):
    """A comparison ran out of its time or memory; the sample stays ungraded."""
