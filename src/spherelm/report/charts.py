"""One way to draw: panels of lines with seeds, bands, dots, bars and rules, under one legend.
Numbers in, a `Figure` out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from spherelm.models import ARM_NAMES
from spherelm.report.drawing import (
    BACKGROUND,
    COLOURS,
    FG,
    SIZE,
    Array,
    Figure,
    legend_above,
    log_ticks,
    own_ticks,
)
from spherelm.report.wording import si

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas

LOOKS = (("-", "o"), ("--", "s"), (":", "^"), ("-.", "D"), ((0, (5, 1, 1, 1, 1, 1)), "v"))
"""Dashes and markers that tell the lines of one colour apart."""

DOTTED, DASHED = (0, (1, 1.6)), (0, (4, 3))
POINTS = 240  # of a long curve, which no screen shows more of


@dataclass(frozen=True)
class Line:
    """A line over `x`: every seed thin, their mean thick. What is not finite leaves a gap.

    Attributes:
        x: Ascending, [points].
        seeds: An array [points] a seed.
        colour: One of `spherelm.report.drawing`.
        label: In the legend.
        dashes: As matplotlib has them; nothing for markers alone.
        marker: As matplotlib has it.
        hollow: Whether markers are empty.
        marker_size: In points.
        width, alpha: Of the thick line, in points, and how opaque it is.
        band: Lower and upper edge [points] of a band behind the line.
        dots: Places (x, y) of small dots behind the line.
        middle: What the thick line is of the seeds.
    """

    x: ArrayLike
    seeds: Sequence[ArrayLike]
    colour: str
    label: str = ""
    dashes: Any = "-"
    marker: str = ""
    hollow: bool = False
    marker_size: float = 3.8
    width: float = 1.6
    alpha: float = 1.0
    band: tuple[Array, Array] | None = None
    dots: tuple[ArrayLike, ArrayLike] | None = None
    middle: Callable[..., Any] = np.mean

    def draw(self, ax: Axes) -> None:
        """Put it on the axes."""
        x, colour = np.asarray(self.x, dtype=np.float64), self.colour
        stack = np.stack([np.asarray(seed, dtype=np.float64) for seed in self.seeds])
        stack = np.where(np.isfinite(stack), stack, np.nan)
        if self.band is not None:
            ax.fill_between(x, *self.band, color=colour, alpha=0.14, linewidth=0)
        if self.dots is not None:
            ax.plot(*self.dots, color=colour, linestyle="", marker="o", markersize=2.6, alpha=0.5)
        keep = np.unique(np.linspace(0, x.size - 1, min(x.size, POINTS)).round().astype(int))
        for seed in stack if len(stack) > 1 else ():
            ax.plot(x[keep], seed[keep], color=colour, linewidth=0.6, alpha=0.4, linestyle=self.dashes)
        looks: dict[str, Any] = {"linestyle": self.dashes, "linewidth": self.width, "alpha": self.alpha}
        if self.marker:
            looks |= {
                "marker": self.marker,
                "markersize": self.marker_size,
                "markerfacecolor": BACKGROUND if self.hollow else colour,
            }
        ax.plot(x[keep], self.middle(stack, axis=0)[keep], color=colour, label=self.label or None, **looks)


def line_of(arm: str, x: ArrayLike, seeds: Sequence[ArrayLike], name: str = "", look: int = 0, **fields: Any) -> Line:
    """A line of an arm: in its colour, with its name in the legend; look: which of `LOOKS`."""
    dashes, marker = LOOKS[look % len(LOOKS)]
    given = {"dashes": dashes, "marker": marker, "hollow": look > 0, **fields}
    return Line(x, seeds, COLOURS[arm], ARM_NAMES[arm] + (f", {name}" if name else ""), **given)


def ranked(arm: str, seeds: Sequence[ArrayLike], name: str = "", **fields: Any) -> Line:
    """A line of an arm through sorted values, over their rank in percent."""
    count = np.asarray(seeds[0]).size
    mean = np.mean(np.stack([np.asarray(seed) for seed in seeds]), axis=0)
    return line_of(arm, 100 * (np.arange(count) + 0.5) / count, [mean], name, **{"marker": "", **fields})


@dataclass(frozen=True)
class Bars:
    """The distribution of `values` as a histogram in percent; all of a panel have common bins."""

    values: Array
    colour: str
    label: str = ""

    def draw(self, ax: Axes, edges: Array) -> None:
        """Put it on the axes."""
        share = 100 * np.histogram(self.values, edges)[0] / self.values.size
        ax.stairs(share, edges, fill=True, color=self.colour, alpha=0.24)
        ax.stairs(share, edges, color=self.colour, linewidth=1.2, label=self.label or None)


@dataclass(frozen=True)
class GuideLine:
    """A dashed line across the axes at one value; `note`: written at an upright one's upper end."""

    at: float
    upright: bool = False
    colour: str = FG
    label: str = ""
    note: str = ""

    def draw(self, ax: Axes) -> None:
        """Put it on the axes."""
        line = ax.axvline if self.upright else ax.axhline
        line(self.at, color=self.colour, linewidth=0.9, linestyle=DASHED, label=self.label or None)
        if self.note:
            ax.annotate(self.note, (self.at, 1), (4, -2), xycoords=("data", "axes fraction"),
                        textcoords="offset points", va="top")  # fmt: skip


