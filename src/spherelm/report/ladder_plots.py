"""Final losses, or scores, of many runs over a number that was chosen for them: token budget or peak learning rate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from spherelm.models import NAMES
from spherelm.report.drawing import BACKGROUND, COLOURS, FG, Array, Drawing, legend_above, readable_ticks

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LOOKS = (("-", "o"), ("--", "s"), (":", "^"), ("-.", "D"))


@dataclass(frozen=True)
class Series:
    """One line: ascending `x`, and at each the values of all seeds; `look` tells lines of one arm apart."""

    arm: str
    label: str
    x: Array
    values: Sequence[Array]
    look: int = 0


def ends_of_runs(
    series: Sequence[Series], x_label: str, y_label: str, tokens: bool, key: str, title: str, description: str,
    chance: float | None = None,
) -> Drawing:  # fmt: skip
    """Means over seeds, every seed as a small dot, over a logarithmic x axis; `tokens`: the axis counts tokens.

    chance: a dashed line, what guessing would score.
    """

    def draw(figure: Figure) -> None:
        ax = figure.add_subplot()
        for line in series:
            dashes, marker = LOOKS[line.look % len(LOOKS)]
            colour = COLOURS[line.arm]
            for x, values in zip(line.x, line.values, strict=True):
                if len(values) > 1:
                    ax.plot(
                        np.full(len(values), x), values, color=colour, linestyle="", marker=".", markersize=3, alpha=0.5
                    )
            mean = np.array([values.mean() for values in line.values])
            label = NAMES[line.arm] + (f", {line.label}" if line.label else "")
            ax.plot(line.x, mean, color=colour, linestyle=dashes, marker=marker, markersize=4.5, label=label,
                    markerfacecolor=BACKGROUND if line.look else colour)  # fmt: skip
        if chance is not None:
            ax.axhline(chance, color=FG, linewidth=0.8, linestyle=(0, (4, 3)), label="chance")
        ax.set_xscale("log")
        _few_ticks(ax, np.unique(np.concatenate([line.x for line in series])), tokens)
        ax.set_xlabel(x_label)
        ax.set_ylabel(y_label)
        legend_above(figure, ax, columns=1 if any(len(line.label) > 18 for line in series) else 2)

    return Drawing(draw, key, title, description)


def _few_ticks(ax: Any, x: Array, tokens: bool) -> None:
    """The values themselves as ticks, as far as they do not crowd."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    kept: list[float] = []
    span = max(float(np.log(x[-1] / x[0])), 1e-9)
    for value in x:
        if not kept or np.log(value / kept[-1]) > 0.09 * span:
            kept.append(float(value))
    ax.xaxis.set_major_locator(FixedLocator(kept))
    ax.xaxis.set_minor_locator(NullLocator())
    if tokens:
        readable_ticks(ax.xaxis, units=True)
    else:
        ax.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
