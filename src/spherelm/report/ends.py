"""Where finished runs ended: what `spherelm report` reads from run directories, and which runs are compared with which.

Every run is one point, at the end of its own schedule. Seeds of one choice are averaged; of several choices with the
same budget, or the same budget and learning rate, the best is drawn. Choices are compared on the seeds that all of them
have: a search runs most rates with one seed and the best with several.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from spherelm.counting import counted
from spherelm.errors import NotFoundError, UserError
from spherelm.experiments.record import read_run
from spherelm.report.wording import listed
from spherelm.runs.config import RunConfig, read_config, read_record
from spherelm.runs.metrics import DamagedMetrics, read_evaluations


@dataclass(frozen=True)
class Lengths:
    """One measurement of perplexity over the length of the window, by `spherelm eval --perplexity --json`.

    `positions`: how they were placed. `text`: which was read, and how it was cut. `perplexities`: by length.
    """

    positions: str
    text: str
    trained: int
    perplexities: Mapping[int, float]


@dataclass(frozen=True)
class End:
    """Where one run ended: `loss` in nats per token, NaN if it diverged;
    `scores` by task, `{"arc_easy": (value, chance)}`.
    """

    name: str
    config: RunConfig
    loss: float
    scores: Mapping[str, tuple[float, float | None]]
    lengths: Sequence[Lengths]

    @property
    def arm(self) -> str:
        """gpt or ngpt."""
        return self.config.arm

    @property
    def seed(self) -> int:
        """The seed it was run with."""
        return self.config.train.seed

    @property
    def budget(self) -> int:
        """Tokens of its whole schedule."""
        train = self.config.train
        return train.steps * train.batch_size * train.seq_len

    @property
    def size(self) -> str:
        """Its shape and context, in words."""
        return f"{self.config.model.n_layers} x {self.config.model.d_model}, context {self.config.train.seq_len}"

    @property
    def method(self) -> str:
        """Its recipe, and its optimizer where the recipe's name does not say it: only rates of one method compare."""
        recipe, optimizer = self.config.recipe, self.config.optim.optimizer.kind
        return recipe if optimizer == recipe else f"{recipe}, {optimizer}"

    @property
    def choice(self) -> str:
        """All that was chosen for it but the seed, to tell choices apart."""
        plain = dataclasses.asdict(self.config)
        plain["train"] |= {
            "seed": 0,
            "log_to": "",
            "log_every": None,
            "save_every": 0,
            "save_minutes": 0,
            "keep": 0,
            "compile": False,
        }
        return json.dumps(plain, sort_keys=True, default=str)


@dataclass(frozen=True)
class SeedRuns:
    """The seeds of one choice."""

    ends: Sequence[End]

    @property
    def first(self) -> End:
        """One of them, for what all have in common."""
        return self.ends[0]

    @property
    def losses(self) -> list[float]:
        """By seed."""
        return [end.loss for end in self.ends]

    @property
    def loss(self) -> float:
        """Mean final loss; infinite if a seed diverged, so that it is never the best."""
        mean = float(np.mean(self.losses))
        return math.inf if math.isnan(mean) else mean

    def only(self, seeds: Collection[int]) -> SeedRuns:
        """The same choice with no other seeds than these."""
        return SeedRuns([end for end in self.ends if end.seed in seeds])


Best = Sequence[tuple[float, SeedRuns]]
"""(x, the best point with this x), ascending."""


def find_runs(directory: Path) -> Iterator[Path]:
    """The directory itself if it is a run, else the runs in it; raises `NotFoundError` if there are none."""
    found = [path for path in (directory, *sorted(directory.glob("*"))) if (path / "metrics.jsonl").is_file()]
    if not found:
        raise NotFoundError(f"{directory} holds no run: pass directories of spherelm compare, sweep or train")
    yield from found


