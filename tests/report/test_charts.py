"""Figures: small, deterministic SVG that one page can hold many of,
and everything on them can be seen and told apart.
"""

from __future__ import annotations

import io
import re
import xml.etree.ElementTree as ET
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from spherelm.report.charts import Bars, GuideLine, Line, Panel, chart, line_of, ranked
from spherelm.report.drawing import COLOURS, SECOND, Figure
from spherelm.report.svg import VARIABLES, standalone

pytest.importorskip("matplotlib", reason="figures need matplotlib: pip install '.[report]' in a clone of spherelm")

SVG = "{http://www.w3.org/2000/svg}"
LAYERS = np.arange(1.0, 7.0)
SEEDS = [np.linspace(0.1, 0.4, 6), np.linspace(0.2, 0.3, 6)]


def everything(key: str = "k") -> Figure:
    """A figure with all that a panel can have."""
    x = np.linspace(0, 2e6, 500)
    curve = 3 + np.exp(-x / 4e5)
    lines = Panel([line_of(arm, x, [curve] * 2, look=i, marker="") for i, arm in enumerate(COLOURS)], scale="units")
    bands = Panel([Line(LAYERS, SEEDS, SECOND, "<second>", band=(SEEDS[0], SEEDS[1]))], "layer", scale="layers", low=0)
    bars = Panel(bars=[Bars(np.arange(9.0), COLOURS["gpt"])], rules=[GuideLine(4.0, upright=True, note="the middle")])
    dots = Panel([Line(LAYERS, SEEDS[:1], SECOND, dots=(LAYERS, LAYERS))], scale="values", log=True)
    return chart(
        key, "A <title>", "Is <b>what</b> &amp; how", [lines, bands, bars, dots], columns=2, share="row", y="y"
    )


@pytest.fixture(scope="module")
def figure() -> Figure:
    return everything()


def labels(figure: Figure, number: int = 0, axis: str = "x") -> list[str]:
    """The tick labels within the limits of one of the figure's axes."""
    canvas = figure.drawn()
    canvas.canvas.draw()
    ax = canvas.axes[number]
    low, high = getattr(ax, f"get_{axis}lim")()
    ticks = zip(getattr(ax, f"get_{axis}ticks")(), getattr(ax, f"get_{axis}ticklabels")(), strict=True)
    return [label.get_text() for place, label in ticks if low <= place <= high]


def points(figure: Figure) -> list[tuple[float, float]]:
    """The single points that can be seen, within the axes."""
    seen = []
    for ax in figure.drawn().axes:
        for line in ax.lines:
            x, y = (np.asarray(values, dtype=float) for values in line.get_data())
            inside = np.isfinite(y) & (y >= ax.get_ylim()[0]) & (y <= ax.get_ylim()[1])
            if line.get_marker() not in ("", "None") and inside.sum() == np.isfinite(y).sum() == 1:
                seen.append((float(x[inside][0]), float(y[inside][0])))
    return seen


def test_it_is_small_well_formed_and_named(figure: Figure) -> None:
    root = ET.fromstring(figure.svg)
    assert len(figure.svg) < 40_000
    assert (root.find(f"{SVG}title").text, root.find(f"{SVG}desc").text) == ("A <title>", "Is what & how")
    assert root.get("aria-labelledby") == "k-title k-desc"
    assert all(element.get("id", "k-").startswith("k-") for element in root.iter())


def test_text_is_text_and_nothing_is_fetched(figure: Figure) -> None:
    assert ">the middle<" in figure.svg
    assert "&lt;second" not in figure.svg, "of its axes only the first panel's are in the legend"
    assert figure.svg.count("http") == 1
    assert not re.search("<style|font-family|nan|inf[^o]", figure.svg)


def test_every_colour_is_a_variable(figure: Figure) -> None:
    assert not re.search(r"(fill|stroke): (#|black|white|rgb)", figure.svg)
    used = set(re.findall(r"var\((--[a-z-]+)\)", figure.svg))
    assert {"--c-gpt", "--c-ngpt", "--c-second"} <= used <= {name for name, _, _ in VARIABLES.values()}
    alone = standalone(figure.svg)
    ET.fromstring(alone)
    assert all(f"{name}:{light};" in alone and f"{name}:{dark};" in alone for name, light, dark in VARIABLES.values())


def test_same_numbers_give_the_same_bytes_and_other_keys_other_ids(figure: Figure) -> None:
    assert everything().svg == figure.svg
    ids = [set(re.findall(r' id="([^"]+)"', svg)) for svg in (figure.svg, everything("other").svg)]
    assert len(ids[0]) == len(ids[1]) > 0
    assert not ids[0] & ids[1]


