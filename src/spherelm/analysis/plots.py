"""Figures as small SVG strings for one HTML page; the only module that imports matplotlib.

Each function takes plain numbers and returns one `<svg>` element as `spherelm.analysis.svg` describes it, the same bytes for
the same numbers. `key` starts its ids, `title` and `description` are read out where it cannot be seen.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from spherelm.analysis.svg import VARIABLES, inline

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Array = NDArray[np.float64]

FG, MUTED, GRID, GPT, NGPT, SECOND, THIRD, BACKGROUND = VARIABLES
COLOURS = {"gpt": GPT, "ngpt": NGPT}
LABELS = {"gpt": "GPT", "ngpt": "nGPT"}
SIZE = (4.9, 3.3)  # inches: read at its own size beside a second figure, and still legible on a phone
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
class Curve:
    """One run's validation losses: `x` ascending (tokens or seconds), `loss` in nats per token, same length."""

    x: ArrayLike
    loss: ArrayLike


@dataclass(frozen=True)
class LossPlot:
    """What a loss figure shows; x and loss as in `Curve`, `unit` "tokens" or "seconds".

    `curves`: per arm one curve per seed. `means`: per arm their mean. `level`: a dashed line, the final loss of `level_arm`.
    `ends`: (x, loss) of the ends of full schedules of `ends_arm`, joined by a line that is straight over log x. `crossing`:
    where that reaches the level, (x, loss), with `crossing_label`.
    """

    curves: Mapping[str, Sequence[Curve]]
    means: Mapping[str, Curve]
    level: float | None = None
    level_arm: str = "gpt"
    ends: Sequence[tuple[float, float]] = ()
    ends_arm: str = "ngpt"
    crossing: tuple[float, float] | None = None
    crossing_label: str = ""
    unit: str = "tokens"


def require_matplotlib() -> None:
    """`ValueError` that says what to install if matplotlib is missing; call it before long work that ends in figures."""
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError:
        raise ValueError("figures need matplotlib, which is not installed: pip install 'spherelm[report]'") from None


def loss_curves(plot: LossPlot, key: str, title: str, description: str) -> str:
    """Validation loss over tokens or seconds: every seed thin, the means thick, the level, ends and crossing marked."""

    def draw(figure: Figure) -> None:
        ax = figure.add_subplot()
        for arm, curves in plot.curves.items():
            for curve in curves if len(curves) > 1 or arm not in plot.means else ():
                ax.plot(*_thin(curve.x, curve.loss), color=COLOURS[arm], linewidth=0.6, alpha=0.45)
            if arm in plot.means:
                mean = plot.means[arm]
                ax.plot(*_thin(mean.x, mean.loss), color=COLOURS[arm], linewidth=1.9, label=LABELS[arm])
        _loss_limits(ax, plot)
        _draw_ends(ax, plot)
        _draw_level(ax, plot)
        _draw_crossing(ax, plot)
        ax.set_xlabel("training tokens" if plot.unit == "tokens" else "training time (seconds)")
        ax.set_ylabel("validation loss (nats per token)")
        ax.xaxis.set_major_formatter(_x_format(plot.unit))
        ax.legend(loc="upper right")

    return _render(draw, key, title, description)


def eigen_learning_rates(scales: Mapping[str, Sequence[Array]], key: str, title: str, description: str) -> str:
    """Mean |alpha_A| and |alpha_M| per layer, `{"alpha_A": [one array [n_layers] per seed], "alpha_M": ...}`."""
    lines = [
        ("alpha_A", r"$|\alpha_A|$, attention", NGPT, "o", "-"),
        ("alpha_M", r"$|\alpha_M|$, MLP", SECOND, "s", "--"),
    ]
    return _per_layer(scales, lines, "mean eigen learning rate", key, title, description)


def layer_scales(scales: Mapping[str, Sequence[Array]], key: str, title: str, description: str) -> str:
    """Mean s_qk, s_u and s_v per layer, `{"s_qk": [one array [n_layers] per seed], ...}`."""
    lines = [
        ("s_qk", r"$s_{qk}$", NGPT, "o", "-"),
        ("s_u", r"$s_u$", SECOND, "s", "--"),
        ("s_v", r"$s_v$", THIRD, "^", ":"),
    ]
    return _per_layer(scales, lines, "mean scale", key, title, description)


