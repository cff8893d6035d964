"""The picture of docs/evidence.md: where both arms end over their tokens, and how many fewer nGPT needs at every point.

python research/ladder_picture.py docs/results/ladder.json docs/images/ladder.svg
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pairs_summary import read_json

from spherelm.report.charts import LOOKS
from spherelm.report.drawing import COLOURS, FG, Figure
from spherelm.report.svg import standalone

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas

ARMS = {"gpt-muon": "gpt", "ngpt-muon": "ngpt"}
NAMES = {"books": "books", "wiki": "encyclopedia"}


def ends(ax: Axes, text: dict[str, Any]) -> None:
    """Test loss over tokens at the smallest size, and from each of GPT's points to where nGPT reaches it."""
    rows = [row for row in text["measured"] if (row["size"], row["context"]) == ("0.3m", 256)]
    for contender, arm in ARMS.items():
        line = sorted((row["tokens"], row["test_mean"]) for row in rows if row["contender"] == contender)
        ax.plot(*zip(*line, strict=True), color=COLOURS[arm], marker="o", markersize=4, label=arm.replace("gpt", "GPT"))
    for row in text["speedups"]:
        if (row["size"], row["context"], row["baseline"], row["contender"]) == ("0.3m", 256, *ARMS):
            loss = next(
                one["test_mean"] for one in rows if (one["tokens"], one["contender"]) == (row["tokens"], "gpt-muon")
            )
            ax.plot(
                [row["tokens"] / row["speedup"], row["tokens"]], [loss, loss], color=FG, linewidth=0.8, linestyle=":"
            )
            ax.annotate(f"{row['speedup']:.2f}x", (row["tokens"], loss), textcoords="offset points", xytext=(4, 4))
    ax.set_xscale("log")
    ax.set_xlabel("training tokens (0.3m, context 256, books)")
    ax.set_ylabel("test loss (nats per token)")
    ax.margins(x=0.15, y=0.1)
    ax.legend()


def gains(ax: Axes, texts: list[dict[str, Any]]) -> None:
    """How many times fewer tokens, over the tokens a block parameter, a line for each size, context and text."""
    lines: dict[tuple[str, int, str], list[dict[str, Any]]] = {}
    for text in texts:
        for row in text["speedups"]:
            if (row["baseline"], row["contender"]) == tuple(ARMS) and row["interval"]:
                lines.setdefault((row["size"], row["context"], text["text"]["train"]), []).append(row)
    marks = "osD^vP"
    for number, ((size, context, train), rows) in enumerate(lines.items()):
        rows.sort(key=lambda row: row["budget"])
        value = [row["speedup"] for row in rows]
        low, high = zip(*(row["interval"] for row in rows), strict=True)
        ax.errorbar(
            [row["budget"] * 1.08 ** (number % 3 - 1) for row in rows], value,
            [[v - e for v, e in zip(value, low, strict=True)], [e - v for v, e in zip(value, high, strict=True)]],
            color=COLOURS["ngpt"], linestyle=LOOKS[number % len(LOOKS)][0], marker=marks[number % len(marks)], markersize=4.5,
            elinewidth=0.8, capsize=2, label=f"{size}, {context}, {NAMES.get(train, train)}",
        )  # fmt: skip
    ax.axhline(1.0, color=FG, linewidth=0.8)
    ax.set_xscale("log")
    ax.set_xlabel("tokens for each block parameter")
    ax.set_ylabel("times fewer tokens than GPT (95 %)")
    ax.legend(fontsize=7)


def picture(texts: list[dict[str, Any]]) -> Figure:
    """Both panels."""

    def draw(canvas: Canvas) -> None:
        left, right = canvas.subplots(1, 2)
        ends(left, next(text for text in texts if text["text"]["train"] == "books"))
        gains(right, texts)

    return Figure(
        "ladder", "What nGPT saves, by budget, size, context and text",
        "Left: test loss of GPT and nGPT at the ends of whole schedules over their tokens, both with Muon, with how many times "
        "fewer tokens nGPT needs for each of GPT's losses. Right: that ratio with its 95 % interval over the tokens for each "
        "block parameter; points of one budget are drawn a little apart.",
        draw, (8.6, 3.6),
    )  # fmt: skip


def main() -> None:
    """Read the arguments and write the result."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("summary", type=Path, help="what research/ladder_summary.py wrote")
    parser.add_argument("picture", type=Path)
    given = parser.parse_args()
    given.picture.write_text(standalone(picture(read_json(given.summary)["texts"]).svg), encoding="utf-8")


if __name__ == "__main__":
    main()
