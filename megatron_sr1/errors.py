"""Errors that a user can act on: what came, what was expected, what to do.

They are raised at the boundaries (command line, files, engine); internal checks use `assert`. The
command line prints the message as one line, without a traceback, and exits non-zero.
"""


class SR1Error(Exception):
    """Base class of all errors that a user can fix."""


class ConfigError(SR1Error):
    """A configuration key or value that cannot be used."""


class DataError(SR1Error):
    """A sample, shard or source file that cannot be read; names the file and the sample."""


class CheckpointError(SR1Error):
    """A checkpoint that is missing, incomplete or does not fit the model."""


class EngineError(SR1Error):
    """The rollout engine rejected a request, died, or disagrees with the actor."""


class GradingError(SR1Error):
    """The grader failed; names the sample, which is not scored as 0."""


class GradingLimit(GradingError):
    """A comparison exceeded its time or memory limit; the sample is not graded."""