def logit_scales(values: Sequence[Array], key: str, title: str, description: str, bins: int = 60) -> str:
    """Distribution of the effective s_z over the vocabulary; one array [vocab_size] per seed, pooled; median marked."""
    pooled = np.concatenate([np.asarray(value, dtype=np.float64) for value in values])

    def draw(figure: Figure) -> None:
        ax = figure.add_subplot()
        counts, edges = np.histogram(pooled, bins=bins)
        ax.stairs(100 * counts / pooled.size, edges, fill=True, color=NGPT, alpha=0.28)
        ax.stairs(100 * counts / pooled.size, edges, color=NGPT, linewidth=1.2)
        median = float(np.median(pooled))
        ax.axvline(median, color=FG, linewidth=0.9, linestyle=(0, (4, 3)))
        ax.annotate(f"median {median:.3g}", (median, 1), (4, -2), xycoords=("data", "axes fraction"),
                    textcoords="offset points", va="top")  # fmt: skip
        ax.set_xlabel(r"effective $s_z$")
        ax.set_ylabel("vocabulary entries (%)")
        ax.margins(y=0.14)
        ax.set_ylim(bottom=0)
        ax.grid(False, axis="x")

    return _render(draw, key, title, description)


def embedding_norms(norms: Mapping[str, Mapping[str, Sequence[Array]]], key: str, title: str, description: str) -> str:
    """Sorted row norms, `{"gpt": {"input": [one ascending array [vocab_size] per seed], "output": ...}, "ngpt": ...}`."""

    def draw(figure: Figure) -> None:
        ax = figure.add_subplot()
        for arm, tables in norms.items():
            for table, dashes in (("input", "-"), ("output", "--")):
                mean = np.mean(np.stack(list(tables[table])), axis=0)
                rank = 100 * (np.arange(mean.size) + 0.5) / mean.size
                ax.plot(*_thin(rank, mean), color=COLOURS[arm], linestyle=dashes, label=f"{LABELS[arm]}, {table}")
        ax.set_xlabel("vocabulary entries, sorted by norm (%)")
        ax.set_ylabel("norm of the embedding vector")
        ax.set_ylim(bottom=0)
        ax.set_xlim(0, 100)
        _legend_above(figure, ax, columns=2)

    return _render(draw, key, title, description)


