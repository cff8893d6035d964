"""The page of a sweep: every choice against the base of its arm, and the curve of every run."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from html import escape
from pathlib import Path

from spherelm.counting import counted
from spherelm.experiments.record import read_run
from spherelm.experiments.sweep import Row, canonical
from spherelm.models import NAMES
from spherelm.report.figures import Figure
from spherelm.report.inspect_page import figure_sections, plain_page, plain_table
from spherelm.report.sweep_plots import Curve, Panel, small_multiples


def varying(rows: Sequence[Row]) -> list[str]:
    """The keys in which the choices differ, the arm aside; a key that one has and another leaves out is one of them."""
    keys = dict.fromkeys(key for row in rows for key in row.choice if key != "arm")
    return [key for key in keys if len({_of(row, key) for row in rows}) > 1]


def _of(row: Row, key: str) -> str:
    return canonical({key: row.choice[key]}) if key in row.choice else ""


def label(row: Row, keys: Sequence[str]) -> str:
    """What tells this choice from the others, in few words."""
    named = {key: row.choice[key] for key in keys if key in row.choice}
    words = [
        value if isinstance(value, str) else f"{key} {value:g}" if isinstance(value, float) else f"{key} {value}"
        for key, value in named.items()
    ]
    return ", ".join(words) or ("nothing changed" if keys else "the only choice")


def write_page(rows: Sequence[Row], out: Path) -> None:
    """Write `out/index.html` on the sweep whose `sweep.json` and runs are in `out`.

    rows: best first, or in any other order that the table shall have.
    """
    commands, keys = json.loads((out / "sweep.json").read_text("utf-8"))["commands"], varying(rows)
    sections = [(f"Every run of {NAMES[arm]}", "", [figure]) for arm, figure in _figures(rows, keys, out)]
    command = f"<section><h2>Reproduce</h2><pre><code>{escape(chr(10).join(commands))}</code></pre></section>"
    body = f"<section><h2>All choices</h2>{_table(rows, keys)}</section>\n{figure_sections(sections)}\n{command}"
    count = sum(len(row.losses) for row in rows)
    page = plain_page(
        "spherelm sweep", "How the choices ended", f"{counted(len(rows), 'choice')}, {counted(count, 'run')}", body
    )
    (out / "index.html").write_text(page, encoding="utf-8")


def _table(rows: Sequence[Row], keys: Sequence[str]) -> str:
    shown = []
    for row in rows:
        difference = "base" if row.base is None else _with_error(row.difference, row.difference_error, signed=True)
        cells = [NAMES[str(row.choice["arm"])], *(str(row.choice.get(key, "")) for key in keys)]
        diverged = sum(math.isnan(loss) for loss in row.losses)
        end = f"{diverged} of {len(row.losses)} diverged" if diverged else _with_error(row.mean, row.standard_error)
        shown.append((*cells, str(len(row.losses)), end, difference))
    caption = (
        "Final validation loss, nats per token: mean over seeds ± standard error, and the mean difference from the base, the "
        "first choice of the arm, seed by seed. A run whose validation loss rises far above an untrained model's is stopped."
    )
    return plain_table(caption, ["Arm", *keys, "Seeds", "Final loss", "Against the base"], shown)


def _with_error(value: float | None, error: float | None, signed: bool = False) -> str:
    if value is None or math.isnan(value):
        return "unknown"
    return f"{value:{'+' if signed else ''}.4f}" + (f" ± {error:.4f}" if error is not None else "")


def _figures(rows: Sequence[Row], keys: Sequence[str], out: Path) -> list[tuple[str, Figure]]:
    figures = []
    for arm in dict.fromkeys(str(row.choice["arm"]) for row in rows):
        own = [row for row in rows if row.choice["arm"] == arm]
        base = next(row for row in own if row.base is None)
        behind = [_curve(out / run) for run in base.runs]
        panels = [
            Panel(label(row, keys), arm, [_curve(out / run) for run in row.runs], () if row is base else behind)
            for row in own
        ]
        title = f"Validation loss of every run of {NAMES[arm]}"
        caption = f"A panel for each choice, a line for each seed; grey: the base ({label(base, keys)})."
        figures.append((arm, Figure(small_multiples(panels, f"sweep-{arm}", title, caption), title, escape(caption))))
    return figures


def _curve(run: Path) -> Curve:
    found = read_run(run)
    return found.tokens, found.loss
