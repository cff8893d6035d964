"""The range of learning rates near the best, on curves whose range is known."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spherelm.experiments.robustness import best_between, tolerated, where_best


@given(st.floats(-6, -1), st.floats(0.05, 2.0), st.floats(1.0, 8.0))
def test_a_valley_with_straight_sides_has_the_width_that_its_slopes_say(
    centre: float, slope: float, best: float
) -> None:
    """loss = best (1 + slope |log10(rate) - centre|): within 2 % up to 0.02/slope decades to each side."""
    rates = [10 ** (centre + k / 4) for k in range(-8, 9)]
    points = [(rate, best * (1 + slope * abs(math.log10(rate) - centre))) for rate in rates]
    found = tolerated(points)
    assert found is not None
    assert math.log10(found.times) == pytest.approx(2 * min(0.02 / slope, 2.0), rel=1e-6)
    assert found.open_low == found.open_high == (0.02 / slope > 2.0)


def test_where_it_was_not_left_the_range_is_open() -> None:
    found = tolerated([(0.01, 4.0), (0.02, 4.04), (0.04, 4.5)])
    assert found is not None
    assert (found.low, found.open_low, found.open_high) == (0.01, True, False)
    assert 0.02 < found.high < 0.04
    assert str(found).startswith("at least 2.")


def test_it_ends_before_what_diverged() -> None:
    found = tolerated([(0.01, 5.0), (0.02, 4.0), (0.04, math.nan), (0.08, 4.0)])
    assert found is not None
    assert (found.high, found.open_high) == (0.02, False)
    assert 0.01 < found.low < 0.02
    assert str(found).endswith("0.02, beside a rate that diverged)")
    assert not str(found).startswith("at least")


def test_where_the_best_is_says_what_stands_beside_it() -> None:
    said = {
        (4.1, 4.0, 4.1, 4.3): "0.02 (by a parabola 0.02)",
        (4.0, 4.1, 4.2, 4.3): "0.01 (at the edge of what was tried)",
        (4.2, 4.1, 4.0, math.nan): "0.04 (beside a rate that diverged)",
        (4.2, 4.0, math.nan, 3.9): "0.08 (at the edge of what was tried)",
    }
    for losses, words in said.items():
        assert where_best(list(zip((0.01, 0.02, 0.04, 0.08), losses, strict=True))) == words


def test_one_point_has_no_range() -> None:
    assert tolerated([(0.01, 4.0), (0.02, math.nan)]) is None


@given(st.floats(-6, -1), st.floats(0.05, 2.0), st.floats(1.0, 8.0), st.floats(0.1, 0.9))
def test_the_best_rate_of_a_parabola_is_its_vertex(centre: float, bend: float, best: float, off: float) -> None:
    """Tried at rates of which none is the vertex, with uneven distances."""
    places = [centre + off * 0.3 + k for k in (-1.2, -0.7, -0.3, 0.0, 0.5, 1.1)]
    points = [(10**place, best + bend * (place - centre) ** 2) for place in places]
    found = best_between(points[::-1])
    assert found is not None
    assert math.log10(found) == pytest.approx(centre, abs=1e-4)


def test_a_minimum_that_is_not_enclosed_is_none() -> None:
    for losses in ([4.0, 4.1, 4.2], [4.2, 4.1, 4.0], [math.nan, 4.0, 4.1], [4.0, 4.0, 4.0], [math.nan] * 3):
        assert best_between(list(zip((0.01, 0.02, 0.04), losses, strict=True))) is None
    assert best_between([]) is None
    assert best_between([(0.01, 4.1), (0.02, 4.0), (0.04, 4.1)]) == pytest.approx(0.02)