def check_same_text(runs: Sequence[Path]) -> None:
    """Raise `UserError` if two runs were validated on different text:
    their losses have nothing to do with each other.
    """
    known: tuple[Path, Any] | None = None
    for run in runs:
        identity = read_record(run / "config.json").get("data_identity") or {}
        if not isinstance(identity, dict):
            raise UserError(f"{run / 'config.json'} is damaged (data_identity is {identity!r}): leave {run} out")
        text = (identity.get("val"), identity.get("tokenizer"))
        known = known or (run, text)
        if text != known[1]:
            raise UserError(
                f"{run} and {known[0]} were validated on different text or tokens, and their losses cannot be compared: "
                "report on them one after the other"
            )


def read_end(directory: Path) -> End | None:
    """Where the run ended, `None` if it did not come to its end."""
    config = read_config(directory / "config.json")
    try:
        run = read_run(directory)
    except DamagedMetrics:
        raise
    except ValueError:  # stopped before its first validation
        return None
    if not run.diverged and run.steps[-1] < config.train.steps:
        return None
    evaluations = list(read_evaluations(directory))
    return End(directory.name, config, run.final_loss, read_scores(evaluations), read_lengths(evaluations))


def read_scores(evaluations: Iterable[Mapping[str, Any]]) -> dict[str, tuple[float, float | None]]:
    """Accuracies, or what a task has first, and what guessing would score."""
    scores: dict[str, tuple[float, float | None]] = {}
    for record in evaluations:
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


def read_lengths(evaluations: Iterable[Mapping[str, Any]]) -> list[Lengths]:
    """The perplexities over length that were measured."""
    found = []
    for record in evaluations:
        part = record.get("perplexity")
        if isinstance(part, dict):
            windows = "disjoint windows" if part["stride"] is None else f"windows sliding by {part['stride']}"
            files = listed([Path(file).name for file in part["files"]])
            text = (
                f"{counted(part['tokens'], 'token')} of {counted(part['documents'], 'document')} of {files}, {windows}"
            )
            by_length = {int(row["length"]): float(row["perplexity"]) for row in part["lengths"]}
            found.append(Lengths(part["positions"], text, int(part["trained_length"]), by_length))
    return found


def points_of(ends: Sequence[End]) -> list[SeedRuns]:
    """Seeds of one choice together."""
    by_choice: dict[str, list[End]] = {}
    for end in ends:
        by_choice.setdefault(end.choice, []).append(end)
    return [SeedRuns(seeds) for seeds in by_choice.values()]


def points_by(ends: Sequence[End], read: Callable[[End], Any]) -> dict[tuple[str, Any], list[SeedRuns]]:
    """Points by (arm, read(end)), in a fixed order."""
    groups: dict[tuple[str, Any], list[SeedRuns]] = {}
    for point in points_of(ends):
        groups.setdefault((point.first.arm, read(point.first)), []).append(point)
    return dict(sorted(groups.items(), key=lambda pair: (str(pair[0][1]), pair[0][0])))


def compared(points: Sequence[SeedRuns]) -> list[SeedRuns]:
    """`points` on the seeds that all of them have, where there are such."""
    shared = set[int].intersection(*({end.seed for end in point.ends} for point in points))
    return [point.only(shared) for point in points] if shared else list(points)


def best_at(points: Sequence[SeedRuns], read: Callable[[End], float]) -> Best:
    """The best point at each x; only diverged choices at an x leave one of them there."""
    at: dict[float, list[SeedRuns]] = {}
    for point in points:
        at.setdefault(float(read(point.first)), []).append(point)
    return sorted(
        (x, min(zip(compared(there), there, strict=True), key=lambda pair: pair[0].loss)[1]) for x, there in at.items()
    )


def best_at_rates(points: Sequence[SeedRuns]) -> Best:
    """The best point at each peak learning rate, all on the same seeds; diverged ones too."""
    best = best_at(points, lambda end: end.config.optim.lr)
    return list(zip([x for x, _ in best], compared([point for _, point in best]), strict=True))


def finite(best: Best) -> Best:
    """Those that did not diverge, which can be drawn."""
    return [(x, point) for x, point in best if math.isfinite(point.loss)]
