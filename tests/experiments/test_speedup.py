"""How many fewer tokens: exact cases, bounds, and that the two arms are treated alike."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy import stats

from spherelm.experiments.speedup import CurvePoint, Reach, interval, mean_curve, speedup, tokens_to_reach, winner

NAN = math.nan
CURVE = [(100.0, 4.0), (400.0, 3.0), (1600.0, 2.0)]
SWAPPED = {"at least": "at most", "at most": "at least", None: None}


@pytest.mark.parametrize(
    ("target", "tokens", "bound"),
    [
        (3.5, 200.0, None),  # half way in loss is half way in log tokens
        (3.0, 400.0, None),
        (2.25, 400 * 4**0.75, None),
        (2.0, 1600.0, None),
        (4.0, 100.0, "at most"),  # it may have been there before its first point
        (9.0, 100.0, "at most"),
        (1.9, 1600.0, "at least"),
    ],
)
def test_the_crossing_is_interpolated_in_the_logarithm_of_tokens(
    target: float, tokens: float, bound: str | None
) -> None:
    reach = tokens_to_reach(CURVE, target)
    assert reach.tokens == pytest.approx(tokens, rel=1e-12)
    assert reach.bound == bound
    assert tokens_to_reach(CURVE[::-1], target) == reach, "the order of the points does not matter"


def test_the_first_crossing_counts() -> None:
    bumpy = [(100.0, 4.0), (200.0, 3.0), (400.0, 3.5), (800.0, 2.0)]
    assert tokens_to_reach(bumpy, 3.0) == Reach(200.0)
    assert tokens_to_reach([(10.0, 3.0), (20.0, 3.0), (40.0, 2.0)], 3.0) == Reach(10.0, "at most")
    assert tokens_to_reach([(10.0, 4.0), (20.0, 4.0), (40.0, 2.0)], 3.0).tokens == pytest.approx(20 * math.sqrt(2))


def test_runs_that_diverged_are_no_points_of_the_curve() -> None:
    assert tokens_to_reach([(50.0, NAN), *CURVE, (200.0, NAN)], 3.5) == tokens_to_reach(CURVE, 3.5)
    assert tokens_to_reach([(50.0, NAN), (100.0, 3.0)], 3.5) == Reach(100.0, "at most")


def test_one_point_bounds_only() -> None:
    assert tokens_to_reach([(100.0, 3.0)], 2.0) == Reach(100.0, "at least")
    assert tokens_to_reach([(100.0, 3.0)], 3.0) == Reach(100.0, "at most")


@given(st.floats(1, 10), st.floats(0.05, 1), st.floats(1e3, 1e9))
def test_a_loss_that_is_linear_in_log_tokens_is_met_exactly(start: float, slope: float, tokens: float) -> None:
    curve = [(10.0**k, start - slope * k) for k in range(2, 11)]
    reach = tokens_to_reach(curve, start - slope * math.log10(tokens))
    assert reach.tokens == pytest.approx(tokens, rel=1e-6)


falling = st.lists(st.floats(0.01, 1), min_size=2, max_size=6).map(
    lambda drops: [(100.0 * 2**i, 6 - sum(drops[: i + 1])) for i in range(len(drops))]
)


@given(falling, st.floats(0, 6), st.floats(0, 6))
def test_a_lower_loss_takes_more_tokens(curve: list[CurvePoint], one: float, other: float) -> None:
    low, high = sorted((one, other))
    assert tokens_to_reach(curve, low).tokens >= tokens_to_reach(curve, high).tokens * (1 - 1e-12)


@given(falling, st.floats(0, 6), st.floats(0.01, 100))
def test_the_unit_of_tokens_does_not_matter(curve: list[CurvePoint], target: float, unit: float) -> None:
    reach = tokens_to_reach(curve, target)
    other = tokens_to_reach([(tokens * unit, loss) for tokens, loss in curve], target)
    assert other.tokens == pytest.approx(reach.tokens * unit, rel=1e-9)
    assert other.bound == reach.bound


@given(st.lists(st.floats(0.2, 5), min_size=2, max_size=8), st.floats(0.5, 0.99))
def test_the_interval_is_students_on_logarithms(ratios: list[float], confidence: float) -> None:
    """Against scipy's own interval of a one-sample t test; nearly equal ratios, where it warns, apart."""
    logs = np.log(ratios)
    assume(logs.std() > 1e-6)
    wanted = stats.ttest_1samp(logs, 0.0).confidence_interval(confidence)
    low, high = interval(ratios, confidence) or (NAN, NAN)
    assert low == pytest.approx(math.exp(wanted.low), rel=1e-9)
    assert high == pytest.approx(math.exp(wanted.high), rel=1e-9)


