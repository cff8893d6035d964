"""Several texts by weight: which one a window comes from is a pure function of the window's number.

The order of the texts repeats after the weights' common denominator, and within it stays as close to the weights as can
be: after n windows a text of weight w (of all weights 1) has had w * n of them, less or more than one
(R. Tijdeman, "The chairman assignment problem", 1980: never further than 1 - 1 / (2k - 2) for k texts).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from spherelm.data.loader import Batch, Loader, StatelessBatches, check_share, stack
from spherelm.data.shards import Tokens
from spherelm.errors import UserError

LONGEST_CYCLE = 100_000


def shares(weights: Sequence[Fraction]) -> tuple[int, ...]:
    """`weights` as the smallest whole numbers in their proportion.

    Raises ValueError for a weight that is not positive, and for weights that would need a cycle beyond `LONGEST_CYCLE`.
    """
    for weight in weights:
        if weight <= 0:
            raise UserError(f"a weight of {float(weight):g}: weights must be positive; leave that text out instead")
    denominator = math.lcm(*(weight.denominator for weight in weights))
    whole = [int(weight * denominator) for weight in weights]
    divisor = math.gcd(*whole)
    if sum(whole) // divisor > LONGEST_CYCLE:
        raise UserError(
            f"the weights' common denominator is {sum(whole) // divisor}, more than {LONGEST_CYCLE}: give fewer digits"
        )
    return tuple(number // divisor for number in whole)


@lru_cache(maxsize=8)
def cycle(parts: tuple[int, ...]) -> npt.NDArray[np.int64]:
    """The order of the texts, int64 [sum(parts)]: `parts[j]` times j,
    after n of them never further than 1 from its share.
    """
    total, texts = sum(parts), len(parts)
    spread = max(1, 2 * texts - 2)
    taken, order = [0] * texts, []
    for n in range(1, total + 1):
        # What is owed to each text by now, in units of 1 / (spread * total) windows; those owed enough stand to be
        # taken, and the one that would first be owed too much is.
        owed = [spread * (part * n - total * count) for part, count in zip(parts, taken, strict=True)]
        due = [j for j in range(texts) if owed[j] >= total]
        chosen = min(due, key=lambda j: (spread * total - total - owed[j]) / parts[j])
        taken[chosen] += 1
        order.append(chosen)
    return np.array(order, np.int64)


class MixtureLoader(StatelessBatches):
    """As `Loader`, over several texts in exact proportions.

    Each text has its own epochs, and its windows come in the order in which `Loader` gives them for it alone; where the
    next of which text stands is the same for any number of ranks. Raises what `Loader` and `shares` raise, and
    ValueError for texts of different tokenizers.
    """

    def __init__(
        self,
        texts: Sequence[Tokens],
        weights: Sequence[Fraction],
        seq_len: int,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        check_share(batch_size, rank, world_size)
        for one, other in pairwise(texts):
            if one.tokenizer_fingerprint != other.tokenizer_fingerprint:
                raise UserError(
                    f"{one.directory} and {other.directory} were prepared with different tokenizers: prepare them with one"
                )
        self.loaders = [Loader(text, seq_len, 1, seed) for text in texts]
        self.seq_len, self.batch_size, self.rank, self.world_size = seq_len, batch_size, rank, world_size
        self._cycle = cycle(shares(weights))
        counts = self._cycle[:, None] == np.arange(len(texts))
        # How many windows of each text come before each place of the cycle: int64 [len(cycle) + 1, texts].
        self._before = np.concatenate([np.zeros((1, len(texts)), np.int64), np.cumsum(counts, axis=0)])

    def sources(self, first: int, count: int) -> npt.NDArray[np.int64]:
        """Which text the windows `first` to `first + count` come from."""
        return self._cycle[np.arange(first, first + count) % self._cycle.size]

    def batch(self, step: int) -> Batch:
        """(tokens, targets) of `step` (from 0) for this rank: int64 `[batch_size / world_size, seq_len]` each."""
        share = self.batch_size // self.world_size
        first = step * self.batch_size + self.rank * share
        sources, before = self.sources(first, share), self._taken(first)
        rows: list[npt.NDArray[np.int64]] = [np.empty(0, np.int64)] * share
        for number, loader in enumerate(self.loaders):
            places = np.flatnonzero(sources == number)
            starts = loader.window_starts(int(before[number]), places.size)
            for place, start in zip(places.tolist(), starts, strict=True):
                rows[place] = loader.tokens.read(start, self.seq_len + 1)
        return stack(rows)

    def _taken(self, windows: int) -> npt.NDArray[np.int64]:
        """How many of the first `windows` windows come from each text."""
        cycles, place = divmod(windows, self._cycle.size)
        return self._before[-1] * cycles + self._before[place]
