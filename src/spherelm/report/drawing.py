"""How every figure is drawn: one look, one type, small SVG for pages and PNG for documents.

A drawing's SVG is one `<svg>` element as `spherelm.report.svg` describes it, the same bytes for the same numbers; its PNG is
the same drawing in the light colours. matplotlib is imported when one of them is asked for, and only below `analysis`.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from spherelm.errors import UserError
from spherelm.report.svg import VARIABLES, inline

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

Array = NDArray[np.float64]

FG, MUTED, GRID, GPT, NGPT, SECOND, THIRD, BACKGROUND = VARIABLES
COLOURS = {"gpt": GPT, "ngpt": NGPT}
SIZE = (4.9, 3.3)  # inches: read at its own size beside a second figure, and still legible on a phone
UNITS = {1e12: "T", 1e9: "B", 1e6: "M", 1e3: "k"}
POINTS = 240  # of a long curve, which no screen shows more of

STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "font.family": "DejaVu Sans",
    "font.size": 8.5,
    "text.color": FG,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": FG,
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 8.5,
    "axes.titlelocation": "left",
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.formatter.useoffset": False,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": FG,
    "ytick.labelcolor": FG,
    "xtick.major.size": 3,
    "ytick.major.size": 3,
    "xtick.major.width": 0.7,
    "ytick.major.width": 0.7,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "legend.handlelength": 1.9,
    "lines.linewidth": 1.6,
    "lines.solid_capstyle": "round",
    "path.simplify": True,
}


@dataclass(frozen=True)
class Drawing:
    """What a figure shows: `draw` puts it on an empty matplotlib figure of `size` inches.

    `key` starts the ids of the SVG, `title` and `description` are read out where it cannot be seen.
    """

    draw: Callable[[Figure], None]
    key: str
    title: str
    description: str
    size: tuple[float, float] = SIZE

    @cached_property
    def svg(self) -> str:
        """One `<svg>` element for a page, light or dark as the page is."""
        with _style(self.key):
            from matplotlib.backends.backend_svg import FigureCanvasSVG

            buffer = io.StringIO()
            metadata: Mapping[str, None] = {"Date": None}
            figure = self._drawn()
            for patch in (figure.patch, *(ax.patch for ax in figure.axes)):
                patch.set_facecolor("none")
                patch.set_edgecolor("none")
            # Not by `savefig`, which draws everything once more, to see where it will be.
            FigureCanvasSVG(figure).print_svg(buffer, metadata=metadata)
        return inline(buffer.getvalue(), self.key, self.title, self.description)

    def png(self, dots_per_inch: int = 160) -> bytes:
        """The file of an image in light colours."""
        with _style(self.key), _daylight():
            from matplotlib.backends.backend_agg import FigureCanvasAgg

            buffer = io.BytesIO()
            figure = self._drawn()
            figure.set_facecolor(BACKGROUND)
            figure.set_dpi(dots_per_inch)
            FigureCanvasAgg(figure).print_png(buffer)
        return buffer.getvalue()

    def _drawn(self) -> Figure:
        from matplotlib.figure import Figure

        figure = Figure(figsize=self.size, layout="constrained")
        self.draw(figure)
        _show_single_points(figure)
        return figure


def require_matplotlib() -> None:
    """`ValueError` that says what to install if matplotlib is missing; call it before long work that ends in figures."""
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError:
        raise UserError(
            "figures need matplotlib, which is not installed: pip install '.[report]' in a clone of spherelm"
        ) from None


def seeds_and_mean(
    ax: Axes, seeds: Sequence[Array], colour: str, marker: str, dashes: str, label: str, layers: Array | None = None
) -> None:
    """Every seed thin, their mean thick with markers, over layers; what is not finite leaves a gap.

    layers: their numbers, all from 1 on if left out.
    """
    stack = np.where(np.isfinite(np.stack(list(seeds))), np.stack(list(seeds)), np.nan)
    layers = np.arange(1, stack.shape[1] + 1) if layers is None else layers
    for seed in stack if len(stack) > 1 else ():
        ax.plot(layers, seed, color=colour, linewidth=0.6, alpha=0.45)
    ax.plot(layers, stack.mean(axis=0), color=colour, linestyle=dashes, marker=marker, markersize=3.6, label=label)


def legend_above(figure: Figure, ax: Axes, columns: int) -> None:
    """One legend over the axes, where it hides no data; lines of one label are named once."""
    handles, labels = ax.get_legend_handles_labels()
    named = dict(reversed(list(zip(labels, handles, strict=True))))
    labels = list(dict.fromkeys(labels))
    figure.legend(
        [named[label] for label in labels], labels, loc="outside upper left", ncols=columns, columnspacing=1.6
    )


def integer_layers(ax: Axes, layers: int) -> None:
    """An x axis of layers numbered from 1."""
    from matplotlib.ticker import MaxNLocator

    ax.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
    ax.set_xlim(1 - 0.04 * layers, layers + 0.04 * layers)


_LOG_TICKS = ((12.0, (1, 1.5, 2, 3, 5, 7)), (300.0, (1, 2, 5)), (float("inf"), (1,)))


def log_ticks(ax: Axes) -> None:
    """Few round numbers, written out, on an axis of at least a factor of five."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    low, high = ax.get_ylim()
    widen = max(1.0, (5 * low / high) ** 0.5)
    ax.set_ylim(low / widen, high * widen)
    subs = next(subs for limit, subs in _LOG_TICKS if high / low < limit)
    ax.yaxis.set_major_locator(LogLocator(subs=subs, numticks=20))
    ax.yaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))