def test_an_image_is_the_figure_in_the_light_colours_and_leaves_matplotlib_as_it_was(figure: Figure) -> None:
    from matplotlib.colors import get_named_colors_mapping
    from matplotlib.image import imread

    before = dict(get_named_colors_mapping())
    pixels = (255 * imread(io.BytesIO(figure.png()))[..., :3]).round().astype(int).reshape(-1, 3)
    seen = {"#" + bytes(pixel.tolist()).hex() for pixel in pixels}
    light = {name: value for name, value, _ in VARIABLES.values()}
    assert {light["--c-ngpt"], light["--c-second"], light["--bg"], light["--fg"]} <= seen
    assert not seen & set(VARIABLES), "stand-ins that were not replaced"
    assert dict(get_named_colors_mapping()) == before


def test_seeds_are_drawn_with_their_mean_and_what_is_not_finite_is_a_gap() -> None:
    seeds = [np.array([5.0, np.inf, 7.0]), np.array([3.0, 4.0, np.nan])]
    ax = chart("k", "t", "c", [Panel([line_of("gpt", [1, 2, 3], seeds)], scale="layers")]).drawn().axes[0]
    *thin, mean = ax.lines
    np.testing.assert_array_equal([line.get_ydata() for line in thin], [[5, np.nan, 7], [3, 4, np.nan]])
    np.testing.assert_array_equal(mean.get_ydata(), [4, np.nan, np.nan])


def test_bars_are_the_percentages_of_common_bins() -> None:
    values = [np.array([0.0, 1.0, 1.0, 2.0]), np.array([2.0, 4.0])]
    panel = Panel(bars=[Bars(of_arm, colour) for of_arm, colour in zip(values, COLOURS.values(), strict=True)])
    stairs = [patch.get_data() for patch in chart("k", "t", "c", [panel], legend=0).drawn().axes[0].patches]
    assert [float(found.values.sum()) for found in stairs] == pytest.approx([100] * 4)
    assert all((found.edges == stairs[0].edges).all() for found in stairs)
    assert max(stairs[0].values) == 50


def test_a_line_over_ranks_ends_near_both_ends() -> None:
    line = ranked("ngpt", [np.arange(10.0), np.arange(10.0) + 2])
    assert (np.asarray(line.x)[[0, -1]] == [5, 95]).all()
    np.testing.assert_array_equal(line.seeds[0], np.arange(10.0) + 1)


@pytest.mark.parametrize("end", [0.7, 130.0, 246_000.0, 1.2e9])
def test_ticks_of_curves_of_any_length_can_be_told_apart(end: float) -> None:
    x = np.linspace(0, end, 20)
    for scale in ("units", ""):
        found = labels(chart("k", "t", "c", [Panel([line_of("gpt", x, [x])], scale=scale)]))
        assert len(set(found)) == len(found) > 2


def test_the_values_themselves_are_ticks_of_a_logarithmic_axis() -> None:
    budgets, rates = [1_228_800.0, 1_638_400.0, 2_457_600.0], [0.001, 0.0012, 0.01, 0.02]
    panels = [Panel([line_of("gpt", x, [x])], scale=s) for x, s in ((budgets, "tokens"), (rates, "values"))]
    figure = chart("k", "t", "c", panels, columns=2, share="row")
    assert labels(figure) == ["1.23M", "1.64M", "2.46M"]
    assert labels(figure, 1) == ["0.001", "0.01", "0.02"], "one that would crowd another is left out"


@pytest.mark.parametrize(("values", "least"), [([1.0, 1.0, 1.0], 2), ([2.0, 9.0], 2), ([1e-7, 1e-3], 3)])
def test_a_logarithmic_axis_has_labels_whatever_it_spans(values: list[float], least: int) -> None:
    found = labels(
        chart("k", "t", "c", [Panel([line_of("gpt", np.arange(len(values)), [values])], log=True)]), axis="y"
    )
    assert len(set(found)) == len(found) >= least
    assert any(values[0] / 5 <= float(label.replace(",", "")) <= 5 * values[-1] for label in found)


def test_panels_on_shared_axes_show_all_layers_of_all_of_them() -> None:
    lines: list[Any] = [line_of("gpt", [2.0, 6.0], [[3.0, 50.0]]), line_of("gpt", [1.0], [[200.0]])]
    axes = chart("k", "t", "c", [Panel([line], scale="layers", log=True) for line in lines], columns=2).drawn().axes
    for ax in axes:
        assert ax.get_xlim()[0] < 1 < 6 < ax.get_xlim()[1]
        assert ax.get_ylim()[0] <= 3 < 200 <= ax.get_ylim()[1]


def test_a_single_point_is_seen_and_a_line_stays_one() -> None:
    panels = [Panel([Line([640.0], [[end]], SECOND)], low=4, high=8) for end in (4.0, 7.5)]
    assert points(chart("k", "t", "c", panels, columns=2)) == [(640.0, 4.0), (640.0, 7.5)]
    assert points(chart("k", "t", "c", [Panel([Line([1, 2, 3], [[1, 2, np.nan]], SECOND)])])) == []


def test_without_matplotlib_one_line_says_what_to_install(without: Callable[[str], None]) -> None:
    without("matplotlib")
    with pytest.raises(ValueError, match=r"pip install '\.\[report\]' in a clone of spherelm"):
        _ = everything("fresh").svg
