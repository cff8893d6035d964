"""The output directory of `prepare`: one writer at a time, published whole, never mixed with something else."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from spherelm.data.plan import Plan
from spherelm.data.shards import MANIFEST_FILE, PARTIAL_DIRECTORY, ShardError, open_tokens, read_manifest
from spherelm.data.tokenizer import load_tokenizer

STATE_FILE = "state.json"


class OutputExistsError(FileExistsError, ValueError):
    """The output directory holds something else; the message says what to do."""


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
    manifest = read_manifest(out)
    _check_same(out, manifest, plan)
    for split in manifest["splits"]:
        open_tokens(out, split).verify()
    if load_tokenizer(out).fingerprint != plan.tokenizer.fingerprint:
        raise ShardError.about(out, "its tokenizer is not the one its shards were made with")
    shutil.rmtree(out / PARTIAL_DIRECTORY, ignore_errors=True)
    if progress:
        print(f"{out} is already prepared: nothing to do", file=sys.stderr)
    return manifest


def _check_same(directory: Path, manifest: dict[str, Any], plan: Plan) -> None:
    old, new = manifest.get("parameters", {}), plan.parameters()
    different = sorted(key for key in {*old, *new} if old.get(key) != new.get(key))
    if different:
        raise OutputExistsError(
            f"{directory} holds data prepared with another {', '.join(different)}: choose another --out or delete it"
        )


@contextmanager
def appearing(out: Path) -> Iterator[Path]:
    """A new directory to be filled. It becomes `out`, which must not hold anything, when the context ends well.

    It is gone where the context ends otherwise. It stands beside `out`, so that a place where nothing may be written is
    refused at once (`OSError`).
    """
    target = out.resolve()
    part = target.with_name(f".{target.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        yield part
        os.replace(part, target)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def check_new_file(path: Path, flag: str) -> None:
    """`FileExistsError`, `FileNotFoundError` or `PermissionError` where the file that `flag` names cannot be made."""
    if path.exists():
        raise FileExistsError(f"{path} already exists: choose another {flag}")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"no directory {path.parent} for {flag}: make it, or choose another")
    if not os.access(path.parent, os.W_OK):
        raise PermissionError(f"nothing may be written in {path.parent}: choose another {flag}")


def remove_if_useless(partial: Path, out: Path) -> None:
    """After a failure before the first saved state, leave no trace."""
    if partial.is_dir() and not any((partial / name).exists() for name in (STATE_FILE, MANIFEST_FILE)):
        shutil.rmtree(partial)
        if not any(out.iterdir()):
            out.rmdir()


@contextmanager
def locked(partial: Path, out: Path) -> Iterator[None]:
    """Hold `partial` for this process. Raises OutputExistsError while another one does."""
    with open(partial / "lock", "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise OutputExistsError(
                f"another process is preparing {out}: wait for it or choose another --out"
            ) from error
        except OSError:
            pass  # some network file systems have no locks
        yield


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Replace `path` whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(json.dumps(content, indent=1, sort_keys=True) + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
