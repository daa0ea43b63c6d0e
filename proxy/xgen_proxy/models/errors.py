"""What can be wrong with a model, a file or a disk, as one sentence that says what to do."""

from __future__ import annotations


class ModelError(Exception):
    """Its text is the whole message for the user."""


class ModelFileError(ModelError):
    """A file that is no model, or is damaged."""
