"""Training text straight from a stream of documents, without a prepare step.

The windows are those of `prepare` followed by a plain row: documents in their order, an end token after each, cut side
by side. Shuffling is weaker than `Loader`'s: only within blocks of `SHUFFLE_TOKENS` tokens, since nothing else is in
memory; a stream whose documents are sorted stays sorted over longer distances. Every process reads and tokenizes the
whole stream and keeps its share of each batch, so the batches are the same for any number of processes, and so is the
saved position; for many processes or slow tokenizers, prepare the text first.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from spherelm.counting import counted
from spherelm.data.documents import Block
from spherelm.data.encoding import Encoder, EncodingJob
from spherelm.data.hub import HubText
from spherelm.data.loader import Batch, check_share, stack
from spherelm.data.permutation import Permutation
from spherelm.data.shards import Ids
from spherelm.data.tokenizer import Tokenizer
from spherelm.errors import UserError

SHUFFLE_TOKENS = 1 << 20
_PIECE_CHARACTERS = 1 << 18  # encoded at once


class StreamLoader:
    """Windows of `seq_len` tokens and their successors from `text`, from its start again when it ends.

    Documents that the hash puts among `val_fraction` are left out. Batches must be asked for in order, each as often as
    one likes until the next. `state` and `restore` carry the position from one process to another: JSON of a few
    hundred bytes; resuming reads and tokenizes up to one shuffle block again.
    """

    def __init__(
        self,
        text: HubText,
        tokenizer: Tokenizer,
        seq_len: int,
        batch_size: int,
        seed: int,
        val_fraction: float = 0.0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        check_share(batch_size, rank, world_size)
        self.seq_len, self.batch_size, self.seed = seq_len, batch_size, seed
        self.rank, self.world_size = rank, world_size
        self.windows = max(batch_size, SHUFFLE_TOKENS // seq_len)
        self._tokens = _TokenStream(text, Encoder(tokenizer, val_fraction))
        self._next = 0
        # Of the last two blocks: where each begins in the stream, and its windows [windows, seq_len + 1] in their
        # order.
        self._held: dict[int, tuple[dict[str, Any], Ids]] = {}

    def batch(self, step: int) -> Batch:
        """(tokens, targets) of `step` for this rank: int64 `[batch_size / world_size, seq_len]` each.

        Raises ValueError for a step that lies before what is held.
        """
        share = self.batch_size // self.world_size
        first = step * self.batch_size + self.rank * share
        return stack(self._window(number) for number in range(first, first + share))

    def weight(self, step: int) -> float:
        """One: every rank has as many targets."""
        return 1.0

    def state(self, step: int) -> dict[str, Any]:
        """The state (JSON) that a loader needs to continue with `step`, the next one or the last one."""
        number = step * self.batch_size // self.windows
        position = self._tokens.position() if number == self._next else self._held[number][0]
        return {"block": number, "windows": self.windows, "position": position}

    def restore(self, state: dict[str, Any]) -> None:
        """Go to where `state` was taken. Raises ValueError for one of other lengths.

        With an empty one the batches are the same, but the text is read from its start again.
        """
        if not state:
            return
        if state["windows"] != self.windows:
            raise UserError(f"the stream was shuffled {state['windows']} windows at a time, now it is {self.windows}")
        self._held.clear()
        self._next = int(state["block"])
        self._tokens.restore(state["position"])

    def _window(self, number: int) -> npt.NDArray[np.int64]:
        block, place = divmod(number, self.windows)
        while block >= self._next:
            position, rows = self._tokens.position(), [self._tokens.window(self.seq_len) for _ in range(self.windows)]
            order = Permutation(self.windows, f"spherelm seed {self.seed} block {self._next}")
            self._held[self._next] = position, np.stack(rows)[order(range(self.windows))]
            self._held.pop(self._next - 2, None)
            self._next += 1
        if block not in self._held:
            raise UserError(f"window {number} of the stream is already past: a stream only moves forward")
        window: npt.NDArray[np.int64] = self._held[block][1][place].astype(np.int64)
        return window


class _TokenStream:
    """The training tokens of a text as one endless row."""

    def __init__(self, text: HubText, encoder: Encoder) -> None:
        self._text, self._encoder = text, encoder
        self.restore({"after": None, "used": 0})

    def restore(self, position: dict[str, Any]) -> None:
        """Go to where `position` was taken."""
        self._after: dict[str, Any] | None = position["after"]
        self._used = int(position["used"])
        self._blocks: Iterator[Block] | None = None
        self._pieces: deque[tuple[dict[str, Any] | None, Ids]] = deque()

    def position(self) -> dict[str, Any]:
        """Where the next window begins: so many tokens after a place of the text (JSON)."""
        return {"after": self._pieces[0][0] if self._pieces else self._after, "used": self._used}

    def window(self, seq_len: int) -> Ids:
        """The next seq_len tokens and the one after them, with which the next window begins."""
        while sum(ids.size for _, ids in self._pieces) <= self._used + seq_len:
            self._pieces.append(self._piece())
        first = self._pieces[0][1]
        whole = first if first.size > self._used + seq_len else np.concatenate([ids for _, ids in self._pieces])
        row = whole[self._used : self._used + seq_len + 1]
        self._used += seq_len
        while self._used >= self._pieces[0][1].size:
            self._used -= self._pieces.popleft()[1].size
        return row

    def _piece(self) -> tuple[dict[str, Any] | None, Ids]:
        """The place and the tokens of the next block that holds any."""
        fruitless = False
        while True:
            if self._blocks is None:
                self._blocks = self._text.blocks(self._after, _PIECE_CHARACTERS)
            block, before = next(self._blocks, None), self._after
            if block is None:
                if fruitless:
                    raise UserError(
                        f"{self._text.request.name} holds no training text: check its column and val fraction"
                    )
                self._blocks, self._after, fruitless = None, None, True
                continue
            self._after = block.after
            ids = self._encoder(EncodingJob(0, block, None)).ids.get("train")
            if ids is not None:
                return before, ids


def held_out_windows(
    blocks: Iterator[Block], tokenizer: Tokenizer, val_fraction: float, seq_len: int, count: int
) -> tuple[Batch, float, str]:
    """(tokens, targets) [count, seq_len] of the first validation documents in `blocks`,
    tokens a UTF-8 byte, fingerprint.

    `val_fraction` 1 takes every document. Fewer windows where the text ends first. Raises ValueError for less than one.
    """
    encoder = Encoder(tokenizer, val_fraction)
    pieces, tokens, text_bytes = list[Ids](), 0, 0
    for block in blocks:
        encoded = encoder(EncodingJob(0, block, "val" if val_fraction == 1 else None))
        if "val" in encoded.ids:
            pieces.append(encoded.ids["val"])
            tokens += pieces[-1].size
            text_bytes += encoded.text_bytes["val"]
        if tokens > count * seq_len:
            break
    count = min(count, (tokens - 1) // seq_len)
    if count < 1:
        raise UserError(
            f"the validation text has {counted(tokens, 'token')}, less than one window of {seq_len}: "
            "give val= a file or a larger fraction"
        )
    row = np.concatenate(pieces).astype(np.int64)
    windows = [row[i * seq_len : (i + 1) * seq_len + 1] for i in range(count)]
    return stack(windows), tokens / text_bytes, hashlib.sha256(np.stack(windows).tobytes()).hexdigest()
