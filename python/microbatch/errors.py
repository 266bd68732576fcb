"""What the library raises. torch's own exceptions and those of your code pass through as they are."""

import torch


class Error(RuntimeError):
    """Base of all others. The text says what was wrong, where, and what to do."""


class UsageError(Error, ValueError):
    """A setting or an argument is wrong: change it and call again."""


class DoesNotFit(Error, torch.OutOfMemoryError):
    """No micro-batch is small enough for the memory; everything is as before the step."""


class Stopped(Error):
    """The run was stopped because its steps went bad."""


class BadData(Error):
    """A file or a state is missing, truncated, or not what it says it is."""


class NotWritten(Error, OSError):
    """A file could not be written: disk full, no permission."""


class LostRank(Error):
    """Another process of the run has ended, hangs, or cannot be reached; the text names it."""
