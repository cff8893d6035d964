"""The learning curves of a comparison: validation loss over tokens and over seconds,
and where one arm reaches the other's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

import numpy as np

from spherelm.experiments.record import Arm, Comparison
from spherelm.models import ARM_NAMES
from spherelm.report.charts import DOTTED, GuideLine, Line, Panel, chart
from spherelm.report.drawing import COLOURS, FG, Figure
from spherelm.report.wording import bound_on_tokens, listed, si

if TYPE_CHECKING:
    from matplotlib.axes import Axes

X_LABELS = {"tokens": "training tokens", "seconds": "training time (seconds)"}


def loss_figures(comparison: Comparison) -> list[Figure]:
    """Validation loss over tokens and over seconds."""
    return [_loss_figure(comparison, unit) for unit in X_LABELS]


def _loss_figure(comparison: Comparison, unit: str) -> Figure:
    """Every seed thin, the means thick; the loser's final loss, the ends of the winner's schedules,
    and where they meet.
    """
    loser = comparison.arms[comparison.loser]
    level = None if math.isnan(loser.final_loss) else loser.final_loss
    crossing, label = (None, "") if level is None else _crossing(comparison, unit)
    means = [mean for arm in comparison.arms.values() if (mean := _mean(arm, unit)) is not None]
    ends = _ends(comparison, unit)
    rules = (
        []
        if level is None
        else [GuideLine(level, colour=COLOURS[loser.name], label=f"{ARM_NAMES[loser.name]}, final loss")]
    )
    limits = _limits(comparison, means, [y for _, y in ends] + ([] if level is None else [level]))

    def beside(axes: Sequence[Axes]) -> None:
        if means:
            axes[0].set_xlim(0, 1.02 * max(float(np.max(line.x)) for line in means))
        if crossing is not None and level is not None:
            _mark(axes[0], crossing, level, label)
        axes[0].legend(loc="upper right")

    title = f"Validation loss over training {'tokens' if unit == 'tokens' else 'time'}"
    lines = (
        [line for arm in comparison.arms.values() for line in _seeds(arm, unit)] + means + _end_lines(comparison, ends)
    )
    panel = Panel(lines, X_LABELS[unit], "validation loss (nats per token)", "", (), rules,
                  "units" if unit == "tokens" else "", False, *limits)  # fmt: skip
    caption = _caption(comparison, unit, crossing is not None)
    return chart(f"loss-{unit}", title, caption, [panel], legend=0, beside=beside)


def _seeds(arm: Arm, unit: str) -> list[Line]:
    """The curves of single seeds, where they are not the mean."""
    shown = arm.runs if len(arm.runs) > 1 or not arm.whole_runs else ()
    return [
        Line(getattr(run, unit), [run.loss], COLOURS[arm.name], width=0.6, alpha=0.45) for run in shown if run.loss.size
    ]


def _mean(arm: Arm, unit: str) -> Line | None:
    """The mean over the seeds that did not diverge."""
    curve = arm.mean_curve()
    if curve is None:
        return None
    tokens, seconds, loss = curve
    return Line(tokens if unit == "tokens" else seconds, [loss], COLOURS[arm.name], ARM_NAMES[arm.name], width=1.9)


def _ends(comparison: Comparison, unit: str) -> list[tuple[float, float]]:
    """Where the winner's full schedules end, shortest first; nothing where only one length was trained."""
    winner = comparison.arms[comparison.winner]
    ends = [(getattr(end, unit), end.loss) for end in comparison.ends]
    return sorted([*ends, (getattr(winner, unit), winner.final_loss)]) if ends else []


def _end_lines(comparison: Comparison, ends: Sequence[tuple[float, float]]) -> list[Line]:
    """Circles, joined by a line that is straight over the logarithm of x."""
    if not ends:
        return []
    x, loss = np.array(ends).T
    between = np.geomspace(x[0], x[-1], 60)
    colour, label = COLOURS[comparison.winner], f"{ARM_NAMES[comparison.winner]}, ends of full schedules"
    joined = Line(between, [np.interp(np.log(between), np.log(x), loss)], colour, dashes=DOTTED, width=1)
    return [joined, Line(x, [loss], colour, label, dashes="", marker="o", hollow=True, marker_size=5)]


def _limits(
    comparison: Comparison, means: Sequence[Line], marked: Sequence[float]
) -> tuple[float | None, float | None]:
    """Of the loss, without the first sixth of the run, where both arms fall steeply and cannot be distinguished."""
    if not means:
        return None, None
    end = max(float(np.max(line.x)) for line in means)
    top = np.nanmax([*(np.interp(end / 6, np.asarray(line.x), np.asarray(line.seeds[0])) for line in means), *marked])
    bottom = np.nanmin(np.concatenate([*(run.loss for arm in comparison.arms.values() for run in arm.runs), marked]))
    span = max(float(top - bottom), 1e-3)
    return float(bottom - 0.16 * span), float(top + 0.05 * span)


def _mark(ax: Axes, x: float, loss: float, label: str) -> None:
    """A diamond where the level is reached, a line down to the axis, and its label where no curve passes."""
    bottom, end = ax.get_ylim()[0], ax.get_xlim()[1]
    ax.plot([x, x], [bottom, loss], color=FG, linewidth=0.8)
    ax.plot([x], [loss], color=FG, marker="D", markersize=5, zorder=5)
    left = x > 0.45 * end
    ax.annotate(label, (x, 0.03), (-5 if left else 5, 0), xycoords=("data", "axes fraction"),
                textcoords="offset points", ha="right" if left else "left", va="bottom")  # fmt: skip


def _crossing(comparison: Comparison, unit: str) -> tuple[float | None, str]:
    """Where the winner reaches the loser's final loss, in the unit of the axis, and its label."""
    reached = comparison.speedup.get("tokens_to_reach")
    if reached is None:
        return None, ""
    sign = {"at most": "≤ ", "at least": "≥ "}.get(bound_on_tokens(comparison) or "", "")
    if unit == "tokens":
        return float(reached), f"{sign}{si(float(reached))} tokens"
    winner = comparison.arms[comparison.winner]
    seconds = winner.seconds * float(reached) / winner.tokens
    return seconds, f"{sign}{seconds:,.0f} s"


def _caption(comparison: Comparison, unit: str, crossed: bool) -> str:
    winner, loser = ARM_NAMES[comparison.winner], ARM_NAMES[comparison.loser]
    diamond = f"The diamond marks where {winner} reaches {loser}’s final loss. " if crossed else ""
    arms = comparison.arms.values()
    if unit == "seconds":
        full = [f"{arm.seconds:,.0f} s for a full {ARM_NAMES[arm.name]} run" for arm in arms if arm.whole_runs]
        return (
            f"The same over training time as the runs recorded it, validation not counted: {listed(full)}. {diamond}"
            "Runs may have shared the machine; the factor in seconds above uses step times measured apart."
        )
    several = "Thin lines are single seeds, thick lines their mean. " if comparison.seeds > 1 else "One seed per arm. "
    gone = "".join(f"{escape(run.name)} diverged. " for arm in arms for run in arm.runs if run.diverged)
    ends = (
        f"Circles are the ends of {winner}’s whole schedules of several lengths; compare these with the dashed line, and not "
        "the curves on their way. "
        if comparison.ends
        else ""
    )
    return f"{several}{gone}{ends}{diamond}The steep beginning is cut off. Corresponds to figures 1 and 2 of the paper."
