"""A comparison read back from its directory: the report's numbers, recomputed from the runs.

`summary.json` says which runs belong to which arm, what the speedup is, and how long a step took where that was
measured alone; losses, bits per byte and the time of whole runs are taken from each run's `metrics.jsonl`. Where the
two disagree, the report says so (`Comparison.disagreements`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spherelm.errors import NotFoundError, UserError, read_object
from spherelm.models import ARMS
from spherelm.runs.metrics import read_metrics

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Run:
    """One run's validations, in the order of their steps;
    arrays of one length, float64, empty if it diverged before any.

    `loss` in nats per token, `bits` per byte (NaN where the run does not know), `tokens` and `seconds` of training
    since its start, validation not counted.
    """

    name: str
    steps: Array
    tokens: Array
    seconds: Array
    loss: Array
    bits: Array
    diverged: bool

    @property
    def final_loss(self) -> float:
        """The last validation loss in nats per token; NaN if the run diverged."""
        return math.nan if self.diverged else float(self.loss[-1])


@dataclass(frozen=True)
class Arm:
    """All full runs of one arm, one a seed, and how it was trained.

    `tokens_per_second` as measured apart from the runs; `None` where it was not. `optimizer` as `OptimConfig` calls it;
    `None` in records that do not say.
    """

    name: str
    runs: Sequence[Run]
    lr: float | None
    recipe: str
    parameters: int | None
    tokens_per_second: float | None
    optimizer: str | None = None

    @property
    def whole_runs(self) -> list[Run]:
        """The runs that did not diverge."""
        return [run for run in self.runs if not run.diverged]

    @property
    def final_losses(self) -> list[float]:
        """Last validation loss per seed, nats per token; NaN for a seed that diverged."""
        return [run.final_loss for run in self.runs]

    @property
    def final_loss(self) -> float:
        """Mean over seeds of the last validation loss, nats per token; NaN if a seed diverged."""
        return float(np.mean(self.final_losses))

    @property
    def bits_per_byte(self) -> float:
        """Mean over seeds of the last validation's bits per byte; NaN where unknown or diverged."""
        return float(np.mean([math.nan if run.diverged else run.bits[-1] for run in self.runs]))

    @property
    def tokens(self) -> float:
        """Tokens that a full run trains on; NaN if every seed diverged."""
        return float(np.mean([run.tokens[-1] for run in self.whole_runs])) if self.whole_runs else math.nan

    @property
    def seconds(self) -> float:
        """Mean training time of a full run; NaN if every seed diverged."""
        return float(np.mean([run.seconds[-1] for run in self.whole_runs])) if self.whole_runs else math.nan

    def mean_curve(self) -> tuple[Array, Array, Array] | None:
        """(tokens, seconds, loss), each the mean over seeds that did not diverge,
        at the steps that all of them validated at.

        None if every seed diverged.
        """
        runs = self.whole_runs
        if not runs:
            return None
        steps = runs[0].steps
        for run in runs[1:]:
            steps = np.intersect1d(steps, run.steps)
        if not steps.size:
            raise UserError(f"the {self.name} runs share no validation step: rerun them with one --eval-every")
        rows = [np.searchsorted(run.steps, steps) for run in runs]
        tokens, seconds, loss = (
            np.mean([getattr(run, name)[row] for run, row in zip(runs, rows, strict=True)], axis=0)
            for name in ("tokens", "seconds", "loss")
        )
        return tokens, seconds, loss


@dataclass(frozen=True)
class ScheduleEnd:
    """The end of a full schedule of some length: means over seeds, and each seed's loss (nats per token)."""

    steps: int
    tokens: float
    seconds: float
    losses: Sequence[float]

    @property
    def loss(self) -> float:
        """Mean final loss over seeds."""
        return float(np.mean(self.losses))


@dataclass(frozen=True)
class Comparison:
    """One comparison: both arms, the baseline first, the winner's shorter schedules, shortest first,
    and `summary.json`.
    """

    directory: Path
    arms: Mapping[str, Arm]
    ends: Sequence[ScheduleEnd]
    summary: Mapping[str, Any]
    disagreements: Sequence[str]

    @property
    def speedup(self) -> Mapping[str, Any]:
        """The `speedup` part of `summary.json`."""
        return self.summary["speedup"]

    @property
    def winner(self) -> str:
        """The arm that ended lower; it is its curve on which the other's final loss is looked for."""
        losses = {name: arm.final_loss for name, arm in self.arms.items()}
        best = min(losses, key=lambda name: math.inf if math.isnan(losses[name]) else losses[name])
        return str(self.speedup.get("winner") or best)

    @property
    def loser(self) -> str:
        """The other arm."""
        return next(arm for arm in self.arms if arm != self.winner)

    @property
    def baseline(self) -> str:
        """The arm that is not on the sphere."""
        return next(iter(self.arms))

    @property
    def normalized(self) -> str:
        """The arm that is."""
        return list(self.arms)[1]

    @property
    def seeds(self) -> int:
        """Runs per arm."""
        return len(self.arms[self.baseline].runs)

    @property
    def quick(self) -> bool:
        """Whether the speedup was read off inside one schedule."""
        return bool(self.speedup.get("method") == "in-run" or self.summary.get("config", {}).get("quick"))