def readable_ticks(axis: Axis, units: bool = False) -> None:
    """Label the ticks with as many decimals as tell them apart; with `units`, as 1.5M instead of 1,500,000."""
    from matplotlib.ticker import Formatter

    class Readable(Formatter):
        def __call__(self, value: float, pos: int | None = None) -> str:
            return tick_labels([value], units)[0]

        def format_ticks(self, values: Any) -> list[str]:
            return tick_labels([float(value) for value in values], units)

    axis.set_major_formatter(Readable())


def tick_labels(values: Sequence[float], units: bool) -> list[str]:
    """The values as text, off by no more than a twentieth of the least distance between two of them; see `readable_ticks`."""
    apart = np.diff(np.unique(values))
    allowed = 0.05 * float(apart.min() if apart.size else np.abs(values).max(initial=0.0))
    scales = [next((s for s in UNITS if units and abs(value) >= s), 1.0) for value in values]
    for places in range(16):
        off = [abs(round(value / scale, places) * scale - value) for value, scale in zip(values, scales, strict=True)]
        if max(off, default=0.0) <= allowed:
            break
    texts = [f"{value / scale:,.{places}f}" for value, scale in zip(values, scales, strict=True)]
    if units and places:  # 800k and 1.6M: nothing is lost where the decimals are zeros
        texts = [text.rstrip("0").rstrip(".") for text in texts]
    return [text + UNITS.get(scale, "") for text, scale in zip(texts, scales, strict=True)]


def _show_single_points(figure: Figure) -> None:
    """A line through one point is nothing to see: give it a marker."""
    for line in (line for ax in figure.axes for line in ax.lines):
        if line.get_marker() in ("", "None") and np.isfinite(np.asarray(line.get_ydata(), dtype=np.float64)).sum() == 1:
            line.set_marker("o")
            line.set_markersize(3.6)


def thin(x: ArrayLike, y: ArrayLike) -> tuple[Array, Array]:
    """At most `POINTS` points of a curve, first and last among them."""
    xs, ys = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    keep = np.unique(np.linspace(0, xs.size - 1, min(xs.size, POINTS)).round().astype(int))
    return xs[keep], ys[keep]


@contextmanager
def _style(key: str) -> Iterator[None]:
    require_matplotlib()
    import matplotlib

    style: Any = {**STYLE, "svg.hashsalt": key}  # newer matplotlib types every key of it
    with matplotlib.rc_context(style):
        yield


@contextmanager
def _daylight() -> Iterator[None]:
    """Makes matplotlib take the stand-ins of `VARIABLES` for their light colours: it looks colours up by name first."""
    from matplotlib.colors import get_named_colors_mapping

    names: Any = get_named_colors_mapping()
    for stand_in, (_, light, _) in VARIABLES.items():
        names[stand_in] = light
    try:
        yield
    finally:
        for stand_in in VARIABLES:
            del names[stand_in]
