"""Loss over peak learning rate, plain nGPT above nuGPT, a column for each of width, budget and depth;
and the table of minima.

    python research/pairs_summary.py --sweeps runs/{width,budget,depth}-{adam,nugpt} --out docs/results/transfer.json
    python research/transfer_picture.py docs/results/transfer.json docs/images/transfer.svg

The sweeps are those of docs/recipes.md, named after what they vary and their recipe.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from spherelm.experiments.robustness import best_between
from spherelm.report.charts import LOOKS
from spherelm.report.drawing import COLOURS, Figure
from spherelm.report.svg import standalone

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Canvas

FIELDS = {"width": ("d_model", "channels"), "budget": ("steps", "updates"), "depth": ("n_layers", "layers")}
LIMIT = 0.75
"""Nats above its lowest point to which a curve is drawn."""

RECIPES = {"adam": "nGPT", "nugpt": "nuGPT"}

Curves = dict[int, list[tuple[float, float]]]
"""By the value of the field that is varied: (peak learning rate, mean final loss), ascending."""


def curves(sweep: dict[str, Any], field: str) -> Curves:
    """The curves of one sweep; a choice that diverged anywhere has a mean that is not a number."""
    found: Curves = {}
    for row in sweep["rows"]:
        mean = float("nan") if row["mean"] is None else float(row["mean"])
        found.setdefault(int(row["choice"][field]), []).append((float(row["choice"]["lr"]), mean))
    return {value: sorted(points) for value, points in sorted(found.items())}


def read(path: Path) -> dict[tuple[str, str], Curves]:
    """All curves, by what is varied and the recipe."""
    found = {}
    for sweep in json.loads(path.read_text(encoding="utf-8"))["sweeps"]:
        kind, recipe = sweep["name"].split("-")
        recipe = {"default": "adam"}.get(recipe, recipe)  # its name until Muon became the default
        found[kind, recipe] = curves(sweep, FIELDS[kind][0])
    return found


def drift(found: Curves) -> float | None:
    """The power of the varied number with which the best rate goes, by least squares;
    `None` if a minimum is not enclosed.
    """
    best = {value: best_between(points) for value, points in found.items()}
    if None in best.values():
        return None
    slope: float = np.polyfit(np.log(list(best)), np.log([rate for rate in best.values() if rate]), 1)[0]
    return slope


def table(found: dict[tuple[str, str], Curves]) -> str:
    """A line for each sweep and value: the lowest mean loss, its rate, and the rate between those that were tried."""
    lines = ["| recipe | | lowest loss | at rate | by a parabola | grows as |", "|---|---|---|---|---|---|"]
    for (kind, recipe), by_value in found.items():
        power = drift(by_value)
        for value, points in by_value.items():
            rate, loss = min(points, key=lambda point: (np.isnan(point[1]), point[1]))
            between = best_between(points)
            grows = "" if value != max(by_value) else "unknown" if power is None else f"{kind}^{power:+.2f}"
            enclosed = "at the edge" if between is None else f"{between:.2g}"
            cells = [RECIPES[recipe], f"{value} {FIELDS[kind][1]}", f"{loss:.3f}", f"{rate:g}", enclosed, grows]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def picture(found: dict[tuple[str, str], Curves]) -> Figure:
    """A panel a sweep; a vertical line marks where the parabola has its minimum."""
    kinds = list(dict.fromkeys(kind for kind, _ in found))

    def draw(canvas: Canvas) -> None:
        from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

        axes = canvas.subplots(len(RECIPES), len(kinds), sharex="col", sharey=True, squeeze=False)
        for row, recipe in zip(axes, RECIPES, strict=True):
            for ax, kind in zip(row, kinds, strict=True):
                for (value, points), (dashes, marker) in zip(found[kind, recipe].items(), LOOKS, strict=False):
                    rates, losses = np.array(points).T
                    ax.plot(rates, losses - np.nanmin(losses), color=COLOURS["ngpt"], linestyle=dashes, marker=marker,
                            markersize=3.5, label=f"{value} {FIELDS[kind][1]}")  # fmt: skip
                    if best := best_between(points):
                        ax.axvline(best, color=COLOURS["ngpt"], linestyle=dashes, linewidth=0.8, alpha=0.6)
                ax.set_xscale("log")
                ax.xaxis.set_major_locator(
                    FixedLocator(sorted({rate for line in found[kind, recipe].values() for rate, _ in line}))
                )
                ax.xaxis.set_minor_locator(NullLocator())
                ax.xaxis.set_major_formatter(FuncFormatter(lambda rate, _: f"{rate:g}"))
                ax.tick_params(labelsize=6.5)
                ax.set_ylim(-0.03, LIMIT)
                if recipe == "adam":
                    ax.legend(fontsize=6.5, frameon=False)
            row[0].set_ylabel(f"{RECIPES[recipe]}: loss above the best", fontsize=8.5)
        canvas.supxlabel("peak learning rate", fontsize=8.5)

    return Figure(
        "transfer", "Loss over peak learning rate",
        "How far the final validation loss lies above the lowest of its curve, over the peak learning rate, for several "
        "widths, budgets and depths, plain nGPT in the upper row and nuGPT in the lower; a vertical line stands where a "
        "parabola through the three lowest points has its minimum.",
        draw, (2.4 * len(kinds) + 0.5, 4.4),
    )  # fmt: skip


def main() -> None:
    """Read the arguments and write the result."""
    found = read(Path(sys.argv[1]))
    Path(sys.argv[2]).write_text(standalone(picture(found).svg), encoding="utf-8")
    print(table(found))


if __name__ == "__main__":
    main()
