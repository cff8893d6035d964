"""The page of a sweep: every choice against the base of its arm, and the curve of every run."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from html import escape
from pathlib import Path

import numpy as np

from spherelm.counting import counted
from spherelm.experiments.record import Run, read_run
from spherelm.experiments.sweep import Row, canonical
from spherelm.models import ARM_NAMES
from spherelm.report.charts import Line, Panel, chart
from spherelm.report.drawing import COLOURS, MUTED, Figure
from spherelm.report.pages import render
from spherelm.runs.config import read_config

COLUMNS = 3
PANEL = (2.1, 1.7)  # inches


def write_page(rows: Sequence[Row], out: Path) -> None:
    """Write `out/index.html` on the sweep whose `sweep.json` and runs are in `out`.

    rows: best first, or in any other order that the table shall have.
    """
    commands, keys = json.loads((out / "sweep.json").read_text("utf-8"))["commands"], varying(rows)
    runs = {name: read_run(out / name) for row in rows for name in row.runs}
    by_arm = {arm: [row for row in rows if row.choice["arm"] == arm] for arm in ARM_NAMES}
    page = render(
        "runs.html",
        kicker="spherelm sweep",
        title="How the choices ended",
        subtitle=f"{counted(len(rows), 'choice')}, {counted(len(runs), 'run')} · {' · '.join(_in_common(rows, out))}",
        heading="All choices",
        table=_table(rows, keys),
        table_first=True,
        sections=[
            (f"Every run of {ARM_NAMES[arm]}", [_figure(arm, own, keys, runs)]) for arm, own in by_arm.items() if own
        ],
        no_figure="",
        command="\n".join(commands),
    )
    (out / "index.html").write_text(page, encoding="utf-8")


def varying(rows: Sequence[Row]) -> list[str]:
    """The keys in which the choices differ, the arm aside; a key that one has and another leaves out is one of them."""
    keys = dict.fromkeys(key for row in rows for key in row.choice if key != "arm")
    return [key for key in keys if len({_of(row, key) for row in rows}) > 1]


def _of(row: Row, key: str) -> str:
    return canonical({key: row.choice[key]}) if key in row.choice else ""


def label(row: Row, keys: Sequence[str]) -> str:
    """A short name of a choice: the fields in which the choices differ."""
    named = {key: row.choice[key] for key in keys if key in row.choice}
    words = [
        value if isinstance(value, str) else f"{key} {value:g}" if isinstance(value, float) else f"{key} {value}"
        for key, value in named.items()
    ]
    return ", ".join(words) or ("nothing changed" if keys else "the only choice")


def _in_common(rows: Sequence[Row], out: Path) -> list[str]:
    """Size, length and data of the runs, as far as all share them."""
    configs = [read_config(out / row.runs[0] / "config.json") for row in rows]
    facts = [
        (
            f"{config.model.n_layers} layers of {config.model.d_model}",
            f"{counted(config.train.steps, 'step')} of {config.train.batch_size} × {config.train.seq_len} tokens",
            f"data {config.data}" if config.data else "the shipped text",
        )
        for config in configs
    ]
    return [values[0] for values in zip(*facts, strict=True) if len(set(values)) == 1]


def _table(rows: Sequence[Row], keys: Sequence[str]) -> tuple[str, list[str], list[tuple[str, ...]]]:
    shown = []
    for row in rows:
        difference = "base" if row.base is None else _with_error(row.difference, row.difference_error, signed=True)
        cells = [ARM_NAMES[str(row.choice["arm"])], *(str(row.choice.get(key, "")) for key in keys)]
        diverged = sum(math.isnan(loss) for loss in row.losses)
        end = f"{diverged} of {len(row.losses)} diverged" if diverged else _with_error(row.mean, row.standard_error)
        shown.append((*cells, str(len(row.losses)), end, difference))
    caption = (
        "Final validation loss, nats per token: mean over seeds ± standard error, and the mean difference from the base, the "
        "first choice of the arm, seed by seed. A run whose validation loss rises far above an untrained model’s is stopped."
    )
    return caption, ["Arm", *keys, "Seeds", "Final loss", "Against the base"], shown


def _with_error(value: float | None, error: float | None, signed: bool = False) -> str:
    if value is None or math.isnan(value):
        return "unknown"
    return f"{value:{'+' if signed else ''}.4f}" + (f" ± {error:.4f}" if error is not None else "")


def _figure(arm: str, rows: Sequence[Row], keys: Sequence[str], runs: dict[str, Run]) -> Figure:
    """A panel for each choice of an arm, all with the same axes; untrained starts are left out."""
    base = next(row for row in rows if row.base is None)
    panels = []
    low, high = limits([runs[name] for row in rows for name in row.runs])
    for row in rows:
        behind = () if row is base else base.runs
        lines = [_curve(runs[name], MUTED) for name in behind] + [_curve(runs[name], COLOURS[arm]) for name in row.runs]
        panels.append(Panel(lines, title=label(row, keys), scale="units", low=low, high=high))
    title = f"Validation loss of every run of {ARM_NAMES[arm]}"
    caption = f"A panel for each choice, a line for each seed; grey: the base ({escape(label(base, keys))})."
    columns = min(COLUMNS, len(panels))
    size = (PANEL[0] * columns + 0.5, PANEL[1] * -(-len(panels) // columns) + 0.5)
    x, y = "training tokens", "validation loss (nats per token)"
    return chart(f"sweep-{arm}", title, caption, panels, columns=columns, legend=0, x=x, y=y, size=size)


def _curve(run: Run, colour: str) -> Line:
    trained = run.tokens > 0
    return Line(run.tokens[trained], [run.loss[trained]], colour, width=1.1)


def limits(runs: Sequence[Run]) -> tuple[float, float]:
    """From below the lowest loss to above every end, and above what most runs are at after their first validation."""
    drawn = [run.loss[run.tokens > 0] for run in runs]
    drawn = [loss[np.isfinite(loss)] for loss in drawn if np.isfinite(loss).any()]
    if not drawn:
        return 0.0, 1.0
    low = float(min(loss.min() for loss in drawn))
    high = float(max(np.median([loss[0] for loss in drawn]), *(loss[-1] for loss in drawn)))
    margin = 0.05 * max(high - low, 0.02)
    return low - margin, high + margin
