"""What the user can mend. The command line says these errors in one line, with exit code 2; all others keep their traceback."""

from __future__ import annotations


class UserError(ValueError):
    """Something asked for cannot be. The message is one line that names the value and what to do."""


class NotFoundError(UserError, FileNotFoundError):
    """A file or directory that is needed is not there."""


class OutputExistsError(UserError, FileExistsError):
    """Something stands where the output should go."""


class StorageError(UserError, OSError):
    """The system did not let us read, write or go on."""
