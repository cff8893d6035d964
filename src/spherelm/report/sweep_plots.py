"""The curves of all runs of a sweep as small multiples: each choice beside the one that all are compared with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from spherelm.report.drawing import COLOURS, MUTED, Array, Drawing, readable_ticks, thin

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLUMNS = 3
PANEL = (2.1, 1.7)  # inches

Curve = tuple[Array, Array]
"""Training tokens and validation loss (nats per token)."""


@dataclass(frozen=True)
class Panel:
    """One choice: its curves, one a seed, and those of the base, which are drawn behind them."""

    title: str
    arm: str
    curves: Sequence[Curve]
    base: Sequence[Curve]


def small_multiples(panels: Sequence[Panel], key: str, title: str, description: str) -> Drawing:
    """A panel for each choice, all with the same axes; untrained starts are left out, and what lies far above the rest."""
    rows = -(-len(panels) // COLUMNS)
    everything = [curve for panel in panels for curve in (*panel.curves, *panel.base)]

    def draw(figure: Figure) -> None:
        from matplotlib.ticker import MaxNLocator

        axes = figure.subplots(rows, min(COLUMNS, len(panels)), sharex=True, sharey=True, squeeze=False)
        for ax, panel in zip(axes.flat, panels, strict=False):
            for colour, width, curves in ((MUTED, 1.0, panel.base), (COLOURS[panel.arm], 1.2, panel.curves)):
                for tokens, loss in curves:
                    x, y = thin(tokens[tokens > 0], loss[tokens > 0])
                    ax.plot(x, y, color=colour, linewidth=width)
            ax.set_title(panel.title, fontsize=7)
        for ax in list(axes.flat)[len(panels) :]:
            ax.set_axis_off()
        axes.flat[0].set_ylim(*_limits(everything))
        figure.supxlabel("training tokens", fontsize=8.5)
        figure.supylabel("validation loss (nats per token)", fontsize=8.5)
        axes.flat[0].xaxis.set_major_locator(MaxNLocator(nbins=3))
        readable_ticks(axes.flat[0].xaxis, units=True)

    size = (PANEL[0] * min(COLUMNS, len(panels)) + 0.5, PANEL[1] * rows + 0.5)
    return Drawing(draw, key, title, description, size)


def _limits(curves: Sequence[Curve]) -> tuple[float, float]:
    """From below the lowest loss to above what most curves are after their first validation, and all that have no other."""
    drawn = [loss[tokens > 0] for tokens, loss in curves if (tokens > 0).any()]
    if not drawn:
        return 0.0, 1.0
    low = float(min(np.nanmin(loss) for loss in drawn))
    single = [loss[0] for loss in drawn if loss.size == 1]
    high = float(max([np.median([loss[0] for loss in drawn]), *single]))
    margin = 0.05 * max(high - low, 0.02)
    return low - margin, high + margin
