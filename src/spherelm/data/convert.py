"""Prepared tokens in the files of another program."""

from __future__ import annotations

from pathlib import Path

from spherelm.data.output import whole_directory
from spherelm.data.shards import SPLITS
from spherelm.data.sources import Prepared, parse_data
from spherelm.data.token_files import WRITERS
from spherelm.errors import UserError


def convert(data: str, out: Path, kind: str) -> dict[str, int]:
    """Write the tokens that `data` names, as for `parse_data`, as the directory `out`;
    the number of tokens of each split.

    kind: one of `WRITERS`. The tokenizer is written beside them. Raises UserError where `data` is not one text, or what
    opening it raises, and FileExistsError.
    """
    source = parse_data(data)
    if not isinstance(source, Prepared) or len(source.weights()) != 1:
        raise UserError(f"{data!r} is not one data directory: name a data directory, or token files of another program")
    (path,), counts = source.weights(), dict[str, int]()
    with whole_directory(out) as part:
        for split in SPLITS:
            if split == "train" or source.has_val(path):
                tokens = source.text(path, split)
                WRITERS[kind](part, tokens)
                counts[split] = len(tokens)
        source.tokenizer_of(path).save(part)
    return counts
