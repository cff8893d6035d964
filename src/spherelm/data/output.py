"""Directories that commands make: published whole, never mixed with something else;
for `prepare`, one writer at a time.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from spherelm.data.plan import Plan
from spherelm.data.shards import MANIFEST_FILE, PARTIAL_DIRECTORY, ShardError, open_tokens, read_manifest
from spherelm.data.tokenizer import load_tokenizer
from spherelm.errors import NotFoundError, OutputExistsError, StorageError
from spherelm.progress import say

STATE_FILE = "state.json"
PARTIAL_SUFFIX = ".part"
"""The name, or its ending, of a directory that is not complete yet."""


@contextmanager
def whole_directory(out: Path, other: str = "--out") -> Iterator[Path]:
    """A directory to fill, which becomes `out` at the end of the block;
    after a failure, whichever, there is no trace of it.

    Every file in it gets the permissions that the user's umask gives to new files, also those of libraries that write
    under a temporary name, which nobody else may read. Raises `FileExistsError`, asking for another `other`, where
    `out` holds something.
    """
    check_free(out, other)
    out = out.resolve()
    part = out / PARTIAL_SUFFIX if out.is_dir() else out.with_name(f".{out.name}{PARTIAL_SUFFIX}")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        yield part
        permit(part)
        if part.parent == out:
            for path in part.iterdir():
                os.replace(path, out / path.name)
        else:
            os.replace(part, out)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def permit(directory: Path) -> None:
    """Give every file below `directory` the permissions of a new file."""
    new = directory / ".new"
    new.touch()
    mode = stat.S_IMODE(new.stat().st_mode)
    new.unlink()
    for path in directory.rglob("*"):
        if path.is_file():
            path.chmod(mode)


def check_place(out: Path, other: str = "--out") -> None:
    """Raise `OutputExistsError` or `StorageError`, asking for another `other`, where `out` cannot be a directory to
    write in: it is a file or lies below one, or nothing may be written there.
    """
    there = next(path for path in (out, *out.parents, *out.absolute().parents) if os.path.lexists(path))
    if not os.path.isdir(there):
        kind = "a file" if os.path.exists(there) else "a link to nothing"
        raise OutputExistsError(f"{there} is {kind}: choose another {other}")
    if not os.access(there, os.W_OK):
        raise StorageError(f"nothing may be written in {there.absolute()}: choose another {other}")


def check_free(out: Path, other: str = "--out") -> None:
    """Raise as `check_place`, and `OutputExistsError` where `out` holds more than what an interrupted
    `whole_directory` left.
    """
    check_place(out, other)
    if out.exists() and any(path.name != PARTIAL_SUFFIX for path in out.iterdir()):
        raise OutputExistsError(f"{out} already holds something: choose another {other}")


def publish(partial: Path, out: Path, plan: Plan) -> None:
    """Move a whole data directory from `partial` to `out`, the manifest last; may be interrupted and repeated."""
    manifest = read_manifest(partial)
    _check_same(partial, manifest, plan)
    shards = [entry["file"] for split in manifest["splits"].values() for entry in split["shards"]]
    for name in [*shards, *(path.name for path in partial.glob("tokenizer*")), MANIFEST_FILE]:
        if (partial / name).exists():
            os.replace(partial / name, out / name)
    shutil.rmtree(partial)


def finished(out: Path, plan: Plan, progress: bool) -> dict[str, Any]:
    """The manifest of `out`, if it is what `plan` would write and undamaged."""
    _check_same(out, read_manifest(out), plan)
    manifest = verify_tokens(out)
    shutil.rmtree(out / PARTIAL_DIRECTORY, ignore_errors=True)
    if progress:
        say(f"{out} is already prepared: nothing to do")
    return manifest


def verify_tokens(directory: Path) -> dict[str, Any]:
    """The manifest of a directory of token shards, every one read and compared;
    ShardError for one that is not what it was.
    """
    manifest = read_manifest(directory)
    fingerprint = load_tokenizer(directory).fingerprint
    for split in manifest["splits"]:
        tokens = open_tokens(directory, split)
        tokens.verify()
        if tokens.tokenizer_fingerprint != fingerprint:
            raise ShardError.about(directory, "its tokenizer is not the one its shards were made with")
    return manifest


def _check_same(directory: Path, manifest: dict[str, Any], plan: Plan) -> None:
    old, new = manifest.get("parameters", {}), plan.parameters()
    different = sorted(key for key in {*old, *new} if old.get(key) != new.get(key))
    if different:
        raise OutputExistsError(
            f"{directory} holds data prepared with another {', '.join(different)}: choose another --out or delete it"
        )


def check_new_file(path: Path, flag: str) -> None:
    """`FileExistsError`, `FileNotFoundError` or `PermissionError` where the file that `flag` names cannot be made."""
    if path.exists():
        raise OutputExistsError(f"{path} already exists: choose another {flag}")
    if not os.path.lexists(path.parent):
        raise NotFoundError(f"no directory {path.parent} for {flag}: make it, or choose another")
    check_place(path.parent, flag)


def remove_if_useless(partial: Path, out: Path) -> None:
    """After a failure before the first saved state, leave no trace."""
    if partial.is_dir() and not any((partial / name).exists() for name in (STATE_FILE, MANIFEST_FILE)):
        shutil.rmtree(partial)
        if not any(out.iterdir()):
            out.rmdir()


@contextmanager
def locked(path: Path, busy: str) -> Iterator[None]:
    """Hold the file `path`, which is made for it and removed at the end, for this process;
    the hold ends with the process.

    Raises OutputExistsError, with the text `busy`, while another process holds it.
    """
    with open(path, "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise OutputExistsError(busy) from error
        except OSError:
            pass  # some network file systems have no locks
        if not (path.exists() and os.path.samestat(path.stat(), os.fstat(file.fileno()))):
            raise OutputExistsError(busy)  # the one that held it was just about to end, and has removed it
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def _finite(value: Any) -> Any:
    """`value` with every number that JSON cannot write (NaN, infinities) as `None`."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path: Path, value: Any) -> None:
    """Write `value` to `path`, whole or not at all, on the disk when this returns; NaN and infinities become null."""
    part, text = path.with_name(f".{path.name}.part"), json.dumps(_finite(value), indent=2, allow_nan=False)
    with open(part, "w", encoding="utf-8") as file:
        file.write(text + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)
