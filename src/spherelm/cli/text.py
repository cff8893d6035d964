"""Commands that turn text into training data: `data prepare`, `tokenizer`, `convert`, `pairs`, `verify`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Literal

from spherelm.cli.flags import Given
from spherelm.cli.parser import POSITIONAL, Fields, Needs
from spherelm.counting import counted
from spherelm.errors import UserError

RowFlags = Annotated[Given, Fields("spherelm.data.rows.RowSettings", "field", "skip_bad")]
OF_DATASET = dict.fromkeys(("config", "split", "limit"), Needs("--hf"))
DatasetFlags = Annotated[Given, Fields("spherelm.data.hub.HubRequest", *OF_DATASET, needs=OF_DATASET,
                                       called={"config": "hf_config", "split": "hf_split"})]  # fmt: skip
PairFlags = Annotated[Given, Fields("spherelm.data.pairs.PairSettings", "vocab_size", "tokenizer", "max_tokens",
                                    needs={"vocab_size": Needs(without=["--tokenizer"])})]  # fmt: skip


def prepare(
    *,
    out: Path,
    input: tuple[Path, ...] = (),
    hf: str | None = None,
    dataset: DatasetFlags,
    rows: RowFlags,
    tokenizer: str = "default",
    val: tuple[Path, ...] = (),
    val_fraction: Annotated[float, Needs(without=["--val"])] = 0.0,
    deduplicate: bool = False,
    workers: int | None = None,
    quiet: bool = False,
) -> None:
    """Turn text files (.txt, .md, .jsonl, .json, .csv, .tsv, .parquet) or a dataset into a data
    directory of token shards.

    Example: spherelm data prepare --input books/*.txt --val-fraction 0.05 --out data/books

    Args:
        out: The data directory to create.
        input: Text files, directories of them, or patterns. A .txt or .md file is one document; in other
            files each row is one.
        hf: A dataset to stream: its name on the Hugging Face hub (NAME@REVISION for one revision), a folder or a file.
        tokenizer: default, bytes, a tokenizer.json, a SentencePiece .model, or a Hugging Face name.
        val: Files of validation text.
        val_fraction: Instead of --val: the fraction of the documents, 0 to 1, that is held out, chosen by hash. Of a
            single .txt file it is the end.
        deduplicate: Keep only the first of all documents with the same text.
        workers: Processes; one per core if left out.
        quiet: Show no progress.
    """
    from spherelm.data.hub import HubRequest
    from spherelm.data.prepare import prepare as run_preparation
    from spherelm.data.rows import RowSettings

    how = RowSettings(**rows)
    hub = None if hf is None else HubRequest(hf, column=how.field, **dataset)
    processes = workers or os.cpu_count() or 1
    manifest = run_preparation(
        input,
        out,
        tokenizer,
        val,
        val_fraction,
        processes,
        progress=not quiet,
        hub=hub,
        deduplicate=deduplicate,
        rows=how,
    )
    _say_what_was_made(manifest)


def _say_what_was_made(manifest: dict[str, Any]) -> None:
    for source in manifest.get("inputs", []):
        begin, end = source.get("characters", (0, 0))
        if end is None:
            print(f"{source['name']} is one document: from character {begin:,} on it is the validation text")
    for split, counts in manifest["splits"].items():
        print(f"{split}: {counted(counts['documents'], 'document')}, {counted(counts['tokens'], 'token')}")
    if left_out := manifest.get("left_out"):
        print("left out: " + ", ".join(f"{count:,} {reason}" for reason, count in left_out.items()))
    if count := manifest.get("unsafe_cuts"):
        print(
            f"{counted(count, 'cut')} within long stretches of text that have no safe place: the tokens there may differ "
            "from those of the whole text"
        )


def tokenizer(
    *,
    out: Path,
    input: tuple[Path, ...] = (),
    vocab_size: int = 32768,
    rows: RowFlags,
) -> None:
    """Train a byte-level BPE on text files, as a directory that --tokenizer takes.

    Example: spherelm data tokenizer --input books/*.txt --vocab-size 32768 --out data/bpe

    Args:
        out: The directory to create.
        input: Text files, directories of them, or patterns, as for data prepare. A few hundred megabytes are enough.
        vocab_size: Entries, including the end token.
    """
    from spherelm.data.bpe import train_on_files
    from spherelm.data.rows import RowSettings

    train_on_files(input, out, vocab_size, RowSettings(**rows))
    print(f"a tokenizer of {vocab_size:,} entries is in {out}: prepare with --tokenizer {out}")


def convert(*, data: str, out: Path, format: Literal["nanogpt", "llmc", "megatron"]) -> None:
    """Write prepared tokens as files that another program reads.

    Example: spherelm data convert --data data/books --format nanogpt --out data/nanogpt

    Args:
        data: A data directory, or another program's token files with their tokenizer, as for train --data.
        out: The directory to create.
        format: Which program's format: nanoGPT's, llm.c's (modded-nanogpt reads it too) or Megatron's.
    """
    from spherelm.data.convert import convert as run_conversion

    counts = ", ".join(f"{split} {count:,} tokens" for split, count in run_conversion(data, out, format).items())
    print(f"{out}: {counts}")


def pairs(
    *,
    source: Path,
    target: Path,
    val_source: Path,
    val_target: Path,
    out: Path,
    settings: PairFlags,
) -> None:
    """Turn parallel text files, matched line by line, into a data directory for encoder-decoders.

    Example: spherelm data pairs --source a.en --target a.de --val-source b.en --val-target b.de --out data/en-de

    Args:
        source: File of source texts, one per line; any name, also .gz, .xz, .bz2, .zst.
        target: File of target texts, one per line.
        val_source: File of source texts for validation.
        val_target: File of target texts for validation.
        out: The data directory to create.
    """
    from spherelm.data.pairs import PairFiles, PairSettings, prepare_pairs

    train, val = PairFiles(source, target), PairFiles(val_source, val_target)
    manifest = prepare_pairs(train, out, val, PairSettings(**settings))
    for split, counts in manifest["splits"].items():
        out_of = counts["left_out"]
        print(
            f"{split}: {counted(counts['pairs'], 'pair')}, {counts['source_tokens']:,} and "
            f"{counted(counts['target_tokens'], 'token')}, the "
            f"longest text {counts['longest']}; left out: {out_of['blank']:,} blank, {out_of['too_long']:,} too long"
        )


def verify(*, directories: Annotated[tuple[Path, ...], POSITIONAL]) -> None:
    """Read data directories completely and compare every file with its stored sha256.

    Example: spherelm data verify data/books

    Args:
        directories: Data directories made by `spherelm data prepare` or `spherelm data pairs`.
    """
    from spherelm.data.verification import verify as run_verification

    damaged = []
    for directory in directories:
        try:
            tokens = run_verification(directory)
        except (ValueError, OSError) as error:
            damaged.append(str(error))
        else:
            counts = ", ".join(f"{split} {count:,} tokens" for split, count in tokens.items())
            print(f"{directory}: as it was prepared ({counts})")
    if damaged:
        raise UserError("; and ".join(damaged))
