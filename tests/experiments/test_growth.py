"""The speedups between measurements of a ladder, and the fit of how they grow, on numbers whose answer is known."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest

from spherelm.experiments.growth import all_speedups, growth, one_speedup


def rung(tokens: int, *test: float) -> dict[str, Any]:
    return {"tokens": tokens, "test": list(test)}


def test_the_speedup_is_the_ratio_of_tokens_to_the_same_loss() -> None:
    """Losses that fall by 1 for each doubling: two seeds, the contender one doubling ahead, then one and a half."""
    own = [rung(1000, 5.0, 5.5), rung(2000, 4.0, 4.5), rung(4000, 3.0, 3.5)]
    found = one_speedup(rung(4000, 4.0, 4.0), own)
    assert found["speedup"] == pytest.approx(4000 / (2000 * 2**0.25))
    assert found["bound"] is None
    low, high = found["interval"]
    assert low < math.sqrt(2 * 2**0.5) < high
    ahead = one_speedup(rung(1000, 6.0, 6.0), own)
    assert (ahead["speedup"], ahead["bound"], ahead["interval"]) == (1.0, "at least", None)
    behind = one_speedup(rung(1000, 1.0, 1.0), own)
    assert (behind["speedup"], behind["bound"]) == (0.25, "at most")
    assert one_speedup(rung(1000, 1.0, 1.0), [rung(1000, 2.0, math.nan)])["speedup"] is None
    assert one_speedup(rung(4000, 4.0, 4.0), [rung(500, 6.0, math.nan), *own]) == found, "one budget diverged, not all"


def test_measurements_with_different_numbers_of_seeds_share_some() -> None:
    """The first ones: seeds are counted from 0."""
    own = [rung(1000, 5.0, 5.5), rung(2000, 4.0, 4.5), rung(4000, 3.0, 3.5)]
    found = one_speedup(rung(4000, 4.0, 4.0), own)
    assert one_speedup(rung(4000, 4.0, 4.0, 9.0), own) == found
    assert one_speedup(rung(4000, 4.0, 4.0), [*own[:2], rung(4000, 3.0, 3.5, 1.0)]) == found
    assert one_speedup(rung(4000, 4.0, 4.0), [rung(1000, 5.0), *own[1:]])["interval"] is None


def measurement(arm: str, contender: str, steps: int, *test: float) -> dict[str, Any]:
    place = {"size": "1m", "context": 256, "budget": steps / 1024, "block_parameters": 2**20}
    return {**place, "arm": arm, "contender": contender, "steps": steps, "tokens": 1024 * steps, "test": list(test)}


def test_the_speedup_in_seconds_is_that_in_tokens_over_the_ratio_of_the_steps() -> None:
    """Of the steps timed together at the same size and context, compiled where the baseline's run was."""
    measured = [
        measurement("gpt", "gpt-adamw", 320, 5.0, 5.1),
        measurement("gpt", "gpt-adamw", 1280, 3.0, 3.1),
        *(measurement("ngpt", "ngpt-adam", 160 * 2**k, 5.0 - k, 5.15 - k) for k in range(4)),
    ]

    def cost(compiled: bool, ratio: float, size: str = "1m", base: str = "gpt-adamw") -> dict[str, Any]:
        return {"size": size, "context": 256, "compiled": compiled, "ratios": {base: {"ngpt-adam": ratio}}}

    wrong = [cost(False, 9.0, size="4m"), cost(True, 9.0, base="gpt-muon"), {**cost(False, 9.0), "context": 1024}]
    short, long = all_speedups(measured, [*wrong, cost(False, 1.25), cost(True, 0.8)])
    assert long["seconds"] == pytest.approx(long["speedup"] / 0.8)
    assert long["seconds_interval"] == pytest.approx([edge / 0.8 for edge in long["interval"]])
    assert short["seconds"] == pytest.approx(short["speedup"] / 1.25)
    unknown = list(all_speedups(measured, wrong))
    assert [(row["seconds"], row["seconds_interval"]) for row in unknown] == [(None, None)] * 2
    assert [row["speedup"] for row in unknown] == [short["speedup"], long["speedup"]]


def rows(speedup: Any, budgets: tuple[float, ...], contexts: tuple[int, ...] = (256,)) -> list[dict[str, Any]]:
    return [
        {"baseline": "g", "contender": "n", "budget": b, "context": c, "block_parameters": n,
         "speedup": speedup(b, c, n), "bound": None}
        for b, c, n in itertools.product(budgets, contexts, (3e5, 1e6))
    ]  # fmt: skip


def test_growth_finds_the_powers_that_made_the_points() -> None:
    fit = growth(rows(lambda b, c, n: 1.5 * b**0.2 * c**0.3 * n**-0.1, (5, 10, 20), (256, 1024)))["g -> n"]
    assert fit["points"] == 12
    assert fit["power"] == pytest.approx({"budget": 0.2, "context": 0.3, "block_parameters": -0.1})
    assert all(error < 1e-6 for error in fit["error"].values())


def test_growth_does_not_tell_budget_from_size_where_all_points_have_the_same_tokens() -> None:
    """But for rounding to whole updates."""
    points = [
        {"baseline": "g", "contender": "n", "budget": 327_680 / n * (1 + slip), "context": 256, "block_parameters": n,
         "speedup": 1.1 + slip, "bound": None}
        for n, slip in ((262_144, 0.0), (1_048_576, 1e-4), (3_538_944, -2e-4), (11_468_800, 1e-4))
    ]  # fmt: skip
    fit = growth(points)["g -> n"]
    assert fit["power"] == {"budget": None, "block_parameters": None, "context": None}


def test_growth_says_what_it_cannot_know() -> None:
    found = rows(lambda b, c, n: b**0.5, (5, 10))
    found[0]["bound"] = "at least"
    fit = growth(found)["g -> n"]
    assert (fit["points"], fit["left_out"]) == (3, 1)
    assert fit["power"] == {
        "budget": pytest.approx(0.5),
        "block_parameters": pytest.approx(0, abs=1e-9),
        "context": None,
    }
    assert fit["error"] == {"budget": None, "block_parameters": None, "context": None}, "no points to spare"
    assert growth(found[:1])["g -> n"]["power"] == {"budget": None, "block_parameters": None, "context": None}
