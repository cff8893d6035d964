"""A byte-level BPE learned from one's own text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from spherelm.data.cutting import Cutter
from spherelm.data.documents import input_files, read_blocks
from spherelm.data.output import whole_directory
from spherelm.data.rows import Bad, RowSettings
from spherelm.data.tokenizer import ByteTokenizer, JsonTokenizer
from spherelm.errors import UserError

END = "<|endoftext|>"

LARGEST_VOCABULARY = 2**24
"""Entries of the largest tokenizer; the trainer reserves memory for all of them at once."""


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> JsonTokenizer:
    """A byte-level BPE of `vocab_size` entries learned from `texts`: lossless on any text, the end of a text is id 0.

    Raises ValueError for fewer entries than bytes, or more than the texts have pairs to merge.
    """
    if vocab_size < 257:
        raise UserError(f"vocab_size must be at least 257 (the bytes and the end token), got {vocab_size}")
    if vocab_size > LARGEST_VOCABULARY:
        raise UserError(f"vocab_size must be at most {LARGEST_VOCABULARY}, got {vocab_size}")
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() < vocab_size:
        raise UserError(
            f"the text gives only {tokenizer.get_vocab_size()} tokens, not {vocab_size}: lower --vocab-size or give more text"
        )
    return JsonTokenizer(tokenizer.to_str().encode("utf-8"), f"bpe{vocab_size}", END)


def train_on_files(
    inputs: Sequence[Path], out: Path, vocab_size: int, rows: RowSettings = RowSettings()
) -> JsonTokenizer:
    """Train a tokenizer on files, directories or patterns, and write it as the directory `out`,
    which `load_tokenizer` reads.

    rows: which field of a row holds its text. Raises what `train_tokenizer` and `data.documents` do,
    and FileExistsError.
    """
    files = [file for path in inputs for file in input_files(path)]
    if not files:
        raise UserError("no input files: give at least one with --input")
    with whole_directory(out) as part:
        tokenizer = train_tokenizer(_texts(files, rows), vocab_size)
        tokenizer.save(part)
    return tokenizer


def _texts(files: Sequence[Path], rows: RowSettings) -> Iterator[str]:
    """The documents of files, long ones in pieces: the library holds some hundred at a time."""
    cutter = Cutter(ByteTokenizer())
    for path in files:
        for block in read_blocks(path, cutter=cutter, rows=rows, block_size=1 << 20):
            yield from (text for text in block.texts if not isinstance(text, Bad))
