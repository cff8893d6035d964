"""The figures of a comparison: loss curves, and what the trained weights look like. Numbers in, drawings out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from spherelm.analysis.weights import OF_ENCODER
from spherelm.models import NAMES
from spherelm.report.drawing import (
    BACKGROUND,
    COLOURS,
    FG,
    GPT,
    NGPT,
    SECOND,
    SIZE,
    THIRD,
    Array,
    Drawing,
    integer_layers,
    legend_above,
    log_ticks,
    readable_ticks,
    seeds_and_mean,
    thin,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NOWHERE: Mapping[str, Any] = {}


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


def loss_curves(plot: LossPlot, key: str, title: str, description: str) -> Drawing:
    """Validation loss over tokens or seconds: every seed thin, the means thick, the level, ends and crossing marked."""

    def draw(figure: Figure) -> None:
        ax = figure.add_subplot()
        for arm, curves in plot.curves.items():
            for curve in curves if len(curves) > 1 or arm not in plot.means else ():
                ax.plot(*thin(curve.x, curve.loss), color=COLOURS[arm], linewidth=0.6, alpha=0.45)
            if arm in plot.means:
                mean = plot.means[arm]
                ax.plot(*thin(mean.x, mean.loss), color=COLOURS[arm], linewidth=1.9, label=NAMES[arm])
        _loss_limits(ax, plot)
        _draw_ends(ax, plot)
        _draw_level(ax, plot)
        _draw_crossing(ax, plot)
        ax.set_xlabel("training tokens" if plot.unit == "tokens" else "training time (seconds)")
        ax.set_ylabel("validation loss (nats per token)")
        readable_ticks(ax.xaxis, units=plot.unit == "tokens")
        ax.legend(loc="upper right")

    return Drawing(draw, key, title, description)


Places = Mapping[str, Array]
"""The numbers of the layers that have a scale or a matrix, by its name; for a name that is missing, all from 1 on."""


def eigen_learning_rates(
    scales: Mapping[str, Sequence[Array]], key: str, title: str, description: str, places: Places = NOWHERE
) -> Drawing:
    """Mean |alpha_A| and |alpha_M| per layer, `{"alpha_A": [one array [n_layers] per seed], "alpha_M": ...}`."""
    lines = [
        ("alpha_A", r"$|\alpha_A|$, attention", NGPT, "o", "-"),
        ("alpha_C", r"$|\alpha_C|$, cross-attention", THIRD, "^", ":"),
        ("alpha_M", r"$|\alpha_M|$, MLP", SECOND, "s", "--"),
        ("alpha_A of the encoder", r"$|\alpha_A|$, encoder", NGPT, "x", "-."),
        ("alpha_M of the encoder", r"$|\alpha_M|$, encoder", SECOND, "+", "-."),
        ("alpha of mixers", r"$|\alpha|$, mixers", THIRD, "v", "-."),
        ("alpha of experts", r"$|\alpha|$, experts", FG, "D", ":"),
    ]
    return _per_layer(scales, lines, "mean eigen learning rate", key, title, description, places)


def layer_scales(
    scales: Mapping[str, Sequence[Array]], key: str, title: str, description: str, places: Places = NOWHERE
) -> Drawing:
    """Mean s_qk, s_u, s_v and others per layer, `{"s_qk": [one array [n_layers] per seed], ...}`."""
    lines = [
        ("s_qk", r"$s_{qk}$", NGPT, "o", "-"),
        ("s_qk of cross-attention", r"$s_{qk}$, cross-attention", NGPT, "x", "-."),
        ("s_u", r"$s_u$", SECOND, "s", "--"),
        ("s_v", r"$s_v$", THIRD, "^", ":"),
        ("s_u of experts", r"$s_u$, experts", SECOND, "x", "--"),
        ("s_v of experts", r"$s_v$, experts", THIRD, "+", ":"),
        ("s_moe", r"$s_{moe}$", FG, "D", "-."),
        ("s_mamba", r"$s_{mamba}$", GPT, "v", "-."),
    ]
    return _per_layer(scales, lines, "mean scale", key, title, description, places)


def logit_scales(values: Sequence[Array], key: str, title: str, description: str, bins: int = 60) -> Drawing:
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

    return Drawing(draw, key, title, description)


def embedding_norms(
    norms: Mapping[str, Mapping[str, Sequence[Array]]], key: str, title: str, description: str
) -> Drawing:
    """Sorted row norms, `{"gpt": {"input": [one ascending array [vocab_size] per seed], "output": ...}, "ngpt": ...}`."""

    def scale(ax: Axes) -> None:
        ax.set_xlabel("vocabulary entries, sorted by norm (%)")
        ax.set_ylabel("norm of the embedding vector")
        ax.set_ylim(bottom=0)

    return sorted_tables(norms, scale, key, title, description)


def sorted_tables(
    values: Mapping[str, Mapping[str, Sequence[Array]]],
    scale: Callable[[Axes], None],
    key: str,
    title: str,
    description: str,
) -> Drawing:
    """Ascending values over their rank in percent, input embeddings solid, output embeddings dashed, means over seeds.

    values: as for `embedding_norms`; scale: sets labels and limits of the axes.
    """

    def draw(figure: Figure) -> None:
        ax = figure.add_subplot()
        for arm, tables in values.items():
            for table, dashes in (("input", "-"), ("output", "--")):
                mean = np.mean(np.stack(list(tables[table])), axis=0)
                rank = 100 * (np.arange(mean.size) + 0.5) / mean.size
                ax.plot(*thin(rank, mean), color=COLOURS[arm], linestyle=dashes, label=f"{NAMES[arm]}, {table}")
        ax.set_xlim(0, 100)
        scale(ax)
        legend_above(figure, ax, columns=2)

    return Drawing(draw, key, title, description)


def condition_numbers(
    numbers: Mapping[str, Mapping[str, Sequence[Array]]],
    names: Sequence[str],
    key: str,
    title: str,
    description: str,
    dotted: Mapping[str, Mapping[str, Sequence[Array]]] | None = None,
    places: Mapping[str, Places] = NOWHERE,
) -> Drawing:
    """Small panels, one per matrix in `names`: condition number per layer, `{"gpt": {"Q": [array [n_layers] per seed]}}`.

    `dotted`: the same once more, of which the means over seeds are drawn dotted. `places`: by arm.
    """
    return matrix_panels(numbers, names, "condition number", key, title, description, dotted, places, log=True)


def matrix_panels(
    numbers: Mapping[str, Mapping[str, Sequence[Array]]],
    names: Sequence[str],
    y_label: str,
    key: str,
    title: str,
    description: str,
    dotted: Mapping[str, Mapping[str, Sequence[Array]]] | None = None,
    places: Mapping[str, Places] = NOWHERE,
    log: bool = False,
) -> Drawing:
    """What `condition_numbers` draws, of any number that each matrix has in each layer that has it."""

    def layers(arm: str, name: str, count: int) -> Array:
        return places.get(arm, NOWHERE).get(name, np.arange(1.0, count + 1))

    def draw(figure: Figure) -> None:
        rows = (len(names) + 1) // 2
        axes = figure.subplots(rows, 2, sharex=True, sharey=True, squeeze=False)
        for panel, name in zip(axes.flat, names, strict=False):
            for arm, seeds in ((arm, matrices[name]) for arm, matrices in numbers.items() if name in matrices):
                x, marker = layers(arm, name, len(seeds[0])), "o" if COLOURS[arm] == NGPT else "s"
                seeds_and_mean(panel, seeds, COLOURS[arm], marker, "-", NAMES[arm], x)
            for arm, seeds in ((arm, matrices[name]) for arm, matrices in (dotted or {}).items() if name in matrices):
                mean = np.mean(np.stack(list(seeds)), axis=0)
                panel.plot(
                    layers(arm, name, mean.size), mean, color=COLOURS[arm], linestyle=(0, (1, 1.6)), linewidth=1.3
                )
            panel.set_title(_MATRIX_LABELS[name])
            if log:
                panel.set_yscale("log")
        if log:
            log_ticks(axes.flat[0])
        for panel in axes.flat[len(names) :]:
            panel.set_axis_off()
        legend_above(figure, axes.flat[0], columns=2)
        deepest = (layers(arm, name, len(v[0])).max() for arm, m in numbers.items() for name, v in m.items())
        integer_layers(axes.flat[0], int(max(deepest)))
        figure.supxlabel("layer", fontsize=8.5)
        figure.supylabel(y_label, fontsize=8.5)

    return Drawing(draw, key, title, description, size=(SIZE[0], 1.2 + 1.3 * ((len(names) + 1) // 2)))


_DENSE_LABELS = {
    "Q": r"$Q$", "K": r"$K$", "V": r"$V$", "W_o": r"$W_o$",
    "W_u": r"$W_u$", "W_v": r"$W_v$", "W_oMLP": r"$W_{oMLP}$",
}  # fmt: skip
_MATRIX_LABELS = {
    **_DENSE_LABELS,
    **{name + OF_ENCODER: f"{label}, encoder" for name, label in _DENSE_LABELS.items()},
    "C_q": r"$Q$, cross", "C_k": r"$K$, cross", "C_v": r"$V$, cross", "C_o": r"$W_o$, cross",
    "E_u": r"$W_u$ of experts", "E_v": r"$W_v$ of experts", "E_o": r"$W_o$ of experts",
    "W_in": r"$W_{in}$", "W_out": r"$W_{out}$",
}  # fmt: skip


def _per_layer(
    scales: Mapping[str, Sequence[Array]],
    lines: Sequence[tuple[str, str, str, str, str]],
    y_label: str,
    key: str,
    title: str,
    description: str,
    places: Places,
) -> Drawing:
    present = [line for line in lines if scales.get(line[0])]
    layers = {line[0]: places.get(line[0], np.arange(1.0, len(scales[line[0]][0]) + 1)) for line in present}

    def draw(figure: Figure) -> None:
        ax = figure.add_subplot()
        for name, label, colour, marker, dashes in present:
            seeds_and_mean(ax, scales[name], colour, marker, dashes, label, layers[name])
        ax.set_xlabel("layer")
        ax.set_ylabel(y_label)
        ax.margins(y=0.12)
        low, high = ax.get_ylim()
        ax.set_ylim(min(0.0, low), high)
        integer_layers(ax, int(max(numbers.max() for numbers in layers.values())))
        legend_above(figure, ax, columns=min(len(present), 3))

    return Drawing(draw, key, title, description)


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
    colour, label = COLOURS[plot.ends_arm], f"{NAMES[plot.ends_arm]}, ends of full schedules"
    between = np.geomspace(x[0], x[-1], 60)
    ax.plot(between, np.interp(np.log(between), np.log(x), loss), color=colour, linewidth=1, linestyle=(0, (1, 1.6)))
    ax.plot(x, loss, color=colour, linestyle="", marker="o", markersize=5, markerfacecolor=BACKGROUND, markeredgewidth=1.4,
            label=label, zorder=4)  # fmt: skip


def _draw_level(ax: Axes, plot: LossPlot) -> None:
    if plot.level is not None:
        label = f"{NAMES[plot.level_arm]}, final loss"
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
