"""From blocks of documents to token ids, in this process or in several; the ids are the same either way."""

from __future__ import annotations

import hashlib
import itertools
import multiprocessing
import os
import signal
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from spherelm.data.cutting import Cutter, Piece
from spherelm.data.documents import Block
from spherelm.data.rows import Bad
from spherelm.data.shards import Ids, Split, token_dtype
from spherelm.data.tokenizer import Tokenizer, load_tokenizer
from spherelm.errors import StorageError, UserError
from spherelm.third_parties import silence

_GROUP = 1 << 20  # characters encoded in one call: bounds what the libraries hold per token


@dataclass(frozen=True)
class EncodingJob:
    """A block and where its documents go: the split, or by their hash when it is None.
    `source`: number of the input.
    """

    source: int
    block: Block
    split: Split | None


@dataclass(frozen=True)
class Encoded:
    """The result of a job: ids with end tokens and UTF-8 bytes of text by split; the number of documents, and of what
    was left out by reason.

    `unsafe_cuts`: how many places were cut that are not safe. `starts`, `ends`, `after`: as in its block.
    When asked for, by split and document: `digests`, the first 16 bytes of the text's sha256, and `sizes`, its UTF-8
    bytes.
    """

    source: int
    read_bytes: int
    ids: dict[Split, Ids]
    text_bytes: dict[Split, int]
    documents: int
    left_out: dict[str, int]
    unsafe_cuts: int = 0
    starts: bool = True
    ends: bool = True
    after: dict[str, Any] | None = None
    digests: dict[Split, list[bytes]] = field(default_factory=dict)
    sizes: dict[Split, list[int]] = field(default_factory=dict)


def split_of(digest: str, val_fraction: float) -> Split:
    """The split of the document with this sha256 (hex): "val" for `val_fraction` of all hashes."""
    return "val" if int(digest[:16], 16) < val_fraction * 2.0**64 else "train"


class Encoder:
    """Encodes jobs with one tokenizer. `val_fraction` decides for jobs without a split."""

    def __init__(self, tokenizer: Tokenizer, val_fraction: float, with_digests: bool = False) -> None:
        self._tokenizer = tokenizer
        self._val_fraction = val_fraction
        self._with_digests = with_digests
        self._cutter = Cutter(tokenizer)
        self._dtype = token_dtype(tokenizer.vocab_size)

    def __call__(self, job: EncodingJob) -> Encoded:
        """Raises DocumentError for a block that cannot be read, ValueError where text encodes to the end token."""
        texts: dict[Split, list[str]] = {}
        digests: dict[Split, list[bytes]] = {}
        left_out = Counter[str]()
        for text in job.block.texts:
            if isinstance(text, Bad) or (not text.strip() and job.block.starts and job.block.ends):
                left_out[str(text) if isinstance(text, Bad) else "empty"] += 1
                continue
            digest = self._digest(job, text)
            split = job.split or split_of(digest.hex(), self._val_fraction)
            texts.setdefault(split, []).append(text)
            digests.setdefault(split, []).append(digest[:16])
        sizes = {split: [len(text.encode("utf-8")) for text in group] for split, group in texts.items()}
        documents = sum(len(group) for group in texts.values()) if job.block.ends else 0
        block = job.block
        pieces = {
            split: [list(self._cutter.pieces(text, block.context, block.safe)) for text in group]
            for split, group in texts.items()
        }
        return Encoded(
            source=job.source,
            read_bytes=job.block.read_bytes,
            ids={split: self._encode(group, block) for split, group in pieces.items()},
            text_bytes={split: sum(group) for split, group in sizes.items()},
            documents=documents,
            left_out=dict(left_out),
            unsafe_cuts=sum(not piece.safe for group in pieces.values() for text in group for piece in text),
            starts=job.block.starts,
            ends=job.block.ends,
            after=job.block.after,
            digests=digests if self._with_digests else {},
            sizes=sizes if self._with_digests else {},
        )

    def _digest(self, job: EncodingJob, text: str) -> bytes:
        """The sha256 of the whole document; nothing where nobody asks for it."""
        if job.split is not None and not self._with_digests:
            return b""
        return bytes.fromhex(job.block.digest) if job.block.digest else hashlib.sha256(text.encode("utf-8")).digest()

    def _encode(self, pieces: list[list[Piece]], block: Block) -> Ids:
        """Ids of texts given in pieces, the end token after each (after the last only if it ends in this block)."""
        last = list(itertools.accumulate(len(group) for group in pieces))
        ids = self._encode_pieces(itertools.chain.from_iterable(pieces))
        end = np.array([self._tokenizer.eos_id], self._dtype)
        out = []
        for begin, stop in itertools.pairwise([0, *last]):
            out += [*ids[begin:stop], end]
        return np.concatenate(out if block.ends else out[:-1])

    def _encode_pieces(self, pieces: Iterable[Piece]) -> list[Ids]:
        out: list[Ids] = []
        for group in _grouped(pieces, _GROUP):
            out += [np.array(ids, self._dtype) for ids in self._cutter.encode(group)]
        if any((ids == self._tokenizer.eos_id).any() for ids in out):
            raise UserError(
                f"tokenizer {self._tokenizer.name} encodes plain text to its end token, so documents could not be "
                "separated: choose another tokenizer"
            )
        return out


def _grouped(pieces: Iterable[Piece], size: int) -> Iterator[list[Piece]]:
    """Runs of `pieces` of about `size` characters."""
    group: list[Piece] = []
    held = 0
    for piece in pieces:
        group.append(piece)
        held += len(piece.text)
        if held >= size:
            yield group
            group, held = [], 0
    if group:
        yield group


def encode_all(
    jobs: Iterable[EncodingJob],
    tokenizer_directory: Path,
    val_fraction: float,
    workers: int,
    with_digests: bool = False,
) -> Generator[Encoded, None, None]:
    """The results of `jobs` in their order, with at most a few blocks in memory for each of `workers` processes.

    The tokenizer is loaded from `tokenizer_directory` by every process. Raises what a job raises, in order, and
    OSError when a process dies.
    """
    if workers == 1:
        yield from map(Encoder(load_tokenizer(tokenizer_directory), val_fraction, with_digests), jobs)
        return
    pool = ProcessPoolExecutor(
        workers, multiprocessing.get_context("spawn"), _start_worker, (tokenizer_directory, val_fraction, with_digests)
    )
    waiting: deque[Future[Encoded]] = deque()
    try:
        for job in jobs:
            waiting.append(pool.submit(_encode_in_worker, job))
            if len(waiting) > 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool as error:
        raise StorageError(
            "a worker process died (out of memory?): try fewer --workers; finished work is kept"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


_encoder: Callable[[EncodingJob], Encoded] | None = None


def _start_worker(tokenizer_directory: Path, val_fraction: float, with_digests: bool) -> None:
    """One encoder a process, one thread each; Ctrl-C is for the parent, which shuts the workers down."""
    global _encoder
    silence()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _encoder = Encoder(load_tokenizer(tokenizer_directory), val_fraction, with_digests)


def _encode_in_worker(job: EncodingJob) -> Any:
    assert _encoder is not None, "the pool's initializer makes the encoder"
    return _encoder(job)
