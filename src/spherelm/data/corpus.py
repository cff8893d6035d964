"""The text that ships with the package: public-domain books, split into train and val by author."""

from __future__ import annotations

import fcntl
import hashlib
import importlib.resources
import json
import lzma
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from spherelm.data.plan import FORMAT
from spherelm.data.prepare import prepare
from spherelm.data.shards import MANIFEST_FILE, SPLITS, Split
from spherelm.data.tokenizer import load_tokenizer
from spherelm.errors import StorageError, UserError


def shipped_documents(split: Split) -> Iterator[dict[str, Any]]:
    """The shipped books of "train" or "val", one at a time: {"id", "title", "author", "year", "text"}."""
    with importlib.resources.as_file(_resource(split)) as path, lzma.open(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)


def shipped_directory(cache: Path | None = None) -> Path:
    """The shipped text as a data directory (shipped tokenizer), prepared on first use (about ten seconds).

    `cache`: where to keep it; by default $SPHERELM_CACHE, $XDG_CACHE_HOME/spherelm or ~/.cache/spherelm. The name
    holds the hash of text and tokenizer, so another version of the package makes its own. Any number of processes may
    ask at once. Raises OSError when the cache cannot be written.
    """
    cache = (cache or _default_cache()).expanduser()
    directory = cache / f"shipped-{_content_hash()[:16]}"
    if (directory / MANIFEST_FILE).is_file():
        return directory
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"cannot make the cache {cache} ({error.strerror}): set SPHERELM_CACHE") from error
    with _one_at_a_time(cache / f".{directory.name}.lock"):
        if not (directory / MANIFEST_FILE).is_file():
            _prepare_into(directory)
    return directory


def _prepare_into(directory: Path) -> None:
    """Prepare beside `directory` and rename: right even where locks do not work and two processes come here."""
    temporary = directory.with_name(f".{directory.name}.{uuid.uuid4().hex[:12]}.tmp")
    try:
        with ExitStack() as stack:
            train, val = (stack.enter_context(importlib.resources.as_file(_resource(split))) for split in SPLITS)
            # One process: a caller's script may lack the `__main__` guard that more would need.
            prepare([train], temporary, "default", val=[val], workers=1, progress=True)
        try:
            temporary.rename(directory)
        except OSError:
            if not (directory / MANIFEST_FILE).is_file():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def _one_at_a_time(path: Path) -> Iterator[None]:
    """Wait for whoever else holds `path`. Some network file systems have no locks; then the rename has to do."""
    with open(path, "a") as file:
        with suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _resource(split: Split) -> Any:
    if split not in SPLITS:
        raise UserError(f"unknown split {split!r}: 'train' or 'val'")
    return importlib.resources.files("spherelm.data") / "shipped" / f"{split}.jsonl.xz"


def _content_hash() -> str:
    digest = hashlib.sha256(f"{FORMAT} {load_tokenizer('default').fingerprint}".encode())
    for split in SPLITS:
        digest.update(hashlib.sha256(_resource(split).read_bytes()).digest())
    return digest.hexdigest()


def _default_cache() -> Path:
    if own := os.environ.get("SPHERELM_CACHE"):
        return Path(own)
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base) / "spherelm"
    return Path.home() / ".cache" / "spherelm"