def test_the_interval_of_known_numbers() -> None:
    """Three ratios 1, 2, 4: mean log ln 2, standard error ln 2 / sqrt(3), t(0.975, 2) = 4.302652730 from a table."""
    half = 4.302652730 * math.log(2) / math.sqrt(3)
    assert interval([1.0, 2.0, 4.0]) == pytest.approx((2 * math.exp(-half), 2 * math.exp(half)), rel=1e-8)
    assert interval([1.5, 1.5]) == pytest.approx((1.5, 1.5))
    assert interval([1.5]) is None
    assert interval([]) is None


def test_the_mean_curve_is_over_shared_points() -> None:
    curves = [[(10.0, 4.0), (20.0, 3.0), (30.0, 2.0)], [(20.0, 2.0), (10.0, 3.0), (15.0, 9.0)]]
    assert mean_curve(curves) == [(10.0, 3.5), (20.0, 2.5)]
    assert mean_curve(curves[:1]) == curves[0]


@pytest.mark.parametrize(
    ("gpt", "ngpt", "best"),
    [
        ([3.0, 3.2], [3.0, 3.1], "ngpt"),
        ([3.0, 3.0], [3.0, 3.1], "gpt"),
        ([3.0, NAN], [5.0, 5.0], "ngpt"),
        ([3.0], [NAN], "gpt"),
        ([NAN], [NAN], "gpt"),
        ([3.0], [3.0], "gpt"),
    ],
)
def test_the_lower_mean_wins_and_diverging_loses(gpt: list[float], ngpt: list[float], best: str) -> None:
    assert winner({"gpt": gpt, "ngpt": ngpt}) == best


def test_one_seed_by_hand() -> None:
    """nGPT at 400 tokens: 3.5, at 1600: 2.5; GPT ends at 3.0 after 1600: nGPT needs 800, half as many."""
    result = speedup({"gpt": [3.0], "ngpt": [2.5]}, 1600, [[(400.0, 3.5), (1600.0, 2.5)]], 1.25, "schedule-ends")
    assert result.pop("by_seed") == pytest.approx([2.0])
    assert result == {
        "winner": "ngpt",
        "method": "schedule-ends",
        "bound": None,
        "tokens_to_reach": pytest.approx(800.0),
        "tokens": pytest.approx(2.0),
        "steps": pytest.approx(2.0),
        "tokens_interval": None,
        "seconds": pytest.approx(1.6),
        "seconds_interval": None,
    }


def test_three_seeds_by_hand() -> None:
    """Each seed against the GPT run with the same seed; the headline from the means."""
    curves = [[(400.0, 3.5), (1600.0, 2.5)], [(400.0, 3.5), (1600.0, 2.5)], [(400.0, 3.5), (1600.0, 2.5)]]
    result = speedup({"gpt": [3.0, 3.25, 2.75], "ngpt": [2.5] * 3}, 1600, curves, 2.0, "in-run")
    ratios = [2.0, 4**0.75, 4**0.25]
    assert result["by_seed"] == pytest.approx(ratios)
    assert result["tokens"] == pytest.approx(2.0)
    assert result["tokens_interval"] == pytest.approx(interval(ratios))
    assert result["seconds_interval"] == pytest.approx([edge / 2 for edge in interval(ratios) or ()])
    assert result["method"] == "in-run"


