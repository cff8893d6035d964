"""What all figures share: tick labels that can be told apart and are true, and lines of one point that can be seen."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spherelm.report import ladder_plots, plots, sweep_plots
from spherelm.report.drawing import Drawing, tick_labels

pytest.importorskip("matplotlib", reason="figures need matplotlib: pip install '.[report]'")

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LETTERS = {"k": 1e3, "M": 1e6, "B": 1e9, "T": 1e12, "": 1.0}


def read(label: str) -> float:
    """The number that a label says."""
    found = re.fullmatch(r"(-?[\d,]+(?:\.\d+)?)([kMBT]?)", label)
    assert found, label
    return float(found[1].replace(",", "")) * LETTERS[found[2]]


@given(
    start=st.integers(-40, 40),
    count=st.integers(2, 9),
    step=st.sampled_from([1, 2, 2.5, 5]),
    power=st.integers(-6, 11),
    units=st.booleans(),
)
def test_labels_are_told_apart_and_true(start: int, count: int, step: float, power: int, units: bool) -> None:
    width = step * 10.0**power
    values = [(start + k) * width for k in range(count)]
    labels = tick_labels(values, units)
    assert len(set(labels)) == count
    for value, label in zip(values, labels, strict=True):
        assert abs(read(label) - value) <= 0.051 * width
    if width >= 1 and not units:
        assert not any("." in label for label in labels) or step == 2.5


@given(st.lists(st.floats(1e3, 1e12), min_size=1, max_size=6))
def test_any_numbers_are_told_apart_as_far_as_they_differ(values: list[float]) -> None:
    ascending = sorted({float(f"{value:.3g}") for value in values})
    labels = tick_labels(ascending, True)
    assert [read(label) for label in labels] == sorted({read(label) for label in labels})
    assert len(labels) == len(ascending)


def x_labels(drawing: Drawing, ax: int = 0) -> list[str]:
    figure = drawing._drawn()
    figure.canvas.draw()
    axes = figure.axes[ax]
    low, high = axes.get_xlim()
    return [label.get_text() for label in axes.get_xticklabels() if low <= label.get_position()[0] <= high]


@pytest.mark.parametrize("unit", ["seconds", "tokens"])
@pytest.mark.parametrize("end", [0.7, 1.2, 6.0, 130.0, 2345.0, 246_000.0, 1.2e9])
def test_ticks_of_loss_curves_of_any_length(unit: str, end: float) -> None:
    x = np.linspace(0, end, 20)
    curve = plots.Curve(x, 3 + np.exp(-x / end))
    labels = x_labels(plots.loss_curves(plots.LossPlot({"gpt": [curve]}, {"gpt": curve}, unit=unit), "k", "t", "d"))
    assert len(labels) > 2
    assert [read(label) for label in labels] == sorted({read(label) for label in labels})


def test_ticks_of_budgets_and_of_sweeps() -> None:
    x = np.array([1_229_000.0, 1_638_000.0, 2_458_000.0])
    series = [ladder_plots.Series("gpt", "", x, [np.array([4.0])] * 3)]
    labels = x_labels(ladder_plots.ends_of_runs(series, "x", "y", True, "k", "t", "d"))
    assert [read(label) for label in labels] == pytest.approx(x, rel=0.02)
    short = (np.array([0.0, 64.0, 96.0]), np.array([8.0, 5.0, 4.0]))
    labels = x_labels(sweep_plots.small_multiples([sweep_plots.Panel("a", "gpt", [short], ())], "k", "t", "d"))
    assert len(set(labels)) == len(labels) > 1


def drawn(drawing: Drawing) -> list[tuple[float, float]]:
    """The single points that can be seen, within the axes."""
    seen = []
    for ax in drawing._drawn().axes:
        for line in ax.lines:
            ((x,), (y,)) = line.get_data() if len(line.get_xdata()) == 1 else ((np.nan,), (np.nan,))
            if line.get_marker() not in ("", "None") and ax.get_ylim()[0] <= y <= ax.get_ylim()[1]:
                seen.append((float(x), float(y)))
    return seen


def test_a_run_with_one_validation_is_a_point_on_a_sweeps_page() -> None:
    """However far apart the runs end: without a second validation there is nothing else to show of them."""
    ends = [4.0, 4.1, 7.5]
    runs = [(np.array([0.0, 640.0]), np.array([8.0, end])) for end in ends]
    panels = [sweep_plots.Panel(str(end), "gpt", [run], ()) for end, run in zip(ends, runs, strict=True)]
    assert drawn(sweep_plots.small_multiples(panels, "k", "t", "d")) == [(640.0, end) for end in ends]


def test_a_model_of_one_layer_shows_its_numbers() -> None:
    one = {"gpt": {"Q": [np.array([5.0])]}}
    unmarked = plots.condition_numbers(one, ["Q"], "k", "t", "d", {"gpt": {"Q": [np.array([3.0])]}})
    assert sorted(drawn(unmarked)) == [(1.0, 3.0), (1.0, 5.0)]


def test_lines_of_several_points_stay_as_they_are() -> None:
    def draw(figure: Figure) -> None:
        figure.add_subplot().plot([1, 2, 3], [1, 2, np.nan])

    (line,) = Drawing(draw, "k", "t", "d")._drawn().axes[0].lines
    assert line.get_marker() == "None"