def condition_numbers(
    numbers: Mapping[str, Mapping[str, Sequence[Array]]], names: Sequence[str], key: str, title: str, description: str
) -> str:
    """Small panels, one per matrix in `names`: condition number per layer, `{"gpt": {"Q": [array [n_layers] per seed]}}`."""

    def draw(figure: Figure) -> None:
        rows = (len(names) + 1) // 2
        axes = figure.subplots(rows, 2, sharex=True, sharey=True, squeeze=False)
        for panel, name in zip(axes.flat, names, strict=False):
            for arm, matrices in numbers.items():
                _seeds_and_mean(panel, matrices[name], COLOURS[arm], "o" if arm == "ngpt" else "s", "-", LABELS[arm])
            panel.set_title(_MATRIX_LABELS[name])
            panel.set_yscale("log")
        _log_ticks(axes.flat[0])
        for panel in axes.flat[len(names) :]:
            panel.set_axis_off()
        _legend_above(figure, axes.flat[0], columns=2)
        _integer_layers(axes.flat[0], max(len(s) for m in numbers.values() for v in m.values() for s in v))
        figure.supxlabel("layer", fontsize=8.5)
        figure.supylabel("condition number", fontsize=8.5)

    return _render(draw, key, title, description, size=(SIZE[0], 1.2 + 1.3 * ((len(names) + 1) // 2)))


_MATRIX_LABELS = {
    "Q": r"$Q$", "K": r"$K$", "V": r"$V$", "W_o": r"$W_o$",
    "W_u": r"$W_u$", "W_v": r"$W_v$", "W_oMLP": r"$W_{oMLP}$",
}  # fmt: skip


def _per_layer(
    scales: Mapping[str, Sequence[Array]],
    lines: Sequence[tuple[str, str, str, str, str]],
    y_label: str,
    key: str,
    title: str,
    description: str,
) -> str:
    def draw(figure: Figure) -> None:
        ax = figure.add_subplot()
        present = [line for line in lines if scales.get(line[0])]
        for name, label, colour, marker, dashes in present:
            _seeds_and_mean(ax, scales[name], colour, marker, dashes, label)
        ax.set_xlabel("layer")
        ax.set_ylabel(y_label)
        ax.margins(y=0.12)
        low, high = ax.get_ylim()
        ax.set_ylim(min(0.0, low), high)
        _integer_layers(ax, max(len(seed) for line in present for seed in scales[line[0]]))
        _legend_above(figure, ax, columns=len(present))

    return _render(draw, key, title, description)


def _seeds_and_mean(ax: Axes, seeds: Sequence[Array], colour: str, marker: str, dashes: str, label: str) -> None:
    """Every seed thin, their mean thick with markers, over layers numbered from 1; what is not finite leaves a gap."""
    stack = np.where(np.isfinite(np.stack(list(seeds))), np.stack(list(seeds)), np.nan)
    layers = np.arange(1, stack.shape[1] + 1)
    for seed in stack if len(stack) > 1 else ():
        ax.plot(layers, seed, color=colour, linewidth=0.6, alpha=0.45)
    ax.plot(layers, stack.mean(axis=0), color=colour, linestyle=dashes, marker=marker, markersize=3.6, label=label)


def _loss_limits(ax: Axes, plot: LossPlot) -> None:
    """Cut the first sixth of the run off the loss axis, where both arms fall steeply and nothing can be told apart."""
    means = [
        (np.asarray(mean.x, dtype=np.float64), np.asarray(mean.loss, dtype=np.float64)) for mean in plot.means.values()
    ]
    if not means:
        return
    end = max(float(x[-1]) for x, _ in means)
    marked = [loss for _, loss in plot.ends] + ([] if plot.level is None else [plot.level])
    top = np.nanmax([*(np.interp(end / 6, x, loss) for x, loss in means), *marked])
    drawn = [np.asarray(curve.loss, dtype=np.float64) for curves in plot.curves.values() for curve in curves]
    bottom = np.nanmin(np.concatenate([*drawn, marked]))
    span = max(float(top - bottom), 1e-3)
    ax.set_ylim(bottom - 0.16 * span, top + 0.05 * span)
    ax.set_xlim(0, end * 1.02)


def _draw_ends(ax: Axes, plot: LossPlot) -> None:
    if not plot.ends:
        return
    x, loss = np.array(sorted(plot.ends)).T
    colour, label = COLOURS[plot.ends_arm], f"{LABELS[plot.ends_arm]}, ends of full schedules"
    between = np.geomspace(x[0], x[-1], 60)
    ax.plot(between, np.interp(np.log(between), np.log(x), loss), color=colour, linewidth=1, linestyle=(0, (1, 1.6)))
    ax.plot(x, loss, color=colour, linestyle="", marker="o", markersize=5, markerfacecolor=BACKGROUND, markeredgewidth=1.4,
            label=label, zorder=4)  # fmt: skip


def _draw_level(ax: Axes, plot: LossPlot) -> None:
    if plot.level is not None:
        label = f"{LABELS[plot.level_arm]}, final loss"
        ax.axhline(plot.level, color=COLOURS[plot.level_arm], linewidth=1, linestyle=(0, (5, 3)), label=label)


def _draw_crossing(ax: Axes, plot: LossPlot) -> None:
    """A diamond where the level is reached, a line down to the axis, and its label where no curve passes."""
    if plot.crossing is None:
        return
    x, loss = plot.crossing
    bottom, end = ax.get_ylim()[0], ax.get_xlim()[1]
    ax.plot([x, x], [bottom, loss], color=FG, linewidth=0.8)
    ax.plot([x], [loss], color=FG, marker="D", markersize=5, zorder=5)
    left = x > 0.45 * end
    ax.annotate(plot.crossing_label, (x, 0.03), (-5 if left else 5, 0), xycoords=("data", "axes fraction"),
                textcoords="offset points", ha="right" if left else "left", va="bottom")  # fmt: skip


def _legend_above(figure: Figure, ax: Axes, columns: int) -> None:
    """One legend over the axes, where it hides no data."""
    handles, labels = ax.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=columns, columnspacing=1.6)


def _integer_layers(ax: Axes, layers: int) -> None:
    from matplotlib.ticker import MaxNLocator

    ax.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
    ax.set_xlim(1 - 0.04 * layers, layers + 0.04 * layers)


_LOG_TICKS = ((12.0, (1, 1.5, 2, 3, 5, 7)), (300.0, (1, 2, 5)), (float("inf"), (1,)))


def _log_ticks(ax: Axes) -> None:
    """Few round numbers, written out, on an axis of at least a factor of five."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    low, high = ax.get_ylim()
    widen = max(1.0, (5 * low / high) ** 0.5)
    ax.set_ylim(low / widen, high * widen)
    subs = next(subs for limit, subs in _LOG_TICKS if high / low < limit)
    ax.yaxis.set_major_locator(LogLocator(subs=subs, numticks=20))
    ax.yaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))


def _x_format(unit: str) -> Any:
    """Ticks as 1.5M tokens, or as seconds."""
    from matplotlib.ticker import EngFormatter, FuncFormatter

    return EngFormatter(sep="") if unit == "tokens" else FuncFormatter(lambda value, _: f"{value:,.0f}")


def _thin(x: ArrayLike, y: ArrayLike) -> tuple[Array, Array]:
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


def _render(
    draw: Callable[[Figure], None], key: str, title: str, description: str, size: tuple[float, float] = SIZE
) -> str:
    with _style(key):
        from matplotlib.figure import Figure

        figure = Figure(figsize=size, layout="constrained")
        draw(figure)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return inline(buffer.getvalue(), key, title, description)
