"""Errors that the user can fix. The command line prints them in one line, with exit code 2;
others keep their traceback.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path
from typing import Any


class UserError(ValueError):
    """A request that cannot be met. The message is one line that names the value and what to do."""


class NotFoundError(UserError, FileNotFoundError):
    """A file or directory that is needed is not there."""


class OutputExistsError(UserError, FileExistsError):
    """Something stands where the output should go."""


class StorageError(UserError, OSError):
    """The system did not let us read, write or continue."""


def nearest(name: str, among: Iterable[str], said: str = " (did you mean {!r}?)") -> str:
    """A suggestion for an unknown name: the closest `among` the known names, formatted by `said`;
    "" if none is close.
    """
    lowered = {one.lower(): one for one in among}
    near = get_close_matches(name.lower(), lowered, 1, 0.7)
    return said.format(lowered[near[0]]) if near else ""


def beside(path: Path) -> str:
    """What is said behind a path that does not exist: the one in the same directory that it may stand for, if any."""
    there = (one.name for one in path.parent.glob("*"))
    return nearest(path.name, there, f" (did you mean {path.parent}/{{}}?)".replace(" ./", " "))


def read_text(path: Path, instead: str) -> str:
    """The UTF-8 text of a file that the user names; else a `UserError`. instead: what to do then."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (byte {error.start}): convert it, or {instead}") from error
    except FileNotFoundError:
        raise NotFoundError(f"no file {path}{beside(path)}: {instead}") from None
    except IsADirectoryError:
        raise UserError(f"{path} is a directory: {instead}") from None


def read_object(path: Path, fix: str) -> dict[str, Any]:
    """The JSON object in a file of ours; else a `UserError`, which ends with the `fix`."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}): {fix}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} holds a {type(value).__name__} where an object was expected: {fix}")
    return value


def unknown(kind: str, name: object, among: Iterable[str]) -> UserError:
    """The error of a `name` that is none of those in `among`; kind: the kind of thing that it names."""
    return UserError(f"unknown {kind} {name!r}{nearest(str(name), among)}: choose one of {', '.join(among)}")