@dataclass(frozen=True)
class Panel:
    """One pair of axes.

    Attributes:
        lines, bars, rules: What is on it.
        x, y, title: Its labels.
        scale: "layers" (whole numbers), "whole" (the same, from 0), "units" (1.5M), "values" (a logarithmic axis whose
            ticks are the values of the lines; "tokens": with units), "percent" (0 to 100), or nothing particular.
        log: Whether the y axis is logarithmic.
        low, high: Limits of the y axis.
    """

    lines: Sequence[Line] = ()
    x: str = ""
    y: str = ""
    title: str = ""
    bars: Sequence[Bars] = ()
    rules: Sequence[GuideLine] = ()
    scale: str = ""
    log: bool = False
    low: float | None = None
    high: float | None = None

    @property
    def places(self) -> Array:
        """Where on the x axis the lines have points, ascending."""
        return np.unique(np.concatenate([np.asarray(line.x, dtype=np.float64) for line in self.lines] or [np.zeros(1)]))

    def draw(self, ax: Axes) -> None:
        """Put everything on the axes."""
        if self.log:
            ax.set_yscale("log")
        if self.bars:
            edges = np.histogram_bin_edges(np.concatenate([bars.values for bars in self.bars]), bins=60)
            for bars in self.bars:
                bars.draw(ax, edges)
            ax.grid(False, axis="x")
            ax.margins(y=0.14)  # for the note of a rule
        for line in self.lines:
            line.draw(ax)
        for rule in self.rules:
            rule.draw(ax)
        ax.set_xlabel(self.x)
        ax.set_ylabel(self.y)
        ax.set_title(self.title)

    def scale_axes(self, ax: Axes, x: Array) -> None:
        """Set limits and ticks, once all is drawn; x: `places`, of all panels where they share the axis."""
        from matplotlib.ticker import FuncFormatter, MaxNLocator

        if self.log:
            log_ticks(ax)
        if self.low is not None or self.high is not None:
            ax.set_ylim(self.low, self.high)
        if self.scale in ("layers", "whole"):
            low, margin = 0.0 if self.scale == "whole" else x[0], max(0.15, 0.04 * x[-1])
            ax.set_xlim(low - margin * (self.scale == "layers"), x[-1] + margin)
            ax.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True, min_n_ticks=1))
        elif self.scale in ("values", "tokens"):
            own_ticks(ax, x, si if self.scale == "tokens" else "{:,g}".format)
        elif self.scale == "percent":
            ax.set_xlim(0, 100)
        elif self.scale == "units":
            ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: si(value)))


def chart(
    key: str, title: str, caption: str, panels: Sequence[Panel], *, columns: int = 1, legend: int = 2, share: str = "all",
    x: str = "", y: str = "", size: tuple[float, float] | None = None, beside: Callable[[Sequence[Axes]], None] | None = None,
) -> Figure:  # fmt: skip
    """A figure of one panel or of many in `columns`.

    legend: its columns, 0 for none. share: which panels have one x axis and one y axis: "all", or "row"
    for one y axis a row and x axes of their own. x, y: labels of all panels together. beside: draws what else is on the
    axes, at the end.
    """
    rows = -(-len(panels) // columns)

    def draw(canvas: Canvas) -> None:
        alike = len(panels) > 1 and share == "all"
        grid = canvas.subplots(rows, columns, sharex=alike, sharey="row" if share == "row" else alike, squeeze=False)
        axes = list(grid.flat)
        for ax, panel in zip(axes, panels, strict=False):
            panel.draw(ax)
        everywhere = np.unique(np.concatenate([panel.places for panel in panels]))
        for ax, panel in zip(axes, panels, strict=False):
            panel.scale_axes(ax, everywhere if alike else panel.places)
        for ax in axes[len(panels) :]:
            ax.set_axis_off()
        if beside is not None:
            beside(axes)
        if legend:
            legend_above(canvas, axes[0], legend)
        if x:
            canvas.supxlabel(x, fontsize=8.5)
        if y:
            canvas.supylabel(y, fontsize=8.5)

    wide = (SIZE[0], SIZE[1] if rows == 1 else 1.2 + 1.3 * rows)
    return Figure(key, title, caption, draw, size or wide)


def squares(
    key: str, title: str, caption: str, panels: Sequence[tuple[str, Array]], bar_label: str, axis: str
) -> Figure:
    """Square arrays side by side on one scale of grey, each with its title; what is NaN is left blank."""

    def draw(canvas: Canvas) -> None:
        from matplotlib import colormaps

        greys = colormaps["Greys"].resampled(9)
        axes = canvas.subplots(1, len(panels), squeeze=False)[0]
        low, high = (float(pick([pick(values) for _, values in panels])) for pick in (np.nanmin, np.nanmax))
        for ax, (name, values) in zip(axes, panels, strict=True):
            numbers = np.arange(1, len(values) + 1)
            image = ax.pcolormesh(numbers, numbers, values, cmap=greys, vmin=low, vmax=high)
            ax.set_aspect("equal")
            ax.invert_yaxis()
            ax.set_title(name)
            ax.set_xlabel(axis)
            ax.grid(False)
        axes[0].set_ylabel(axis)
        solids: Any = canvas.colorbar(image, ax=list(axes), label=bar_label, shrink=0.8).solids
        solids.set_rasterized(False)

    return Figure(key, title, caption, draw)
