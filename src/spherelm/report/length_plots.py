"""The figure of loss over the length of the window, also beyond the length trained on (nGPT paper, Fig. 13)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from spherelm.models import NAMES
from spherelm.report.drawing import BACKGROUND, COLOURS, FG, Array, Drawing, legend_above

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LOOKS = (("-", "o"), ("--", "s"), (":", "^"), ("-.", "D"))


@dataclass(frozen=True)
class LengthLine:
    """One arm with one way to place positions: `changes` at `lengths`, one array a seed; `look`: 0 to 3."""

    arm: str
    lengths: Array
    changes: Sequence[Array]
    label: str
    look: int


def change_over_length(lines: Sequence[LengthLine], trained: int, key: str, title: str, description: str) -> Drawing:
    """How the loss (nats per token, on the same tokens) changes with the length; every seed thin, the mean thick."""

    def draw(figure: Figure) -> None:
        ax = figure.add_subplot()
        for line in lines:
            colour, stack = COLOURS[line.arm], np.stack(list(line.changes))
            dashes, marker = LOOKS[line.look]
            for seed in stack if len(stack) > 1 else ():
                ax.plot(line.lengths, seed, color=colour, linewidth=0.5, alpha=0.35, linestyle=dashes)
            ax.plot(
                line.lengths,
                stack.mean(axis=0),
                color=colour,
                linestyle=dashes,
                marker=marker,
                markersize=3.6,
                markerfacecolor=BACKGROUND if line.look else colour,
                label=f"{NAMES[line.arm]}, {line.label}",
            )
        ax.axvline(trained, color=FG, linewidth=0.9, linestyle=(0, (4, 3)))
        lengths = sorted({int(length) for line in lines for length in line.lengths})
        ax.set_xscale("log")
        ax.set_xticks(lengths, [f"{length:,}" for length in lengths], minor=False)
        ax.minorticks_off()
        ax.set_xlabel("tokens of a window")
        ax.set_ylabel("loss less that as trained at\nthe trained length (nats per token)")
        legend_above(figure, ax, columns=2)

    return Drawing(draw, key, title, description)
