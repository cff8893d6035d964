"""The figures of `spherelm inspect` that a comparison does not have: quantities over the depth of a model, and spectra."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from spherelm.models import NAMES
from spherelm.report.drawing import (
    BACKGROUND,
    COLOURS,
    SIZE,
    Array,
    Drawing,
    integer_layers,
    legend_above,
    thin,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DASHES = ("-", "--", ":", "-.", (0, (5, 1, 1, 1, 1, 1)))
MARKERS = ("o", "s", "^", "D", "v")


@dataclass(frozen=True)
class Line:
    """One line of one arm: `values` at `x`, one array a seed; `band`: (low, high) around their mean; `look`: 0 to 4."""

    arm: str
    x: Array
    values: Sequence[Array]
    label: str = ""
    look: int = 0
    band: tuple[Array, Array] | None = None


@dataclass(frozen=True)
class Axis:
    """What the axes of a figure of lines say; `log`: the y axis is logarithmic, `zero`: it starts at zero."""

    x: str
    y: str
    log: bool = False
    zero: bool = False


def over_depth(lines: Sequence[Line], axis: Axis, key: str, title: str, description: str) -> Drawing:
    """Lines over layers: every seed thin, their mean thick."""

    def draw(figure: Figure) -> None:
        ax = figure.add_subplot()
        for line in lines:
            _draw_line(ax, line)
        ax.set_xlabel(axis.x)
        ax.set_ylabel(axis.y)
        if axis.log:
            ax.set_yscale("log")
        elif axis.zero:
            ax.set_ylim(bottom=0)
        integer_layers(ax, int(max(line.x.max() for line in lines)))
        ax.set_xlim(min(line.x.min() for line in lines) - 0.2, None)
        legend_above(figure, ax, columns=2)

    return Drawing(draw, key, title, description)


def over_training(lines: Sequence[Line], axis: Axis, key: str, title: str, description: str) -> Drawing:
    """Lines over updates, on a logarithmic y axis; a single checkpoint is a point."""

    def draw(figure: Figure) -> None:
        from matplotlib.ticker import MaxNLocator

        ax = figure.add_subplot()
        for line in lines:
            _draw_line(ax, line)
        ax.set_yscale("log")
        ax.set_xlabel(axis.x)
        ax.set_ylabel(axis.y)
        ax.set_xlim(left=0)
        ax.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
        legend_above(figure, ax, columns=2)

    return Drawing(draw, key, title, description)


def _draw_line(ax: Axes, line: Line) -> None:
    colour, stack = COLOURS[line.arm], np.stack(list(line.values))
    if line.band is not None:
        ax.fill_between(line.x, line.band[0], line.band[1], color=colour, alpha=0.14, linewidth=0)
    for seed in stack if len(stack) > 1 else ():
        ax.plot(line.x, seed, color=colour, linewidth=0.6, alpha=0.45)
    marker = MARKERS[line.look]
    label = NAMES[line.arm] + (f", {line.label}" if line.label else "")
    ax.plot(line.x, stack.mean(axis=0), color=colour, linestyle=DASHES[line.look], marker=marker, markersize=3.6, label=label,
            markerfacecolor=BACKGROUND if line.look else colour)  # fmt: skip


@dataclass(frozen=True)
class Dots:
    """What several things of a layer have, of one arm: `values` [layers, things], one array a seed; `x`: numbers of layers."""

    arm: str
    x: Array
    values: Sequence[Array]


def dots_over_depth(
    dots: Sequence[Dots],
    y_label: str,
    key: str,
    title: str,
    description: str,
    limits: tuple[float, float | None] = (0.0, None),
) -> Drawing:
    """One dot a thing and layer, and a line through their medians; limits: of the y axis."""

    def draw(figure: Figure) -> None:
        ax = figure.add_subplot()
        for i, of_arm in enumerate(dots):
            values = np.concatenate(list(of_arm.values), axis=1)
            layers = of_arm.x + 0.12 * (2 * i - 1) * (len(dots) > 1)
            colour, x = COLOURS[of_arm.arm], np.repeat(layers, values.shape[1])
            ax.plot(x, values.ravel(), color=colour, linestyle="", marker="o", markersize=3.2, alpha=0.5)
            label = f"{NAMES[of_arm.arm]}, median"
            ax.plot(layers, np.median(values, axis=1), color=colour, linewidth=1.3, label=label)
        ax.set_xlabel("layer")
        ax.set_ylabel(y_label)
        ax.set_ylim(*limits)
        deepest = int(max(of_arm.x.max() for of_arm in dots))
        integer_layers(ax, deepest)
        ax.set_xlim(0.7, deepest + 0.3)
        legend_above(figure, ax, columns=2)

    return Drawing(draw, key, title, description)


def square_panels(
    panels: Sequence[tuple[str, Array]], bar_label: str, key: str, title: str, description: str
) -> Drawing:
    """Square arrays side by side on one scale of grey, each with its title; what is NaN is left blank."""

    def draw(figure: Figure) -> None:
        from matplotlib import colormaps

        greys = colormaps["Greys"].resampled(9)
        axes = figure.subplots(1, len(panels), squeeze=False)[0]
        low, high = (float(pick([pick(values) for _, values in panels])) for pick in (np.nanmin, np.nanmax))
        for ax, (name, values) in zip(axes, panels, strict=True):
            numbers = np.arange(1, len(values) + 1)
            image = ax.pcolormesh(numbers, numbers, values, cmap=greys, vmin=low, vmax=high)
            ax.set_aspect("equal")
            ax.invert_yaxis()
            ax.set_title(name)
            ax.set_xlabel("expert")
            ax.grid(False)
        axes[0].set_ylabel("expert")
        solids: Any = figure.colorbar(image, ax=list(axes), label=bar_label, shrink=0.8).solids
        solids.set_rasterized(False)

    return Drawing(draw, key, title, description)


def query_key_spectra(
    lengths: Mapping[str, Mapping[str, Sequence[Array]]],
    singular: Mapping[str, Mapping[str, Sequence[Array]]],
    key: str,
    title: str,
    description: str,
) -> Drawing:
    """Above, lengths of the vectors of Q and K, sorted; below, singular values over the largest, every head and the median.

    lengths: `{"gpt": {"Q": [array a seed], "K": ...}}`; singular: the same with [heads, values], descending.
    """

    def draw(figure: Figure) -> None:
        axes = figure.subplots(2, 2, sharey="row")
        for column, name in enumerate(("Q", "K")):
            top, bottom = axes[0, column], axes[1, column]
            for arm, matrices in lengths.items():
                mean = np.mean(np.stack(list(matrices[name])), axis=0)
                top.plot(
                    *thin(100 * (np.arange(mean.size) + 0.5) / mean.size, mean), color=COLOURS[arm], label=NAMES[arm]
                )
            for arm, matrices in singular.items():
                heads = np.concatenate(list(matrices[name]))
                _draw_heads(bottom, heads / heads[:, :1], COLOURS[arm])
            top.set_title(f"${name}$, one layer")
            top.set_ylim(bottom=0)
            top.set_xlabel("vectors, sorted (%)")
            bottom.set_xlabel("singular value")
        axes[0, 0].set_ylabel("length")
        axes[1, 0].set_ylabel("over the largest")
        axes[1, 0].set_ylim(0, 1.03)
        legend_above(figure, axes[0, 0], columns=2)

    return Drawing(draw, key, title, description, size=(SIZE[0], 4.3))


def _draw_heads(ax: Axes, values: Array, colour: str) -> None:
    places = np.arange(1, values.shape[1] + 1)
    for head in values[:24]:
        ax.plot(places, head, color=colour, linewidth=0.5, alpha=0.4)
    ax.plot(places, np.median(values, axis=0), color=colour, linewidth=1.7)


def distributions(
    values: Mapping[str, Array], x_label: str, y_label: str, key: str, title: str, description: str
) -> Drawing:
    """One histogram an arm, in percent, on common bins."""

    def draw(figure: Figure) -> None:
        ax = figure.add_subplot()
        edges = np.histogram_bin_edges(np.concatenate(list(values.values())), bins=60)
        for arm, numbers in values.items():
            counts, _ = np.histogram(numbers, edges)
            ax.stairs(100 * counts / numbers.size, edges, fill=True, color=COLOURS[arm], alpha=0.22)
            ax.stairs(100 * counts / numbers.size, edges, color=COLOURS[arm], linewidth=1.2, label=NAMES[arm])
        ax.set_xlabel(x_label)
        ax.set_ylabel(y_label)
        ax.grid(False, axis="x")
        legend_above(figure, ax, columns=2)

    return Drawing(draw, key, title, description)
