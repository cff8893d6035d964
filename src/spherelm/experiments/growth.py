"""The tokens and seconds that normalized contenders save at each point of size, context and budget, and how that grows.

Pure functions on the measurements of `spherelm evidence`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from spherelm.experiments.cost import COMPILE_FROM
from spherelm.experiments.speedup import fewer_tokens

DISTINCT = 1e-3
"""A direction in which the points differ by less than this part of their size,
as by rounding to whole updates, is none.
"""


def all_speedups(
    measured: Sequence[Mapping[str, Any]], costs: Sequence[Mapping[str, Any]] = ()
) -> Iterator[dict[str, Any]]:
    """For each point, each baseline and each normalized contender, how many fewer tokens, and seconds,
    the latter needs.

    It is looked for among the ends of the contender's own whole schedules at all budgets of that size and context.
    `bound`: the ratio is only known to be "at least" or "at most" that, because those budgets do not reach far enough.
    In seconds it is `None` where the steps were not timed.
    """
    for baseline in measured:
        if baseline["arm"] == "ngpt" or any(math.isnan(loss) for loss in baseline["test"]):
            continue
        place = {key: baseline[key] for key in ("size", "context")}
        rungs = [m for m in measured if m["arm"] == "ngpt" and all(m[key] == place[key] for key in place)]
        for contender in dict.fromkeys(rung["contender"] for rung in rungs):
            own = [rung for rung in rungs if rung["contender"] == contender]
            ratio = one_speedup(baseline, own)
            yield {**place, **{key: baseline[key] for key in ("budget", "tokens", "block_parameters")},
                   "baseline": baseline["contender"], "contender": contender, **ratio,
                   **in_seconds(ratio, step_ratio(costs, baseline, contender))}  # fmt: skip


def step_ratio(costs: Sequence[Mapping[str, Any]], baseline: Mapping[str, Any], contender: str) -> float | None:
    """Seconds of a step of `contender` over those of `baseline`, a measurement;
    `None` if they were not timed together.
    """
    batch = baseline["tokens"] // baseline["steps"] // baseline["context"]
    there = timed_at(costs, baseline["size"], baseline["context"], batch, baseline["steps"] >= COMPILE_FROM)
    found = (cost["ratios"].get(baseline["contender"], {}).get(contender) for cost in there)
    return next((ratio for ratio in found if ratio is not None), None)


def timed_at(
    costs: Sequence[Mapping[str, Any]], size: str, context: int, batch: int, compiled: bool
) -> Iterator[Mapping[str, Any]]:
    """Those of `costs` that were timed at this size, context and batch, compiled or not."""
    here = (size, context, batch, compiled)
    every = ((cost["size"], cost["context"], cost.get("batch", batch), cost["compiled"]) for cost in costs)
    return (cost for cost, place in zip(costs, every, strict=True) if place == here)


def in_seconds(ratio: Mapping[str, Any], step: float | None) -> dict[str, Any]:
    """A speedup of `one_speedup` and its interval in seconds, where a step takes `step` times as long."""
    value, edges = ratio["speedup"], ratio["interval"]
    return {
        "seconds": None if step is None or value is None else value / step,
        "seconds_interval": None if step is None or edges is None else [edge / step for edge in edges],
    }


def one_speedup(baseline: Mapping[str, Any], own: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The ratio of tokens, its 95 % interval over seeds where every seed's crossing is bracketed, and its bound.

    On the seeds that the baseline and all of the contender's budgets have. A budget at which one of them diverged is
    left out, all of it; without any other there is no ratio.
    """
    seeds_of_all = min(len(row["test"]) for row in (baseline, *own))
    targets = baseline["test"][:seeds_of_all]
    sound = [rung for rung in own if all(map(math.isfinite, rung["test"][:seeds_of_all]))]
    if not sound:
        return {"speedup": None, "bound": None, "interval": None}
    curves = [[(rung["tokens"], rung["test"][seed]) for rung in sound] for seed in range(seeds_of_all)]
    found = fewer_tokens(baseline["tokens"], curves, targets)
    bounds = None if found.interval is None else list(found.interval)  # as JSON gives it back
    return {"speedup": found.value, "bound": found.bound, "interval": bounds}


def growth(speedups: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """By pair of baseline and contender, the powers of budget, size and context with which the speedup grows.

    Least squares on logarithms over the points whose speedup is known exactly; a power is `None` where the points do
    not differ in it or are too few to tell it from another (all of one number of tokens, say). `error`: standard
    errors, `None` where there are no points to spare.
    """
    fits = {}
    for pair in dict.fromkeys((row["baseline"], row["contender"]) for row in speedups):
        rows = [row for row in speedups if (row["baseline"], row["contender"]) == pair]
        known = [row for row in rows if row["speedup"] is not None and row["bound"] is None]
        fits[" -> ".join(pair)] = {"points": len(known), "left_out": len(rows) - len(known), **powers(known)}
    return fits


def powers(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The fit of `growth` on `rows`: `power` and `error`, by "budget", "block_parameters" and "context"."""
    names = ("budget", "block_parameters", "context")
    varied = [name for name in names if len({row[name] for row in rows}) > 1]
    spare = len(rows) - len(varied) - 1
    if not varied or spare < 0:
        return {"power": dict.fromkeys(names), "error": dict.fromkeys(names)}
    columns = [np.ones(len(rows)), *(np.log([row[name] for row in rows]) for name in varied)]
    x, y = np.stack(columns, axis=1), np.log([row["speedup"] for row in rows])
    if np.linalg.matrix_rank(x, tol=DISTINCT * float(np.linalg.norm(x, 2))) < x.shape[1]:
        return {"power": dict.fromkeys(names), "error": dict.fromkeys(names)}
    solution = np.linalg.lstsq(x, y, rcond=None)[0]
    noise = float(((y - x @ solution) ** 2).sum()) / spare if spare else None
    errors = [None] * len(solution) if noise is None else np.sqrt(noise * np.diag(np.linalg.inv(x.T @ x))).tolist()
    at = {name: index for index, name in enumerate(varied, 1)}
    return {
        "power": {name: float(solution[at[name]]) if name in at else None for name in names},
        "error": {name: errors[at[name]] if name in at else None for name in names},
    }
