"""`spherelm report`: where many runs ended, over token budget and over peak learning rate, from their directories.

What the paper draws as figures 2, 3, 7, 8 and 13. Every run is one point, at the end of its own schedule; seeds of one choice
are averaged; of several choices with the same budget, or the same budget and learning rate, the best is drawn. Choices are
compared on the seeds that all of them have: a search runs most rates with one seed and the best with several.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from spherelm.counting import counted
from spherelm.data.output import check_free, whole_directory
from spherelm.errors import NotFoundError, UserError
from spherelm.experiments.record import Run, read_run
from spherelm.experiments.robustness import TOLERANCE, tolerated, where_best
from spherelm.models import NAMES
from spherelm.report.drawing import require_matplotlib
from spherelm.report.figures import Figure
from spherelm.report.inspect_page import figure_sections, plain_page, plain_table, write_figures
from spherelm.report.ladder_plots import Series, ends_of_runs
from spherelm.report.length_figures import Measured, evaluations, length_figures, read_lengths
from spherelm.report.wording import listed, si
from spherelm.runs.config import RunConfig, read_config
from spherelm.runs.record import command_line, git_commit, versions, write_json

NOTHING_DRAWN = "no two runs of one arm and size differ in budget or learning rate"
"""Why there may be no figure."""


@dataclass(frozen=True)
class End:
    """Where one run ended: `loss` in nats per token, NaN if it diverged; `scores` by task, `{"arc_easy": (value, chance)}`.

    `lengths`: what was measured of its perplexity over length.
    """

    name: str
    config: RunConfig
    loss: float
    scores: Mapping[str, tuple[float, float | None]]
    lengths: Sequence[Measured]

    @property
    def budget(self) -> int:
        """Tokens of its whole schedule."""
        train = self.config.train
        return train.steps * train.batch_size * train.seq_len

    @property
    def size(self) -> str:
        """Its shape and context, in words."""
        return size_of(self.config)

    @property
    def way(self) -> str:
        """What its peak learning rate is a rate of: the recipe, and the optimizer where the name does not say it."""
        optimizer = self.config.optim.optimizer.kind
        return self.config.recipe if optimizer == self.config.recipe else f"{self.config.recipe}, {optimizer}"

    @property
    def choice(self) -> str:
        """All that was chosen for it but the seed, to tell choices apart."""
        plain = dataclasses.asdict(self.config)
        plain["train"] |= {"seed": 0, "log_to": "", "save_every": 0, "save_minutes": 0, "keep": 0, "compile": False}
        return json.dumps(plain, sort_keys=True, default=str)


def size_of(config: RunConfig) -> str:
    """Shape and context of a run, in words."""
    return f"{config.model.n_layers} x {config.model.d_model}, context {config.train.seq_len}"


@dataclass(frozen=True)
class Point:
    """The seeds of one choice."""

    ends: Sequence[End]

    @property
    def loss(self) -> float:
        """Mean final loss; infinite if a seed diverged, so that it is never the best."""
        mean = float(np.mean([end.loss for end in self.ends]))
        return math.inf if math.isnan(mean) else mean

    @property
    def seeds(self) -> set[int]:
        """Those it was run with."""
        return {end.config.train.seed for end in self.ends}

    def only(self, seeds: Collection[int]) -> Point:
        """The same choice with no other seeds than these."""
        return Point([end for end in self.ends if end.config.train.seed in seeds])


def write_ladder(directories: Sequence[Path], out: Path) -> list[Figure]:
    """Write `out`: index.html, figures/, ends.json; returns the figures.

    directories: of `spherelm compare` and `spherelm sweep`, or single runs. Task scores and perplexities over length are read
    where `spherelm eval RUN --json RUN/NAME.json` left them. Raises FileNotFoundError for a directory without finished runs,
    FileExistsError where `out` holds something, ValueError for runs that were validated on different text.
    """
    if not directories:
        raise UserError("no run is named: give directories of spherelm train or compare")
    require_matplotlib()
    check_free(out)
    runs = dict.fromkeys(run.resolve() for directory in directories for run in find_runs(directory))
    check_same_text(list(runs))
    ended = [end for run in runs if (end := read_end(run)) is not None]
    ends = list({(end.choice, end.config.train.seed): end for end in reversed(ended)}.values())[::-1]
    if not ends:
        raise NotFoundError(f"no finished run in {listed([str(path) for path in directories])}")
    sections = [
        ("Loss over token budget", "", _budget_figures(ends)),
        ("Loss over peak learning rate", "", _rate_figures(ends)),
        ("Tasks over token budget", "", _task_figures(ends)),
        ("Beyond the length trained on", "", length_figures([one for end in ends for one in end.lengths])),
    ]
    page = _page(ends, sections, len(runs) - len(ended), len(ended) - len(ends))
    with whole_directory(out) as part:
        figures = write_figures([figure for _, _, group in sections for figure in group], part)
        write_json(part / "ends.json", _record(ends))
        (part / "index.html").write_text(page, encoding="utf-8")
    return figures


def find_runs(directory: Path) -> Iterator[Path]:
    """The directory itself if it is a run, else the runs in it; raises FileNotFoundError if there are none."""
    found = [path for path in (directory, *sorted(directory.glob("*"))) if (path / "metrics.jsonl").is_file()]
    if not found:
        raise NotFoundError(f"{directory} holds no run: pass directories of spherelm compare, sweep or train")
    yield from found


def check_same_text(runs: Sequence[Path]) -> None:
    """`ValueError` if two runs were validated on different text: their losses have nothing to do with each other."""
    known: tuple[Path, Any] | None = None
    for run in runs:
        path = run / "config.json"
        try:
            identity = dict(json.loads(path.read_text("utf-8"))).get("data_identity") or {}
            text = (identity.get("val"), identity.get("tokenizer"))
        except (ValueError, TypeError, AttributeError) as error:
            raise UserError(f"{path} is damaged ({error}): leave {run} out") from error
        known = known or (run, text)
        if text != known[1]:
            raise UserError(
                f"{run} and {known[0]} were validated on different text or tokens, and their losses cannot be compared: "
                "report on them one after the other"
            )


def read_end(directory: Path) -> End | None:
    """Where the run ended, None if it did not come to its end."""
    config = read_config(directory / "config.json")
    try:
        run: Run = read_run(directory)
    except ValueError:  # stopped before its first validation
        return None
    if not run.diverged and run.steps[-1] < config.train.steps:
        return None
    lengths = read_lengths(directory, config.arm, size_of(config))
    return End(directory.name, config, run.final_loss, read_scores(directory), lengths)


def read_scores(run: Path) -> dict[str, tuple[float, float | None]]:
    """Accuracies (or what a task has first) from the files that `spherelm eval --json` wrote into the run directory."""
    scores: dict[str, tuple[float, float | None]] = {}
    for record in evaluations(run):
        tasks = record.get("tasks")
        if not isinstance(tasks, dict):
            continue  # some other JSON file of the user's
        for name, task in tasks.items():
            metrics = task.get("metrics") or {}
            if metrics:
                first = metrics.get("acc") or next(iter(metrics.values()))
                scores[name] = (float(first["value"]), task.get("chance"))
        if tasks and "average" in record:
            scores["average of the five"] = (float(record["average"]["acc"]["value"]), None)
    return scores


def _points(ends: Sequence[End]) -> list[Point]:
    """Seeds of one choice together."""
    by_choice: dict[str, list[End]] = {}
    for end in ends:
        by_choice.setdefault(end.choice, []).append(end)
    return [Point(seeds) for seeds in by_choice.values()]


def _compared(points: Sequence[Point]) -> list[Point]:
    """`points` on the seeds that all of them have, where there are such."""
    shared = set[int].intersection(*(point.seeds for point in points))
    return [point.only(shared) for point in points] if shared else list(points)


def _best(points: Sequence[Point], read: Any) -> list[tuple[float, Point]]:
    """(x, the best point with this x), ascending; only diverged choices at an x leave one of them there."""
    at: dict[float, list[Point]] = {}
    for point in points:
        at.setdefault(float(read(point.ends[0])), []).append(point)
    return sorted(
        (x, min(zip(_compared(there), there, strict=True), key=lambda pair: pair[0].loss)[1]) for x, there in at.items()
    )


def _finite(best: Sequence[tuple[float, Point]]) -> list[tuple[float, Point]]:
    """Those that did not diverge, which can be drawn."""
    return [(x, point) for x, point in best if math.isfinite(point.loss)]


def _grouped(ends: Sequence[End], read: Any) -> dict[tuple[str, Any], list[Point]]:
    """Points by (arm, read(end)), in a fixed order."""
    groups: dict[tuple[str, Any], list[Point]] = {}
    for point in _points(ends):
        groups.setdefault((point.ends[0].config.arm, read(point.ends[0])), []).append(point)
    return dict(sorted(groups.items(), key=lambda pair: (str(pair[0][1]), pair[0][0])))


def _losses(best: Sequence[tuple[float, Point]]) -> tuple[Any, list[Any]]:
    return np.array([x for x, _ in best]), [np.array([end.loss for end in point.ends]) for _, point in best]


def _budget_figures(ends: Sequence[End]) -> list[Figure]:
    groups = _grouped(ends, lambda end: end.size)
    sizes = list(dict.fromkeys(size for _, size in groups))
    series = []
    for (arm, size), points in groups.items():
        best = _finite(_best(points, lambda end: end.budget))
        if best:
            series.append(Series(arm, size if len(sizes) > 1 else "", *_losses(best), sizes.index(size)))
    if not any(len(line.x) > 1 for line in series):
        return []
    title = "Final loss over token budget"
    caption = (
        "Every point is the end of a whole schedule of that many tokens, mean over seeds (small dots), at the best choice that "
        f"was run at that budget{'' if len(sizes) > 1 else ' (' + sizes[0] + ')'}. Corresponds to figure 2 of the paper."
    )
    drawing = ends_of_runs(
        series, "training tokens", "final validation loss (nats per token)", True, "budget", title, caption
    )
    return [Figure(drawing, title, escape(caption))]


def _rate_figures(ends: Sequence[End]) -> list[Figure]:
    groups = _grouped(ends, lambda end: (end.size, end.budget, end.way))
    found = {group: _rates_of(points) for group, points in groups.items()}
    found = {group: rates for group, rates in found.items() if len(_finite(rates)) > 1}
    kinds = list(dict.fromkeys(kind for _, kind in found))
    budgets = list(dict.fromkeys((size, budget) for size, budget, _ in kinds))
    ways = list(dict.fromkeys(way for _, _, way in kinds))
    series, optima, near = [], [], []
    for (arm, (size, budget, way)), rates in found.items():
        budget_in_words = f"{size}, {si(budget)} tokens" if len(budgets) > 1 else ""
        label = ", ".join(word for word in (budget_in_words, way if len(ways) > 1 else "") if word)
        series.append(Series(arm, label, *_losses(_finite(rates)), kinds.index((size, budget, way))))
        losses = [(x, point.loss) for x, point in rates]
        name = f"{NAMES[arm]}{f' ({label})' if label else ''}"
        optima.append(f"{name} {where_best(losses)}")
        near.append(f"{name} {tolerated(losses)}")
    if not series:
        return []
    title = "Final loss over peak learning rate"
    alone = f" of {si(budgets[0][1])} tokens ({budgets[0][0]})" if len(budgets) == 1 else ""
    caption = (
        f"Ends of whole schedules{alone}, means over the seeds (small dots) that all rates of a line have. "
        f"The lowest: {listed(optima)}. "
        f"Within {100 * TOLERANCE:g} % of its own best: {listed(near)}. "
        "Corresponds to figure 7 of the paper."
    )
    drawing = ends_of_runs(
        series, "peak learning rate", "final validation loss (nats per token)", False, "rate", title, caption
    )
    return [Figure(drawing, title, escape(caption))]


def _rates_of(points: Sequence[Point]) -> list[tuple[float, Point]]:
    """The best choice at each rate, ascending, all on the same seeds; diverged ones too."""
    best = _best(points, lambda end: end.config.optim.lr)
    return list(zip([x for x, _ in best], _compared([point for _, point in best]), strict=True))


def _task_figures(ends: Sequence[End]) -> list[Figure]:
    """One figure a task, of the runs with the best loss at each budget, as far as they were evaluated."""
    scored = [end for end in ends if end.scores]
    figures = []
    for task in dict.fromkeys(name for end in scored for name in end.scores):
        groups = _grouped([end for end in scored if task in end.scores], lambda end: end.size)
        sizes = list(dict.fromkeys(size for _, size in groups))
        series = []
        for (arm, size), points in groups.items():
            best = _finite(_best(points, lambda end: end.budget))
            values = [np.array([end.scores[task][0] for end in point.ends]) for _, point in best]
            if best:
                x = np.array([x for x, _ in best])
                series.append(Series(arm, size if len(sizes) > 1 else "", x, values, sizes.index(size)))
        if series:
            figures.append(_task_figure(task, series, next(e.scores[task][1] for e in scored if task in e.scores)))
    return figures


def _task_figure(task: str, series: Sequence[Series], chance: float | None) -> Figure:
    key = "task-" + "".join(letter if letter.isalnum() else "-" for letter in task)
    caption = f"{task}, mean over seeds (small dots). Corresponds to figures 3 and 8 of the paper."
    drawing = ends_of_runs(series, "training tokens", "score", True, key, task, caption, chance)
    return Figure(drawing, task, escape(caption))


def _record(ends: Sequence[End]) -> dict[str, Any]:
    rows = [
        {"run": e.name, "arm": e.config.arm, "size": e.size, "tokens": e.budget, "lr": e.config.optim.lr,
         "recipe": e.config.recipe, "seed": e.config.train.seed, "loss": e.loss,
         "scores": {task: value for task, (value, _) in e.scores.items()}}
        for e in ends
    ]  # fmt: skip
    return {"ends": rows, "command": command_line(), "git_commit": git_commit(), "versions": versions()}


def _page(
    ends: Sequence[End], sections: Sequence[tuple[str, str, Sequence[Figure]]], unfinished: int, repeated: int
) -> str:
    points = sorted(_points(ends), key=lambda point: (point.ends[0].config.arm, point.ends[0].budget, point.loss))
    rows = []
    for point in points:
        end, losses = point.ends[0], [end.loss for end in point.ends]
        error = f" ± {np.std(losses, ddof=1) / math.sqrt(len(losses)):.3f}" if len(losses) > 1 else ""
        loss = f"{point.loss:.3f}{error}" if math.isfinite(point.loss) else "diverged"
        lr = f"{end.config.optim.lr:g}"
        rows.append((NAMES[end.config.arm], end.size, end.config.recipe, si(end.budget), lr, str(len(losses)), loss))
    left = f" Left out: {unfinished} that did not come to their end." if unfinished else ""
    left += f" {repeated} that repeat another, seed and all, count once." if repeated else ""
    table = plain_table(
        f"All choices, each at the end of its own schedule: mean over seeds ± standard error.{left}",
        ["Arm", "Layers x width", "Recipe", "Tokens", "Peak rate", "Seeds", "Final loss"],
        rows,
    )
    drawn = figure_sections(sections) or f'<p class="missing">There is no figure, since {NOTHING_DRAWN}.</p>'
    command = f"<section><h2>Reproduce</h2><pre><code>{escape(command_line())}</code></pre></section>"
    body = f"{drawn}\n<section><h2>All runs</h2>{table}</section>\n{command}"
    return plain_page("spherelm report", "Where the runs ended", counted(len(ends), "run"), body)
