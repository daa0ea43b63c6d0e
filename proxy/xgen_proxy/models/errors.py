"""What can be wrong with a model, a file or a disk, as one sentence that says what to do."""

from __future__ import annotations


class ModelError(Exception):
    """Its text is the whole message for the user. `status` is the command's exit status."""

    status = 1


class ModelFileError(ModelError):
    """A file that is no model, or is damaged."""


class UsageError(ModelError):
    """The command cannot start: an argument is wrong, or something is not installed."""

    status = 2
