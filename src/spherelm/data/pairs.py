"""Parallel text: pairs of a source and a target, a line each in two files, as one directory of token ids.

A directory holds `pairs.json` (what it was made of, counts, hashes), the tokenizer that both sides share,
and for each split a safetensors file: the ids of all sources, concatenated, where each ends, and the same of the
targets. It is read into memory whole: 8 bytes a pair of tokens.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import safetensors
from safetensors.numpy import load_file, save_file

from spherelm.counting import counted
from spherelm.data.bpe import train_tokenizer
from spherelm.data.documents import DocumentError, read_lines
from spherelm.data.output import whole_directory, write_json
from spherelm.data.shards import SPLITS
from spherelm.data.tokenizer import Tokenizer, described, load_tokenizer
from spherelm.errors import NotFoundError, UserError

MANIFEST = "pairs.json"


class PairFiles(NamedTuple):
    """Two text files: line i of the target belongs to line i of the source.
    Names as they come, also .gz, .xz, .bz2, .zst.
    """

    source: Path
    target: Path


class Texts(NamedTuple):
    """The lines of both files, without the pairs that were left out: `left_out`, by reason."""

    source: list[str]
    target: list[str]
    left_out: dict[str, int]


@dataclass(frozen=True)
class PairSettings:
    """How pairs become tokens.

    Attributes:
        vocab_size: Entries of the BPE tokenizer that is trained on both sides of the training pairs.
        tokenizer: Instead of training one: default, bytes, a tokenizer.json, a SentencePiece .model, or a
            Hugging Face name.
        max_tokens: Training pairs with a side longer than this, end token included, are left out.
    """

    vocab_size: int = 8000
    tokenizer: str | None = None
    max_tokens: int = 256

    def __post_init__(self) -> None:
        if self.max_tokens < 2:
            raise UserError(f"max_tokens must be at least 2, got {self.max_tokens}")


@dataclass(frozen=True)
class PairTokens:
    """The pairs of a split: ids int32 [tokens], and where each row ends int64 [pairs]; rows hold no end token."""

    source: npt.NDArray[np.int32]
    source_ends: npt.NDArray[np.int64]
    target: npt.NDArray[np.int32]
    target_ends: npt.NDArray[np.int64]
    fingerprint: str

    def __len__(self) -> int:
        return len(self.source_ends)

    def lengths(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """The tokens of each source and of each target, int64 [pairs]."""
        return np.diff(self.source_ends, prepend=0), np.diff(self.target_ends, prepend=0)

    def row(self, index: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
        """The ids of source and target of the pair `index`."""
        ends = ((self.source, self.source_ends), (self.target, self.target_ends))
        source, target = (ids[(e[index - 1] if index else 0) : e[index]] for ids, e in ends)
        return source, target


def read_texts(files: PairFiles) -> Texts:
    """The pairs in two files; a pair of which a side is blank is left out and counted.

    Raises DocumentError where the files have different numbers of lines, or nothing is left.
    """
    source, target = (read_lines(path) for path in files)
    if len(source) != len(target):
        raise DocumentError(
            f"{files.source} has {counted(len(source), 'line')} and {files.target} {len(target):,}: line i of one "
            "must belong to line i of the other"
        )
    kept = [(s, t) for s, t in zip(source, target, strict=True) if s.strip() and t.strip()]
    if not kept:
        raise DocumentError(f"{files.source} and {files.target} hold no pair with text on both sides")
    return Texts([s for s, _ in kept], [t for _, t in kept], {"blank": len(source) - len(kept)})


def prepare_pairs(
    train: PairFiles, out: Path, val: PairFiles, settings: PairSettings = PairSettings()
) -> dict[str, Any]:
    """Write the pairs of `train` and `val` as the directory `out`, which appears whole or not at all;
    returns its manifest.

    A validation pair that is too long is an error, and so is it if all of those are training pairs.
    Raises DocumentError, ValueError, FileNotFoundError or FileExistsError.
    """
    tokenizer, max_tokens = settings.tokenizer, settings.max_tokens
    with whole_directory(out) as part:
        texts = {"train": read_texts(train), "val": read_texts(val)}
        unseen = set(zip(texts["val"].source, texts["val"].target, strict=True))
        unseen.difference_update(zip(texts["train"].source, texts["train"].target, strict=True))
        if not unseen:
            raise DocumentError(
                f"every pair of {val.source} and {val.target} is in the training text too: name other files"
            )
        both = texts["train"].source + texts["train"].target
        shared = train_tokenizer(both, settings.vocab_size) if tokenizer is None else load_tokenizer(tokenizer)
        shared.save(part)
        splits = {name: _write_split(part, name, texts[name], shared, max_tokens) for name in SPLITS}
        manifest = {
            "spherelm": metadata.version("spherelm"),
            "tokenizer": described(shared),
            "inputs": {name: [path.name for path in files] for name, files in (("train", train), ("val", val))},
            "max_tokens": max_tokens,
            "splits": splits,
        }
        write_json(part / MANIFEST, manifest)
    return manifest


def _write_split(out: Path, name: str, texts: Texts, tokenizer: Tokenizer, max_tokens: int) -> dict[str, Any]:
    """Encode and write a split; returns its entry in the manifest."""
    encoded = list(
        zip(tokenizer.encode_batch(texts.source), tokenizer.encode_batch(texts.target), texts.target, strict=True)
    )
    fits = [row for row in encoded if max(len(row[0]), len(row[1])) < max_tokens]
    too_long = len(encoded) - len(fits)
    if (too_long and name == "val") or not fits:
        longest = max(max(len(source), len(target)) for source, target, _ in encoded) + 1
        raise DocumentError(
            f"longer than {counted(max_tokens, 'token')}: {counted(too_long, f'{name} pair')}, "
            f"the longest has {longest}; raise --max-tokens"
        )
    tensors = {}
    for side, column in (("source", 0), ("target", 1)):
        rows = [row[column] for row in fits]
        tensors[side] = np.array([token for row in rows for token in row], dtype=np.int32)
        tensors[f"{side}_ends"] = np.cumsum([len(row) for row in rows], dtype=np.int64)
    path = out / f"{name}.safetensors"
    save_file(tensors, path)
    return {
        "pairs": len(fits),
        "source_tokens": int(tensors["source_ends"][-1]),
        "target_tokens": int(tensors["target_ends"][-1]),
        "target_bytes": sum(len(text.encode("utf-8")) for _, _, text in fits),
        "longest": max(max(len(source), len(target)) for source, target, _ in fits) + 1,
        "left_out": {**texts.left_out, "too_long": too_long},
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
    }


def holds_pairs(directory: Path) -> bool:
    """Whether `directory` is one that `prepare_pairs` wrote."""
    return (directory / MANIFEST).is_file()


def read_pairs_manifest(directory: Path) -> dict[str, Any]:
    """The content of `pairs.json` in `directory`. Raises FileNotFoundError or ValueError."""
    try:
        manifest: dict[str, Any] = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
        return manifest
    except FileNotFoundError:
        raise NotFoundError(f"{directory} holds no pairs: make them with spherelm data pairs") from None
    except ValueError as error:
        raise UserError(f"{directory / MANIFEST} is damaged ({error}): prepare the pairs again") from error


def open_pairs(directory: Path, split: str) -> PairTokens:
    """The pairs of the split "train" or "val" of `directory`; verified against its hash."""
    entry = read_pairs_manifest(directory)["splits"][split]
    path = directory / f"{split}.safetensors"
    if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != entry["sha256"]:
        raise UserError(f"{path} is missing or damaged: prepare the pairs again")
    try:
        return PairTokens(**load_file(path), fingerprint=entry["sha256"])
    except (safetensors.SafetensorError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error}): prepare the pairs again") from error
