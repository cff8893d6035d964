"""How many fewer tokens the better arm needs: pure functions on losses at the ends of schedules, or along one."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.special import stdtrit

CurvePoint = tuple[float, float]
"""(tokens, validation loss in nats per token)."""


OPPOSITE = {"at least": "at most", "at most": "at least"}
"""Of a bound: the fewer the tokens, the larger the ratio."""


@dataclass(frozen=True)
class Reach:
    """The tokens after which a curve reaches a loss; `bound` says that it is only known to be at most
    or at least that.
    """

    tokens: float
    bound: str | None = None


def tokens_to_reach(curve: Sequence[CurvePoint], target: float) -> Reach:
    """Where `curve` first falls to `target`: interpolated linearly in the logarithm of the tokens between its points.

    A curve that starts at or below the target reaches it after "at most" its first tokens, one that never gets there
    after "at least" its last. Points whose loss is NaN, runs that diverged, are left out.
    """
    points = sorted(point for point in curve if not math.isnan(point[1]))
    if points[0][1] <= target:
        return Reach(points[0][0], "at most")
    for (tokens, loss), (next_tokens, next_loss) in itertools.pairwise(points):
        if next_loss <= target:
            part = (loss - target) / (loss - next_loss)
            return Reach(tokens * (next_tokens / tokens) ** part)
    return Reach(points[-1][0], "at least")


def interval(ratios: Sequence[float], confidence: float = 0.95) -> tuple[float, float] | None:
    """The confidence interval of the mean of ratios, by Student's t on their logarithms; `None` for fewer than two."""
    if len(ratios) < 2:
        return None
    logs = np.log(ratios)
    half = stdtrit(len(logs) - 1, 0.5 + confidence / 2) * logs.std(ddof=1) / math.sqrt(len(logs))
    return float(np.exp(logs.mean() - half)), float(np.exp(logs.mean() + half))


def mean_curve(curves: Sequence[Sequence[CurvePoint]]) -> list[CurvePoint]:
    """The mean loss over curves at the token counts that all of them share."""
    shared = set.intersection(*({tokens for tokens, _ in curve} for curve in curves))
    return [(tokens, float(np.mean([dict(curve)[tokens] for curve in curves]))) for tokens in sorted(shared)]


@dataclass(frozen=True)
class Saving:
    """How many times fewer tokens one arm needs than the other.

    Attributes:
        reach: Where its mean curve falls to the other's mean loss.
        value: The other's tokens over these.
        bound: Whether the value is only known to be at least or at most that.
        by_seed: The value of each seed, `None` where it is only bounded.
        interval: Of the value, 95 %, where every seed's is known.
    """

    reach: Reach
    value: float
    bound: str | None
    by_seed: Sequence[float | None]
    interval: tuple[float, float] | None


def fewer_tokens(tokens: int, curves: Sequence[Sequence[CurvePoint]], losses: Sequence[float]) -> Saving:
    """The saving of an arm with `curves`, one a seed, against the other arm's final `losses` after `tokens`."""
    reach = tokens_to_reach(mean_curve(curves), float(np.mean(losses)))
    seeds = [tokens_to_reach(curve, loss) for curve, loss in zip(curves, losses, strict=True)]
    by_seed = [None if seed.bound else tokens / seed.tokens for seed in seeds]
    known = [ratio for ratio in by_seed if ratio is not None]
    bounds = interval(known) if len(known) == len(by_seed) else None
    return Saving(reach, tokens / reach.tokens, OPPOSITE.get(reach.bound or ""), by_seed, bounds)


def winner(final_losses: dict[str, list[float]]) -> str:
    """The arm with the lower mean final loss; an arm that diverged on any seed loses."""
    means = {arm: float(np.mean(losses)) for arm, losses in final_losses.items()}
    return min(means, key=lambda arm: math.inf if math.isnan(means[arm]) else means[arm])


def losing_losses(final_losses: dict[str, list[float]], best: str) -> list[float]:
    """The final losses, by seed, of the arm that is not `best`: what `best` has to reach."""
    (losing,) = (losses for arm, losses in final_losses.items() if arm != best)
    return losing


def speedup(
    final_losses: dict[str, list[float]],
    tokens: int,
    curves: list[list[CurvePoint]],
    step_time_ratio: float,
    method: str,
) -> dict[str, Any]:
    """The `speedup` of `summary.json`.

    final_losses: by arm, a baseline and its normalized twin, and seed; tokens: of a full run; curves: the winning arm's
    (tokens, loss), one a seed, the full run's end among them; step_time_ratio: seconds of a normalized step over those
    of a baseline's; method: where the curves come from, "schedule-ends" or "in-run".

    `tokens` is the baseline's tokens over the normalized arm's to the same loss, which is the final mean
    loss of the arm that ends higher: above 1 the normalized one needs fewer, below 1 the baseline does. `bound` says
    that the ratio is only known to be "at least" or "at most" so much.
    """
    best = winner(final_losses)
    losing = losing_losses(final_losses, best)
    found = None if math.isnan(float(np.mean(losing))) else fewer_tokens(tokens, curves, losing)
    value, bound, bounds, by_seed = None, None, None, list[float | None]()
    if found is not None:
        value, bound, bounds, by_seed = found.value, found.bound, found.interval, list(found.by_seed)
        if best != "ngpt":
            value, bound = 1 / value, OPPOSITE.get(bound or "")
            by_seed = [None if ratio is None else 1 / ratio for ratio in by_seed]
            bounds = None if bounds is None else (1 / bounds[1], 1 / bounds[0])
    return {
        "winner": best,
        "method": method,
        "bound": bound,
        "tokens_to_reach": found.reach.tokens if found else None,
        "tokens": value,
        "steps": value,
        "tokens_interval": bounds,
        "by_seed": by_seed,
        "seconds": value / step_time_ratio if value else None,
        "seconds_interval": [edge / step_time_ratio for edge in bounds] if bounds else None,
    }
