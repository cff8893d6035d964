"""Batches as a pure function of (seed, step, rank, world size): the loader's whole position is the step."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from functools import lru_cache
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from spherelm.counting import counted
from spherelm.data.permutation import Permutation
from spherelm.data.shards import Tokens
from spherelm.errors import UserError

Batch = tuple[torch.Tensor, ...]
"""What the `loss` of a model takes, its targets last: (tokens, targets) of running text, a `PairBatch` of pairs."""


class Batches(Protocol):
    """Training data: one batch per update."""

    def batch(self, step: int) -> Batch:
        """The batch of `step` (from 0) for this rank: int64 `[batch_size / world_size, ...]` each."""
        ...

    def weight(self, step: int) -> float:
        """The weight of this rank's mean over its targets of `step` among all ranks; 1 where all have equally many."""
        ...

    def state(self, step: int) -> dict[str, Any]:
        """The state (JSON) that another process needs besides the number `step` to continue,
        the same for every rank.
        """
        ...

    def restore(self, state: dict[str, Any]) -> None:
        """Go to where `state` was taken, in a run of any number of ranks."""
        ...


class StatelessBatches:
    """Batches whose whole position is the step, of as many targets for every rank."""

    def weight(self, step: int) -> float:
        """One."""
        return 1.0

    def state(self, step: int) -> dict[str, Any]:
        """Nothing."""
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        """Nothing to do."""


class Loader(StatelessBatches):
    """Windows of `seq_len` tokens and their successors, in an order that is random and different every epoch.

    An epoch lays windows side by side from a random offset below `seq_len`, so that their borders move from epoch to
    epoch, and visits each once. Nothing is held but the memory map: the order comes from a keyed `Permutation`.
    `batch_size` is the batch of all ranks together; rank r gets the r-th of `world_size` equal parts of it.
    Raises ValueError when the text is shorter than one window or `world_size` does not divide `batch_size`.
    """

    def __init__(
        self, tokens: Tokens, seq_len: int, batch_size: int, seed: int, rank: int = 0, world_size: int = 1
    ) -> None:
        check_share(batch_size, rank, world_size)
        _check_length(tokens, seq_len)
        self.tokens = tokens
        self.seq_len = seq_len
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        # Any offset below seq_len leaves room for this many windows (and one window fits in any case).
        self.windows = max(1, (len(tokens) - seq_len) // seq_len)

    def batch(self, step: int) -> Batch:
        """(tokens, targets) of `step` (from 0) for this rank: int64 `[batch_size / world_size, seq_len]` each.

        `targets[:, i]` is the token after `tokens[:, i]`. The ranks' batches in order are that of one process.
        """
        share = self.batch_size // self.world_size
        first = step * self.batch_size + self.rank * share
        return stack(self.tokens.read(start, self.seq_len + 1) for start in self.window_starts(first, share))

    def window_starts(self, first: int, count: int) -> list[int]:
        """Where in the text the windows `first` to `first + count`, counted since the start of training, begin."""
        slack = len(self.tokens) - 1 - self.windows * self.seq_len
        starts: list[int] = []
        while len(starts) < count:
            epoch, index = divmod(first + len(starts), self.windows)
            order, offset = _epoch(self.windows, min(self.seq_len, slack + 1), self.seed, epoch)
            indices = np.arange(index, min(self.windows, index + count - len(starts)))
            starts += (offset + order(indices) * self.seq_len).tolist()
        return starts


@lru_cache(maxsize=8)
def _epoch(windows: int, offsets: int, seed: int, epoch: int) -> tuple[Permutation, int]:
    """Order and offset (below `offsets`) of one epoch."""
    name = f"spherelm seed {seed} epoch {epoch}"
    draw = int.from_bytes(hashlib.sha256(f"{name} offset".encode()).digest()[:8], "little")
    return Permutation(windows, f"{name} order"), draw % offsets


def validation_windows(tokens: Tokens, seq_len: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(tokens, targets), int64 `[count, seq_len]`: the same windows every time, evenly spread, none overlapping.

    All there are where the text holds fewer than `count`. Raises ValueError when it is shorter than one.
    """
    if count < 1:
        raise UserError(f"{count} validation windows asked for: at least 1 is needed")
    _check_length(tokens, seq_len)
    available = (len(tokens) - 1) // seq_len
    count = min(count, available)
    return stack(tokens.read(i * available // count * seq_len, seq_len + 1) for i in range(count))


def check_share(batch_size: int, rank: int, world_size: int) -> None:
    """Raise ValueError where `rank` of `world_size` processes cannot have an equal share of a batch."""
    if batch_size < 1 or world_size < 1 or batch_size % world_size:
        raise UserError(
            f"batch size {batch_size} does not divide among {counted(world_size, 'process', 'processes')}: "
            f"use a positive multiple of {world_size}"
        )
    if not 0 <= rank < world_size:
        raise UserError(f"rank {rank} is not within 0..{world_size - 1}: check rank and world_size")


def _check_length(tokens: Tokens, seq_len: int) -> None:
    if seq_len < 1:
        raise UserError(f"sequence length {seq_len}: must be at least 1")
    if len(tokens) < seq_len + 1:
        raise UserError(
            f"sequence length {seq_len} needs {seq_len + 1} tokens, but the {tokens.split} text in {tokens.directory} "
            f"has {len(tokens)}: use a shorter --seq-len or more text"
        )


def stack(rows: Iterable[npt.NDArray[np.int64]]) -> tuple[torch.Tensor, torch.Tensor]:
    """(tokens, targets) of windows of one token more than the sequence length."""
    both = torch.from_numpy(np.stack(list(rows)))
    return both[:, :-1].contiguous(), both[:, 1:].contiguous()
