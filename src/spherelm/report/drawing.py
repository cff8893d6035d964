"""How every figure is drawn: one look, one type, small SVG for pages and PNG for documents.

A figure's SVG is one `<svg>` element as `spherelm.report.svg` describes it, the same bytes for the same numbers; its
PNG is the same drawing in the light colours. matplotlib is imported when one of them is asked for, and
only on this floor.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from html import unescape
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from spherelm.errors import UserError
from spherelm.report.svg import VARIABLES, inline

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas

Array = NDArray[np.float64]

FG, MUTED, GRID, GPT, NGPT, SECOND, THIRD, BACKGROUND = VARIABLES
COLOURS = {"gpt": GPT, "ngpt": NGPT}
SIZE = (4.9, 3.3)  # inches: read at its own size beside a second figure, and still legible on a phone

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
class Figure:
    """A figure of a page, and the files of it.

    Attributes:
        key: Starts the ids of the SVG, and is the name of the files.
        title: Plain text.
        caption: HTML, already escaped: what is seen. Without its markup it is read out where the figure cannot be seen.
        draw: Puts it on an empty matplotlib figure.
        size: Of that, in inches.
    """

    key: str
    title: str
    caption: str
    draw: Callable[[Canvas], None]
    size: tuple[float, float] = SIZE

    @cached_property
    def svg(self) -> str:
        """One `<svg>` element for a page, light or dark as the page is."""
        with _style(self.key):
            from matplotlib.backends.backend_svg import FigureCanvasSVG

            buffer = io.StringIO()
            metadata: Mapping[str, None] = {"Date": None}
            canvas = self.drawn()
            for patch in (canvas.patch, *(ax.patch for ax in canvas.axes)):
                patch.set_facecolor("none")
                patch.set_edgecolor("none")
            # Not by `savefig`, which draws everything once more, to see where it will be.
            FigureCanvasSVG(canvas).print_svg(buffer, metadata=metadata)
        description = unescape(re.sub("<[^>]*>", "", self.caption))
        return inline(buffer.getvalue(), self.key, self.title, description)

    def png(self) -> bytes:
        """The file of an image in light colours."""
        with _style(self.key), _daylight():
            from matplotlib.backends.backend_agg import FigureCanvasAgg

            buffer = io.BytesIO()
            canvas = self.drawn()
            canvas.set_facecolor(BACKGROUND)
            canvas.set_dpi(160)
            FigureCanvasAgg(canvas).print_png(buffer)
        return buffer.getvalue()

    def drawn(self) -> Canvas:
        """The matplotlib figure with everything on it."""
        from matplotlib.figure import Figure as Canvas

        canvas = Canvas(figsize=self.size, layout="constrained")
        self.draw(canvas)
        _show_single_points(canvas)
        return canvas


def require_matplotlib() -> None:
    """Raise `UserError` that says what to install if matplotlib is missing;
    call it before long work that ends in figures.
    """
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError:
        raise UserError(
            "figures need matplotlib, which is not installed: pip install '.[report]' in a clone of spherelm"
        ) from None


def legend_above(canvas: Canvas, ax: Axes, columns: int) -> None:
    """One legend over the axes, where it hides no data; lines of one label are named once."""
    handles, labels = ax.get_legend_handles_labels()
    named = dict(reversed(list(zip(labels, handles, strict=True))))
    names = list(dict.fromkeys(labels))
    if names:
        chosen = [named[name] for name in names]
        canvas.legend(chosen, names, loc="outside upper left", ncols=columns, columnspacing=1.6)


_LOG_TICKS = ((12.0, (1, 1.5, 2, 3, 5, 7)), (300.0, (1, 2, 5)), (float("inf"), (1,)))


def log_ticks(ax: Axes) -> None:
    """Few round numbers, written out, on a logarithmic y axis of at least a factor of five."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    low, high = ax.get_ylim()
    widen = max(1.0, (5 * low / high) ** 0.5)
    ax.set_ylim(low / widen, high * widen)
    subs = next(subs for limit, subs in _LOG_TICKS if high / low < limit)
    ax.yaxis.set_major_locator(LogLocator(subs=subs, numticks=12))
    ax.yaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))


def own_ticks(ax: Axes, x: Array, form: Callable[[float], str]) -> None:
    """The values `x`, ascending, themselves as ticks of a logarithmic x axis, as far as they do not crowd."""
    kept: list[float] = []
    span = max(float(np.log(x[-1] / x[0])), 1e-9)
    for value in x:
        if not kept or np.log(value / kept[-1]) > 0.09 * span:
            kept.append(float(value))
    ax.set_xscale("log")
    ax.set_xticks(kept, [form(value) for value in kept])
    ax.minorticks_off()


def _show_single_points(canvas: Canvas) -> None:
    """A line through one point is nothing to see: give it a marker."""
    for line in (line for ax in canvas.axes for line in ax.lines):
        if line.get_marker() in ("", "None") and np.isfinite(np.asarray(line.get_ydata(), dtype=np.float64)).sum() == 1:
            line.set_marker("o")
            line.set_markersize(3.6)


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
