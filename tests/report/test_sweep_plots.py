"""Small multiples: a panel for each choice, readable limits, lines for every seed."""

from __future__ import annotations

import re

import numpy as np

from spherelm.report.sweep_plots import Curve, Panel, small_multiples


def curve(end: float) -> Curve:
    """From an untrained 8 down to `end`."""
    tokens = np.array([0.0, 1000.0, 2000.0, 3000.0])
    return tokens, np.array([8.0, end + 1, end + 0.3, end])


def test_every_choice_has_a_panel_with_its_seeds_and_the_base() -> None:
    base = [curve(4.0), curve(4.1)]
    panels = [
        Panel("base", "ngpt", base, ()),
        *(Panel(f"choice {k}", "ngpt", [curve(4.2 + k)], base) for k in range(3)),
    ]
    svg = small_multiples(panels, "sweep", "a title", "a description").svg
    assert all(f">choice {k}<" in svg for k in range(3))
    assert svg.count("<svg") == 1
    # Two seeds in the first panel, one and the base's two in each of the others, drawn as paths of their own.
    assert len(re.findall(r"<path [^>]*clip-path[^>]*>", svg)) >= 2 + 3 * 3
    assert ">7<" not in svg, "the untrained start is not drawn"


def test_runs_that_never_validated_leave_an_empty_panel() -> None:
    nothing = (np.array([0.0]), np.array([8.0]))
    assert "<svg" in small_multiples([Panel("diverged at once", "gpt", [nothing], ())], "empty", "t", "d").svg
