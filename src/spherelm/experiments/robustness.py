"""Which learning rate is best, between those that were tried, and how much it may be off.
Pure functions on final losses.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

TOLERANCE = 0.02


@dataclass(frozen=True)
class Tolerated:
    """The peak learning rates from `low` to `high`, over which the final loss is within a tolerance of the best.

    open_low, open_high: the loss was still within it at the lowest or highest rate that was tried: the
    range continues there.
    diverged: the range ends at a rate because the next one that was tried diverged.
    """

    low: float
    high: float
    open_low: bool
    open_high: bool
    diverged: bool = False

    @property
    def times(self) -> float:
        """The range as a factor: high / low."""
        return self.high / self.low

    def __str__(self) -> str:
        least = "at least " if self.open_low or self.open_high else ""
        cut = ", beside a rate that diverged" if self.diverged else ""
        return f"{least}{self.times:.3g}x ({self.low:.2g} to {self.high:.2g}{cut})"


def tolerated(points: Sequence[tuple[float, float]]) -> Tolerated | None:
    """The range around the best of `points`, (peak learning rate, final loss), within `1 + TOLERANCE` times its loss.

    Between two rates the loss is interpolated linearly in the logarithm of the rate; up to one that diverged (a loss
    that is not finite) nothing is known, and the range ends at the last one that did not. `None` for fewer than
    two finite losses.
    """
    ordered = sorted(points)
    finite = [index for index, (_, loss) in enumerate(ordered) if math.isfinite(loss)]
    if len(finite) < 2:
        return None
    best = min(finite, key=lambda index: ordered[index][1])
    limit = (1 + TOLERANCE) * ordered[best][1]
    low, open_low, cut_low = _edge(ordered[best::-1], limit)
    high, open_high, cut_high = _edge(ordered[best:], limit)
    return Tolerated(low, high, open_low, open_high, cut_low or cut_high)


def best_between(points: Sequence[tuple[float, float]]) -> float | None:
    """The rate at the lowest point of a parabola in the logarithm of the rate, laid through the best of `points`
    (peak learning rate, final loss) and its two neighbours.

    `None` where the best has not a finite neighbour on either side, or ties with both: the minimum is not enclosed.
    """
    ordered = sorted(points)
    finite = [index for index, (_, loss) in enumerate(ordered) if math.isfinite(loss)]
    best = min(finite, key=lambda index: ordered[index][1], default=0)
    around = ordered[max(best - 1, 0) : best + 2]
    if len(around) < 3 or not all(math.isfinite(loss) for _, loss in around):
        return None
    middle = math.log(around[1][0])
    bend, slope, _ = np.polyfit([math.log(rate) - middle for rate, _ in around], [loss for _, loss in around], 2)
    return math.exp(middle - slope / (2 * bend)) if bend > 0 else None


def where_best(points: Sequence[tuple[float, float]]) -> str:
    """The rate of the lowest of `points` (peak learning rate, final loss), in words:
    and where between rates it may be.
    """
    ordered = sorted(points)
    losses = [loss if math.isfinite(loss) else math.inf for _, loss in ordered]
    best = losses.index(min(losses))
    between = best_between(points)
    if between is not None:
        about = f" (by a parabola {between:.2g})"
    elif best in (0, len(ordered) - 1):
        about = " (at the edge of what was tried)"
    else:
        about = " (beside a rate that diverged)" if math.inf in losses[best - 1 : best + 2] else ""
    return f"{ordered[best][0]:g}{about}"


def _edge(points: Sequence[tuple[float, float]], limit: float) -> tuple[float, bool, bool]:
    """How far one gets from the first of `points` until the loss crosses `limit`;
    whether it never does, or diverges first.
    """
    for (rate, loss), (next_rate, next_loss) in itertools.pairwise(points):
        if not math.isfinite(next_loss):
            return rate, False, True
        if next_loss > limit:
            return rate * (next_rate / rate) ** ((limit - loss) / (next_loss - loss)), False, False
    return points[-1][0], True, False