def test_where_gpt_wins_the_ratio_is_below_one() -> None:
    result = speedup({"gpt": [2.5], "ngpt": [3.0]}, 1600, [[(400.0, 3.5), (1600.0, 2.5)]], 1.25, "schedule-ends")
    assert result["winner"] == "gpt"
    assert result["tokens_to_reach"] == pytest.approx(800.0)
    assert result["tokens"] == pytest.approx(0.5)
    assert result["seconds"] == pytest.approx(0.4)


@pytest.mark.parametrize(("best", "bound", "tokens"), [("ngpt", "at least", 4.0), ("gpt", "at most", 0.25)])
def test_an_arm_that_is_ahead_from_the_start_bounds_the_ratio(best: str, bound: str, tokens: float) -> None:
    worse = "gpt" if best == "ngpt" else "ngpt"
    result = speedup({worse: [4.0], best: [2.5]}, 1600, [[(400.0, 3.5), (1600.0, 2.5)]], 1.0, "schedule-ends")
    assert (result["winner"], result["bound"], result["tokens"]) == (best, bound, tokens)
    assert result["by_seed"] == [None]


def test_a_seed_without_a_crossing_leaves_no_interval() -> None:
    """The winner's mean is lower, but in the second pair it ends higher."""
    curves = [[(400.0, 3.5), (1600.0, 2.5)], [(400.0, 3.5), (1600.0, 3.1)]]
    result = speedup({"gpt": [3.0, 3.0], "ngpt": [2.5, 3.1]}, 1600, curves, 1.0, "schedule-ends")
    assert result["by_seed"] == [pytest.approx(2.0), None]
    assert result["tokens_interval"] is None
    assert result["tokens"] is not None


@pytest.mark.parametrize(("gpt", "ngpt"), [([NAN], [3.0]), ([3.0], [NAN]), ([NAN], [NAN]), ([3.0, NAN], [3.0, 3.0])])
def test_against_an_arm_that_diverged_there_is_no_ratio(gpt: list[float], ngpt: list[float]) -> None:
    result = speedup({"gpt": gpt, "ngpt": ngpt}, 1600, [[(1600.0, 3.0)]] * len(gpt), 1.0, "schedule-ends")
    for name in ("tokens", "steps", "seconds", "tokens_interval", "seconds_interval", "tokens_to_reach", "bound"):
        assert result[name] is None, name
    assert result["by_seed"] == []


@given(st.lists(st.tuples(falling, st.floats(-0.2, 5)), min_size=1, max_size=4), st.floats(0.5, 2))
def test_the_arms_play_symmetric_roles(seeds: list[tuple[list[CurvePoint], float]], ratio: float) -> None:
    """With the arms' names exchanged, every ratio is its inverse and every bound the other one."""
    length = min(len(curve) for curve, _ in seeds)
    curves = [curve[:length] for curve, _ in seeds]
    ends = [curve[-1][1] for curve in curves]
    others = [end + behind for end, (_, behind) in zip(ends, seeds, strict=True)]
    assume(np.mean(ends) < np.mean(others))
    one = speedup({"gpt": others, "ngpt": ends}, 5000, curves, ratio, "schedule-ends")
    two = speedup({"gpt": ends, "ngpt": others}, 5000, curves, 1 / ratio, "schedule-ends")
    assert (one["winner"], two["winner"]) == ("ngpt", "gpt")
    assert two["bound"] == SWAPPED[one["bound"]]
    assert two["tokens_to_reach"] == one["tokens_to_reach"]
    for name in ("tokens", "steps", "seconds"):
        assert two[name] == pytest.approx(1 / one[name])
    assert two["by_seed"] == [None if value is None else pytest.approx(1 / value) for value in one["by_seed"]]
    for name in ("tokens_interval", "seconds_interval"):
        assert (one[name] is None) == (two[name] is None)
        if one[name] is not None:
            assert list(two[name]) == pytest.approx([1 / edge for edge in one[name]][::-1])
