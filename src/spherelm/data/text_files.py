"""Text that is named where a data directory could be: it is prepared beside the run, once."""

from __future__ import annotations

import glob
import os
from pathlib import Path

from spherelm.counting import counted
from spherelm.data.documents import format_of, input_files
from spherelm.data.pairs import holds_pairs
from spherelm.data.prepare import prepare
from spherelm.data.shards import MANIFEST_FILE
from spherelm.errors import NotFoundError, UserError, beside
from spherelm.progress import say

HELD_OUT = 0.1
"""The part of the text that is validated on."""


def prepared(said: str | None, out: Path, tokenizer: Path | None = None) -> str | None:
    """The value of `--data`, or, if it names text files, the data directory prepared from them beside the
    run directory `out`.

    tokenizer: a directory that holds one; the shipped one if left out. Says on stderr what was made. What was made
    before of the same text is taken as it is. Raises `UserError` for what cannot be prepared.
    """
    files = texts_in(said) if said else []
    if not files:
        refuse_missing(said or "")
        return said
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(f"{said} is text, and several processes cannot prepare it: use spherelm data prepare first")
    made = out.with_name(f"{out.name}-data")
    try:
        manifest = prepare(files, made, tokenizer or "default", val_fraction=HELD_OUT)
    except UserError as error:
        raise UserError(f"{error}; spherelm data prepare has more choices") from error
    train, val = (counted(manifest["splits"][split]["tokens"], "token") for split in ("train", "val"))
    say(
        f"{said} is prepared in {made}: {train} for training and {val}, a tenth, for validation, with the "
        f"{'tokenizer of ' + str(tokenizer) if tokenizer else 'default tokenizer'}"
    )
    return str(made)


def texts_in(said: str) -> list[Path]:
    """The files, patterns and directories of text that `said` names, by commas; none where it names anything else."""
    if Path(said).is_dir():
        return [Path(said)] if is_text(Path(said)) else []
    parts = [Path(part) for part in ([said] if Path(said).exists() else said.split(",")) if part]
    named = [part.is_file() or (not part.exists() and bool(glob.glob(str(part), recursive=True))) for part in parts]
    return parts if all(named) else []


def refuse_missing(said: str) -> None:
    """Raise `UserError` where `said` is a file or pattern of text, by its name, and there is none."""
    if said.startswith("stream:"):
        return
    for path in (Path(part) for part in said.split(",") if part and "=" not in part):
        try:
            format_of(path)
        except UserError:
            continue
        if not path.exists():
            raise NotFoundError(f"no file {path}{beside(path)}: give text that is there, or a data directory")


def is_text(directory: Path) -> bool:
    """Whether a directory holds text, and is neither a data directory nor holds any."""
    if holds_pairs(directory) or any(directory.rglob(MANIFEST_FILE)):
        return False
    try:
        return any(format_of(file) != ".json" for file in input_files(directory))  # a tokenizer's is no text
    except UserError:
        return False