def standard_error(values: Sequence[float]) -> float | None:
    """Standard error of the mean; None for fewer than two values."""
    return float(np.std(values, ddof=1) / math.sqrt(len(values))) if len(values) > 1 else None


def read_comparison(directory: Path) -> Comparison:
    """Everything about the comparison in `directory`.

    Raises FileNotFoundError for a missing summary or run, ValueError for one that cannot be understood.
    """
    summary = _read_json(directory / "summary.json")
    _require(summary, directory / "summary.json")
    arms = {name: _read_arm(directory, name, summary["arms"][name]) for name in ARMS}
    ends = _read_ends(directory, summary.get("short_runs") or [])
    return Comparison(directory, arms, ends, summary, _disagreements(arms, summary))


def read_run(directory: Path) -> Run:
    """The validations of one run directory."""
    path = directory / "metrics.jsonl"
    if not path.is_file():
        raise NotFoundError(f"{path} is missing: the run {directory.name} did not start, or its name has changed")
    diverged = (directory / "diverged.txt").exists()
    rows = [line for line in read_metrics(path) if line.get("kind") == "val"]
    if not rows and not diverged:
        raise UserError(f"{path} holds no validation: the run {directory.name} ended before its first one")
    steps, tokens, seconds, loss = (_column(path, rows, name) for name in ("step", "tokens", "seconds", "loss"))
    bits = np.array(
        [math.nan if row.get("bits_per_byte") is None else row["bits_per_byte"] for row in rows], dtype=float
    )
    return Run(directory.name, steps, tokens, seconds, loss, bits, diverged)


def _read_arm(directory: Path, name: str, summary: Mapping[str, Any]) -> Arm:
    runs = [read_run(directory / run) for run in summary["runs"]]
    recipe = str(summary.get("recipe", "unknown"))
    measured = (summary.get(key) for key in ("parameters", "tokens_per_second", "optimizer"))
    return Arm(name, runs, summary.get("lr"), recipe, *measured)


def _read_ends(directory: Path, short_runs: Sequence[Mapping[str, Any]]) -> list[ScheduleEnd]:
    by_steps: dict[int, list[Run]] = {}
    for entry in short_runs:
        by_steps.setdefault(int(entry["steps"]), []).append(read_run(directory / entry["run"]))
    ends = []
    for steps, all_runs in sorted(by_steps.items()):
        runs = [run for run in all_runs if not run.diverged]
        if runs:
            seconds = float(np.mean([run.seconds[-1] for run in runs]))
            ends.append(ScheduleEnd(steps, float(runs[0].tokens[-1]), seconds, [run.final_loss for run in runs]))
    return ends


def _disagreements(arms: Mapping[str, Arm], summary: Mapping[str, Any]) -> list[str]:
    """Where `summary.json` states another final loss than the runs that it names."""
    found = []
    for name, arm in arms.items():
        stated = summary["arms"][name].get("final_loss")
        both_diverged = stated is None or (math.isnan(stated) and math.isnan(arm.final_loss))
        if not both_diverged and not math.isclose(stated, arm.final_loss, rel_tol=1e-5):
            found.append(
                f"summary.json gives {stated:.6g} as the final loss of {name}, its runs give {arm.final_loss:.6g}"
            )
    return found


def _require(summary: Mapping[str, Any], path: Path) -> None:
    """ValueError that names what the report cannot do without."""
    if not isinstance(summary.get("speedup"), dict):
        raise UserError(f"{path} has no `speedup`: it was not written by `spherelm compare`, run that again")
    for arm in ARMS:
        if not (summary.get("arms") or {}).get(arm, {}).get("runs"):
            raise UserError(f"{path} names no runs in `arms.{arm}.runs`: run `spherelm compare` again")


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise NotFoundError(f"{path} is missing: {path.parent} is not the output of a finished `spherelm compare`")
    return read_object(path, "compare again")


def read_samples(directory: Path) -> dict[str, Any] | None:
    """`samples.json` ({"prompt": str, "gpt": [str], "ngpt": [str]}, or the arms compared), or None if there is none."""
    path = directory / "samples.json"
    return _read_json(path) if path.is_file() else None


def _column(path: Path, rows: Sequence[Mapping[str, Any]], name: str) -> Array:
    try:
        return np.array([float(row[name]) for row in rows])
    except (KeyError, TypeError) as error:
        raise UserError(f"{path} has a validation line without a number for `{name}` ({error!r})") from None
