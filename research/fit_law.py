"""The constants of the law as a fit of the runs in docs/results/law.json, with standard errors.

    python research/fit_law.py

The loss at a point is a parabola in the logarithm of each role's rate. The best rate of a role is a power of updates,
tokens of an update, width and, for GPT, vocabulary and depth. Everything of an arm is fitted at once, by least squares.
Exponents that theory or earlier runs name have a prior, as one more residual.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from law import RESULTS
from run_queue import lines
from scipy.optimize import least_squares

ROLES = {"matrix": "matrix", "input": "input_embedding", "output": "output_embedding"}
VOCABULARY = {"256": 256, "4k": 4096, "32k": 32000}
POWERS = ("updates", "tokens", "width", "vocabulary", "depth")
NOISE = 0.001
"""Of a loss, relative: what the parabolas leave over. With bytes for tokens seeds differ by more than that."""
PRIORS = {
    ("matrix", "updates"): (-0.58, 0.15), ("input", "updates"): (-0.33, 0.15), ("output", "updates"): (-0.33, 0.15),
    ("input", "vocabulary"): (0, 0.1), ("output", "vocabulary"): (0, 0.1),
    ("input", "depth"): (0, 0.1), ("output", "depth"): (0, 0.1),
}  # fmt: skip
"""(mean, spread) of an exponent: of length from docs/results/ladder.json; that embeddings do not see the rest."""


def features(point: str) -> list[float]:
    """The logarithms of a point's numbers over those of the center, in the order of `POWERS`."""
    width, layers, vocabulary, tokens, updates, *_ = point.split("-")
    ratios = (int(updates) / 1000, int(tokens) / 1024, int(width) / 64, VOCABULARY[vocabulary] / 4096, int(layers) / 2)
    return [math.log2(ratio) for ratio in ratios]


def rate_of(run: dict[str, Any], name: str) -> float:
    """The peak rate of a role in a run. The first lines have it, later ones the run's rate and its multipliers."""
    return float(run["rates"][name]) if "rates" in run else float(run["lr"] * run["multipliers"][name])


def fit(arm: str) -> tuple[np.ndarray, np.ndarray, int]:
    """(numbers, standard errors, runs): for each role the best rate's logarithm and its powers, then the curvatures."""
    runs = [r for r in lines(RESULTS) if r["kind"] == "fit" and r["arm"] == arm and "role" in r and r["loss"]]
    points = sorted({run["point"] for run in runs})
    place = np.array([points.index(run["point"]) for run in runs])
    x = np.array([features(run["point"]) for run in runs])
    rates = np.array([[math.log2(rate_of(run, name)) for name in ROLES.values()] for run in runs])
    losses = np.array([math.log(run["loss"]) for run in runs])
    size, roles = 1 + len(POWERS), list(ROLES)

    def residuals(numbers: np.ndarray) -> np.ndarray:
        best, bends, levels = (
            numbers[: 3 * size].reshape(3, size),
            numbers[3 * size : 3 * size + 3],
            numbers[3 * size + 3 :],
        )
        optimum = best[:, 0] + x @ best[:, 1:].T
        found = levels[place] + ((rates - optimum) ** 2 * np.exp(bends)).sum(1)
        prior = [(best[roles.index(role), 1 + POWERS.index(power)] - m) / s for (role, power), (m, s) in PRIORS.items()]
        loose = (best[:, 1:] / 2).ravel()  # what no run says stays small
        return np.concatenate([(found - losses) / NOISE, prior, loose, bends + 6])

    middle = np.median(rates, axis=0)
    start = np.concatenate([np.column_stack([middle, np.zeros((3, len(POWERS)))]).ravel(), np.full(3, -6.0)])
    lowest = [losses[place == k].min() for k in range(len(points))]
    found = least_squares(residuals, np.concatenate([start, lowest]), loss="soft_l1")
    errors = np.sqrt(np.diag(np.linalg.pinv(found.jac.T @ found.jac)))
    return found.x, errors, len(runs)


def main() -> None:
    for arm in ("gpt", "ngpt"):
        numbers, errors, runs = fit(arm)
        print(f"{arm}: {runs} runs")
        for k, role in enumerate(ROLES):
            own = slice(k * (1 + len(POWERS)), (k + 1) * (1 + len(POWERS)))
            (rate, *powers), (error, *spreads) = numbers[own], errors[own]
            said: list[Any] = [f"{p} {v:+.2f} ± {e:.2f}" for p, v, e in zip(POWERS, powers, spreads, strict=True)]
            print(
                f"  {role:7} {2**rate:.4g} (times or over {2**error:.2f}) at 1000 updates of 1024 tokens, {', '.join(said)}"
            )


if __name__ == "__main__":
    main()
