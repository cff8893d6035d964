"""`spherelm report`: where many runs ended, over token budget and over peak learning rate, from their directories.

The paper draws these as figures 2, 3, 7, 8 and 13.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from spherelm.counting import counted
from spherelm.data.output import write_json
from spherelm.errors import NotFoundError, UserError
from spherelm.experiments.robustness import TOLERANCE, tolerated, where_best
from spherelm.models import ARM_NAMES
from spherelm.report.charts import GuideLine, Line, Panel, chart, line_of
from spherelm.report.drawing import Figure, require_matplotlib
from spherelm.report.ends import (
    End,
    best_at,
    best_at_rates,
    check_same_text,
    find_runs,
    finite,
    points_by,
    points_of,
    read_end,
)
from spherelm.report.pages import Sections, new_directory, render, write_figures
from spherelm.report.wording import listed, mean_and_error, si
from spherelm.runs.record import command_line, git_commit, versions

NOTHING_DRAWN = "no two runs of one arm and size differ in budget or learning rate"
"""Why there may be no figure."""

RECORD = "ends.json"
"""The file by which a directory is known as one of `spherelm report`."""


def write_ends(directories: Sequence[Path], out: Path, overwrite: bool = False) -> list[Figure]:
    """Write `out`: index.html, figures/, ends.json; returns the figures.

    directories: of `spherelm compare` and `spherelm sweep`, or single runs. Task scores and perplexities over length
    are read where `spherelm eval RUN --json RUN/NAME.json` left them. overwrite: in the place of what an earlier call
    wrote. Raises `NotFoundError` for a directory without finished runs, `OutputExistsError` where `out` holds
    something, `UserError` for runs that were validated on different text.
    """
    if not directories:
        raise UserError("no run is named: give directories of spherelm train or compare")
    require_matplotlib()
    with new_directory(out, RECORD, overwrite) as part:
        runs = dict.fromkeys(run.resolve() for directory in directories for run in find_runs(directory))
        check_same_text(list(runs))
        ended = [end for run in runs if (end := read_end(run)) is not None]
        ends = list({(end.choice, end.seed): end for end in reversed(ended)}.values())[::-1]
        if not ends:
            raise NotFoundError(f"no finished run in {listed([str(path) for path in directories])}")
        sections = [
            ("Loss over token budget", _budget_figures(ends)),
            ("Loss over peak learning rate", _rate_figures(ends)),
            ("Tasks over token budget", _task_figures(ends)),
            ("Beyond the training length", _length_figures(ends)),
        ]
        figures = write_figures(sections, part)
        write_json(part / RECORD, _record(ends))
        page = _page(ends, sections, len(runs) - len(ended), len(ended) - len(ends))
        (part / "index.html").write_text(page, encoding="utf-8")
    return figures


def _line(arm: str, name: str, points: Sequence[tuple[float, Sequence[float]]], look: int) -> Line:
    """A line through the means over seeds at each x, with every seed as a small dot."""
    x = [x for x, _ in points]
    several = [(x, value) for x, values in points if len(values) > 1 for value in values]
    dots = tuple(np.array(several).T) if several else None
    return line_of(arm, x, [[float(np.mean(values)) for _, values in points]], name, look, dots=dots)


def _figure(
    key: str, title: str, caption: str, lines: Sequence[Line], x: str, y: str, tokens: bool, chance: float | None = None
) -> Figure:  # fmt: skip
    rules = [] if chance is None else [GuideLine(chance, label="chance")]
    panel = Panel(lines, x, y, rules=rules, scale="tokens" if tokens else "values")
    return chart(key, title, escape(caption), [panel], legend=1 if any(len(line.label) > 24 for line in lines) else 2)


def _over_budget(ends: Sequence[End], read: Any) -> tuple[list[Line], list[str]]:
    """A line for each arm and size, of the best choice at each budget; and the sizes."""
    groups = points_by(ends, lambda end: end.size)
    sizes = list(dict.fromkeys(size for _, size in groups))
    lines = []
    for (arm, size), points in groups.items():
        best = finite(best_at(points, lambda end: end.budget))
        values = [(x, [read(end) for end in point.ends]) for x, point in best]
        if values:
            lines.append(_line(arm, size if len(sizes) > 1 else "", values, sizes.index(size)))
    return lines, sizes


def _budget_figures(ends: Sequence[End]) -> list[Figure]:
    lines, sizes = _over_budget(ends, lambda end: end.loss)
    if not any(len(np.asarray(line.x)) > 1 for line in lines):
        return []
    caption = (
        "Every point is the end of a whole schedule of that many tokens, mean over seeds (small dots), at the best choice that "
        f"was run at that budget{'' if len(sizes) > 1 else ' (' + sizes[0] + ')'}. Corresponds to figure 2 of the paper."
    )
    y = "final validation loss (nats per token)"
    return [_figure("budget", "Final loss over token budget", caption, lines, "training tokens", y, True)]


def _rate_figures(ends: Sequence[End]) -> list[Figure]:
    groups = points_by(ends, lambda end: (end.size, end.budget, end.method))
    found = {group: best_at_rates(points) for group, points in groups.items()}
    found = {group: rates for group, rates in found.items() if len(finite(rates)) > 1}
    kinds = list(dict.fromkeys(kind for _, kind in found))
    budgets = list(dict.fromkeys((size, budget) for size, budget, _ in kinds))
    methods = list(dict.fromkeys(method for _, _, method in kinds))
    lines, optima, near = [], [], []
    for (arm, (size, budget, method)), rates in found.items():
        budget_in_words = f"{size}, {si(budget)} tokens" if len(budgets) > 1 else ""
        label = ", ".join(word for word in (budget_in_words, method if len(methods) > 1 else "") if word)
        values = [(x, point.losses) for x, point in finite(rates)]
        lines.append(_line(arm, label, values, kinds.index((size, budget, method))))
        losses = [(x, point.loss) for x, point in rates]
        name = f"{ARM_NAMES[arm]}{f' ({label})' if label else ''}"
        optima.append(f"{name} {where_best(losses)}")
        near.append(f"{name} {tolerated(losses)}")
    if not lines:
        return []
    alone = f" of {si(budgets[0][1])} tokens ({budgets[0][0]})" if len(budgets) == 1 else ""
    caption = (
        f"Ends of whole schedules{alone}, means over the seeds (small dots) that all rates of a line have. "
        f"The lowest: {listed(optima)}. Within {100 * TOLERANCE:g} % of its own best: {listed(near)}. "
        "Corresponds to figure 7 of the paper."
    )
    y = "final validation loss (nats per token)"
    return [_figure("rate", "Final loss over peak learning rate", caption, lines, "peak learning rate", y, False)]


def _task_figures(ends: Sequence[End]) -> list[Figure]:
    """One figure a task, of the runs with the best loss at each budget, as far as they were evaluated."""
    figures = []
    for task in dict.fromkeys(name for end in ends for name in end.scores):
        scored = [end for end in ends if task in end.scores]
        lines, _ = _over_budget(scored, lambda end, task=task: end.scores[task][0])
        if lines:
            key = "task-" + "".join(letter if letter.isalnum() else "-" for letter in task)
            caption = f"{task}, mean over seeds (small dots). Corresponds to figures 3 and 8 of the paper."
            chance = scored[0].scores[task][1]
            figures.append(_figure(key, task, caption, lines, "training tokens", "score", True, chance))
    return figures


def _length_figures(ends: Sequence[End]) -> list[Figure]:
    """A figure for each text (and way to cut it) and set of lengths:
    what was measured on other tokens does not compare.
    """
    groups: dict[tuple[str, tuple[int, ...]], list[tuple[End, Any]]] = {}
    for end in ends:
        for one in end.lengths:
            groups.setdefault((one.text, tuple(sorted(one.perplexities))), []).append((end, one))
    return [
        _length_figure(f"length-{i}", text, lengths, group)
        for i, ((text, lengths), group) in enumerate(groups.items())
        if len(lengths) > 1
    ]


def _length_figure(key: str, text: str, lengths: Sequence[int], group: Sequence[tuple[End, Any]]) -> Figure:
    kinds: dict[tuple[str, str, str], list[Any]] = {}
    for end, one in group:
        kinds.setdefault((end.size, one.positions, end.arm), []).append(one)
    looks = list(dict.fromkeys(kind[:2] for kind in kinds))
    several = len({size for size, _ in looks}) > 1
    lines = [
        _line(
            arm,
            f"{size}, {positions}" if several else positions,
            [(length, [one.perplexities[length] for one in seeds]) for length in lengths],
            looks.index((size, positions)),
        )
        for (size, positions, arm), seeds in kinds.items()
    ]
    trained = listed([f"{length:,}" for length in sorted({one.trained for _, one in group})])
    caption = (
        f"On {text}: at each length the same tokens. Trained at {trained} tokens. Means over seeds (small dots). "
        "Corresponds to figure 13 of the paper."
    )
    title = "Perplexity over the length of the window"
    return _figure(key, title, caption, lines, "tokens of a window", "perplexity", False)


def _record(ends: Sequence[End]) -> dict[str, Any]:
    rows = [
        {"run": e.name, "arm": e.arm, "size": e.size, "tokens": e.budget, "lr": e.config.optim.lr,
         "recipe": e.config.recipe, "seed": e.seed, "loss": e.loss,
         "scores": {task: value for task, (value, _) in e.scores.items()}}
        for e in ends
    ]  # fmt: skip
    return {"ends": rows, "command": command_line(), "git_commit": git_commit(), "versions": versions()}


def _page(ends: Sequence[End], sections: Sections, unfinished: int, repeated: int) -> str:
    points = sorted(points_of(ends), key=lambda point: (point.first.arm, point.first.budget, point.loss))
    rows = [
        (ARM_NAMES[p.first.arm], p.first.size, p.first.config.recipe, si(p.first.budget), f"{p.first.config.optim.lr:g}",
         str(len(p.ends)), mean_and_error(p.losses) if math.isfinite(p.loss) else "diverged")
        for p in points
    ]  # fmt: skip
    left = f" Left out: {unfinished} that did not come to their end." if unfinished else ""
    left += f" {repeated} that repeat another run, seed included, count once." if repeated else ""
    caption = f"All choices, each at the end of its own schedule: mean over seeds ± standard error.{left}"
    return render(
        "runs.html",
        kicker="spherelm report",
        title="Where the runs ended",
        subtitle=counted(len(ends), "run"),
        heading="All runs",
        table=(caption, ["Arm", "Layers x width", "Recipe", "Tokens", "Peak rate", "Seeds", "Final loss"], rows),
        table_first=False,
        sections=sections,
        no_figure="" if any(figures for _, figures in sections) else f"There is no figure, since {NOTHING_DRAWN}.",
        command=command_line(),
    )
