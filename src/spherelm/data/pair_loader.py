"""Pairs as batches of similar length, a pure function of (seed, step, rank, world size) as all batches here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from spherelm.counting import counted
from spherelm.data.loader import StatelessBatches, check_share
from spherelm.data.pairs import PairTokens
from spherelm.errors import UserError
from spherelm.layers.loss import IGNORED


class PairBatch(NamedTuple):
    """Pairs, all int64.

    source: [pairs, source], padded on the right with `IGNORED`. tokens: [pairs, target], the texts that are written,
    from the end token on that begins each. targets: [pairs, target], the same moved by one, which end with it, and
    `IGNORED` at padding.
    """

    source: Tensor
    tokens: Tensor
    targets: Tensor


class PairLoader(StatelessBatches):
    """Batches of `batch_size` pairs, each pair once an epoch but for a rest that fills no batch,
    another one every epoch.

    The pairs of a batch are about equally long, so that little is padded: an epoch draws a random order, sorts by
    length, which leaves equally long ones in that order, cuts it into batches and shuffles these. `rank` of
    `world_size` gets every `world_size`-th pair of a batch. Raises ValueError for fewer pairs than a batch or a batch
    that the processes cannot share.
    """

    def __init__(
        self, pairs: PairTokens, eos_id: int, batch_size: int, seed: int, rank: int = 0, world_size: int = 1
    ) -> None:
        check_share(batch_size, rank, world_size)
        if len(pairs) < batch_size:
            raise UserError(
                f"the data has {counted(len(pairs), 'training pair')}, fewer than batch_size={batch_size}: lower it"
            )
        self.pairs, self.eos_id, self.batch_size, self.seed = pairs, eos_id, batch_size, seed
        self.rank, self.world_size = rank, world_size
        self.batches = len(pairs) // batch_size
        source, target = pairs.lengths()
        self._length, self._targets = source + target, target + 1
        self._epoch, self._order = -1, np.empty((0, 0), dtype=np.int64)

    @property
    def tokens_per_update(self) -> int:
        """Target tokens of a batch, their ends among them, on average and rounded."""
        return round(self.batch_size * (len(self.pairs.target) / len(self.pairs) + 1))

    def batch(self, step: int) -> PairBatch:
        """The pairs of `step` (from 0) for this rank."""
        return pair_batch(self.pairs, self._rows(step)[self.rank :: self.world_size], self.eos_id)

    def weight(self, step: int) -> float:
        """This rank's targets, ends among them, over the mean of all ranks."""
        counts = self._targets[self._rows(step)]
        return float(self.world_size * counts[self.rank :: self.world_size].sum() / counts.sum())

    def _rows(self, step: int) -> npt.NDArray[np.int64]:
        """The pairs of the whole batch of `step`."""
        epoch, number = divmod(step, self.batches)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, self._draw(epoch)
        rows: npt.NDArray[np.int64] = self._order[number]
        return rows

    def _draw(self, epoch: int) -> npt.NDArray[np.int64]:
        """The pairs of each batch of an epoch: [batches, batch_size]."""
        random = np.random.default_rng((self.seed, epoch))
        order = random.permutation(len(self.pairs))[: self.batches * self.batch_size]
        order = order[np.argsort(self._length[order], kind="stable")].reshape(self.batches, self.batch_size)
        random.shuffle(order)
        return order


def pair_batch(pairs: PairTokens, rows: npt.NDArray[np.int64] | Sequence[int], eos_id: int) -> PairBatch:
    """The pairs numbered `rows` as a batch, no wider than their longest source and target."""
    read = [pairs.row(int(index)) for index in rows]
    source = np.full((len(read), max(len(s) for s, _ in read) + 1), IGNORED, dtype=np.int64)
    written = np.full((len(read), max(len(t) for _, t in read) + 1), eos_id, dtype=np.int64)
    targets = np.full_like(written, IGNORED)
    for i, (s, t) in enumerate(read):
        source[i, : len(s)], source[i, len(s)] = s, eos_id
        written[i, 1 : len(t) + 1] = t
        targets[i, : len(t)], targets[i, len(t)] = t, eos_id
    return PairBatch(*(torch.from_numpy(part) for part in (source, written, targets)))


def held_out_pairs(pairs: PairTokens, count: int, eos_id: int) -> PairBatch:
    """`count` validation pairs, or all there are, spread evenly over the file,
    in the order of their lengths, as a batch.
    """
    rows = np.unique(np.linspace(0, len(pairs) - 1, min(count, len(pairs))).round().astype(np.int64))
    source, target = pairs.lengths()
    return pair_batch(pairs, rows[np.argsort((source + target)[rows], kind="stable")], eos_id)
