"""Commands that turn text into training data: `data prepare`."""

from __future__ import annotations

import os
from pathlib import Path


def prepare(
    input: list[Path],
    out: Path,
    tokenizer: str = "default",
    val: list[Path] | None = None,
    val_fraction: float = 0.0,
    workers: int | None = None,
) -> None:
    """Turn text files (.txt, .jsonl, .parquet, also .gz, .xz, .zst) into a data directory of token shards.

    Args:
        input: Text files: a .txt is one document, a .jsonl line or .parquet row has one in "text".
        out: The data directory to make.
        tokenizer: default, bytes, a tokenizer.json, a SentencePiece .model, or a Hugging Face name.
        val: Files of validation text.
        val_fraction: Instead of `val`: the part of the documents, 0 to 1, that is held out; a document's hash decides.
        workers: Processes; one a core if left out.
    """
    from spherelm.data.prepare import prepare as run_preparation

    processes = workers or os.cpu_count() or 1
    manifest = run_preparation(input, out, tokenizer, val, val_fraction, processes, progress=True)
    for split, counts in manifest["splits"].items():
        print(f"{split}: {counts['documents']:,} documents, {counts['tokens']:,} tokens")
