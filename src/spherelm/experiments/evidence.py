"""`spherelm evidence`: what each way of training saves, in tokens and seconds, over sizes,
contexts and budgets, tuned at each.

At every point (a size, a context, a budget) each contender searches its own peak learning rate on validation text, the
best rate is run with all seeds, and those runs are judged on test text, which no choice was made on. The speedup at a
budget is how many fewer tokens a normalized contender needs, by whole schedules of its own, for the baseline's loss at
that budget; in seconds it is that over how much longer a step takes, all contenders' steps timed in turn.
"""

from __future__ import annotations

import itertools
import math
import os
import signal
import statistics
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from spherelm.counting import counted
from spherelm.data.loader import validation_windows
from spherelm.data.output import check_place, write_json
from spherelm.data.shards import open_tokens
from spherelm.errors import UserError
from spherelm.evaluate.perplexity import mean_loss
from spherelm.experiments.cost import median_ratio, time_in_turn
from spherelm.experiments.evidence_plan import CONTENDERS, Grid, GridPoint
from spherelm.experiments.evidence_record import on_record, summary, with_row
from spherelm.experiments.growth import timed_at
from spherelm.experiments.jobs import Job, handled, run_jobs, say_before, threads_each, workers_for
from spherelm.experiments.record import standard_error
from spherelm.experiments.sweep import UNTRAINED, name_of
from spherelm.progress import say
from spherelm.recipes import make_run
from spherelm.runs.loading import load_model
from spherelm.runs.record import alone_in
from spherelm.train.checks import check_runs
from spherelm.train.precision import best_device
from spherelm.train.signals import Interrupted
from spherelm.train.threads import threads

STEP = 2.0
"""Neighbouring learning rates of a search are this far apart."""

PATIENCE = 8
"""After so many rates that diverged, and none that did not, a search gives up."""


class Ladder:
    """A grid being worked through in the directory `out`; what is done there already is taken as it is."""

    def __init__(self, grid: Grid, out: Path, workers: int | None = None) -> None:
        self.grid, self.out, self.workers = grid, out, workers
        workers_for(1, workers)  # a wrong number is refused before anything is written
        train, val = open_tokens(Path(grid.data), "train"), open_tokens(Path(grid.data), "val")
        self.test = open_tokens(Path(grid.test), "val")
        if train.tokenizer_fingerprint != self.test.tokenizer_fingerprint:
            raise UserError(
                f"{grid.test} was made with another tokenizer than {grid.data}: prepare it with the same one"
            )
        if self.test.fingerprint == val.fingerprint:
            raise UserError(
                f"{grid.test} has the validation text of {grid.data}, which chooses the learning rates: give --test "
                "held-out text"
            )
        self.vocab_size = train.vocab_size
        self.identity = {"data": f"{train.fingerprint},{val.fingerprint}", "test": self.test.fingerprint}
        # What cannot be trained is refused before anything is.
        wanted = itertools.product(grid.points(), grid.contenders)
        first = [self.job(name, point, self.first_rate(name, point), 0) for point, name in wanted]
        check_runs([job.config for job in first])
        say_before(first, workers)

    def job(self, contender: str, point: GridPoint, lr: float, seed: int) -> Job:
        """A run; its directory is named after all that was chosen."""
        arm, recipe, fields = CONTENDERS[contender]
        choice = {"arm": arm, "recipe": recipe, **fields, "size": point.size, "context": point.context,
                  "batch": point.batch_size, "steps": point.steps, "lr": lr}  # fmt: skip
        config = make_run(
            arm, point.size, recipe, vocab_size=self.vocab_size, data=self.grid.data, lr=lr, seed=seed,
            compile=point.compiled, eval_every=max(1, point.steps // 8), stop_above=math.log(self.vocab_size) + UNTRAINED,
            **self.of_point(contender, point),
        )  # fmt: skip
        return Job(config, self.out / name_of(choice, seed))

    def of_point(self, contender: str, point: GridPoint) -> dict[str, Any]:
        """The fields of a run that its contender and point set."""
        fields = CONTENDERS[contender].fields
        return {"steps": point.steps, "seq_len": point.context, "batch_size": point.batch_size, **fields}

    def run(self, contender: str, point: GridPoint, rates: Sequence[float], seeds: Sequence[int]) -> list[float]:
        """Final validation losses of every rate and seed, rate by rate."""
        jobs = [self.job(contender, point, lr, seed) for lr in rates for seed in seeds]
        title = f"{contender} {point.size} {point.context} {point.budget:g}"
        return run_jobs(jobs, self.workers, title)

    def tune(self, contender: str, point: GridPoint) -> dict[float, float]:
        """Seed 0's losses by learning rate, from the recipe's outwards until the best lies between two worse.

        A point of more than `Grid.confirm` tokens has the recipe's rate alone.
        """
        found: dict[float, float] = {}
        searched = point.tokens <= self.grid.confirm
        pending = [self.first_rate(contender, point) * STEP**k for k in ((0, -1, 1) if searched else (0,))]
        while pending:
            rates = [round_rate(rate) for rate in pending]
            found |= dict(zip(rates, self.run(contender, point, rates, [0]), strict=True))
            pending = beyond(found) if searched else []
        return found

    def first_rate(self, contender: str, point: GridPoint) -> float:
        """Where the search begins: the recipe's own rate at this point."""
        arm, recipe, _ = CONTENDERS[contender]
        run = make_run(arm, point.size, recipe, vocab_size=self.vocab_size, **self.of_point(contender, point))
        return run.optim.lr

    def hours(self, left: Sequence[tuple[str, GridPoint]]) -> float:
        """About how long the runs of `left` take, by a few uncompiled steps of a contender at each point."""
        workers, total = workers_for(2, self.workers), 0.0
        with threads(threads_each(workers)):
            for point in dict.fromkeys(point for _, point in left):
                names = [name for name, where in left if where == point]
                config = self.job(names[0], point, self.first_rate(names[0], point), 0).config
                plain = replace(config, train=replace(config.train, compile=False))
                seconds = statistics.median(time_in_turn({names[0]: plain}, steps=2, warmup=1)[names[0]])
                runs = self.grid.seeds + (2 if point.tokens <= self.grid.confirm else 0)
                total += seconds * point.steps * runs * len(names)
        return total / workers / 3600

    def measure(self, contender: str, point: GridPoint) -> dict[str, Any]:
        """Tune, run all seeds at the best rate, and judge them on the test text."""
        rates = self.tune(contender, point)
        lr = best_rate(rates)
        seeds = list(range(self.grid.seeds))
        val = self.run(contender, point, [lr], seeds)
        runs = [self.job(contender, point, lr, seed).out for seed in seeds]
        test = [self.test_loss(run, loss, point.context) for run, loss in zip(runs, val, strict=True)]
        return {
            **asdict(point), "contender": contender, "arm": CONTENDERS[contender].arm, "recipe": CONTENDERS[contender].recipe,
            "block_parameters": point.block_parameters, "steps": point.steps, "tokens": point.tokens,
            "rates": {f"{rate:g}": loss for rate, loss in sorted(rates.items())}, "lr": lr, "validation": val, "test": test,
            "test_mean": float(np.mean(test)), "test_error": standard_error(test), "runs": [run.name for run in runs],
        }  # fmt: skip

    def cost_of_steps(self, point: GridPoint) -> dict[str, Any]:
        """The median seconds of a step of every contender, and its ratio to each baseline's, all timed in turn."""
        configs = {name: self.job(name, point, self.first_rate(name, point), 0).config for name in self.grid.contenders}
        with threads(threads_each(workers_for(len(configs), self.workers))):
            times = time_in_turn(configs)
        baselines = [name for name in times if CONTENDERS[name].arm != "ngpt"]
        return {
            "size": point.size, "context": point.context, "batch": point.batch_size, "compiled": point.compiled,
            "seconds": {name: statistics.median(own) for name, own in times.items()},
            "ratios": {base: {name: median_ratio(own, times[base]) for name, own in times.items()} for base in baselines},
        }  # fmt: skip

    def test_loss(self, run: Path, val: float, context: int) -> float:
        """The loss of a finished run on the test windows, nats per token; NaN if it diverged."""
        if math.isnan(val):
            return math.nan
        windows = validation_windows(self.test, context, self.grid.test_windows)
        return mean_loss(load_model(run).to(best_device()), *windows, batch_size=max(1, 4096 // context))


def round_rate(rate: float) -> float:
    """To three digits, so that a directory's name is the rate."""
    return float(f"{rate:.3g}")


def best_rate(found: Mapping[float, float]) -> float:
    """The rate with the lowest loss; diverged runs (NaN) lose."""
    return min(found, key=lambda rate: math.inf if math.isnan(found[rate]) else found[rate])


def beyond(found: Mapping[float, float]) -> list[float]:
    """The next rates of a search: one further where the best stands at an edge of what was tried,
    none where it does not.

    Where everything diverged, a lower one, until `PATIENCE` rates have.
    """
    if not any(map(math.isfinite, found.values())):
        return [min(found) / STEP] if len(found) < PATIENCE else []
    best = best_rate(found)
    edges = {min(found): best / STEP, max(found): best * STEP}
    return [edges[best]] if best in edges else []


def climb(grid: Grid, out: Path, workers: int | None = None, minutes: float | None = None) -> dict[str, Any]:
    """Work through the grid, writing `out/evidence.json` after every contender; returns what it holds.

    What an earlier command measured there on the same text stays in it, beside what this one does. minutes: after which
    runs under way save themselves and the measurements so far are returned; call again to continue. A signal to stop
    raises `Interrupted`.
    """
    if minutes is not None and not (minutes > 0 and math.isfinite(minutes)):
        raise UserError(f"minutes must be a positive number, got {minutes:g}")
    check_place(out)
    ladder = Ladder(grid, out, workers)
    out.mkdir(parents=True, exist_ok=True)
    with alone_in(out), time_limit(minutes) as is_over:
        measured, costs = on_record(out / "evidence.json", grid, ladder.identity)
        record = summary(grid, ladder.identity, measured, costs)
        known = {(row["contender"], row["size"], row["context"], row["tokens"]) for row in measured}
        every = itertools.product(grid.contenders, grid.points())
        left = [(name, point) for name, point in every if (name, point.size, point.context, point.tokens) not in known]
        if left:
            say(f"{counted(len(left), 'measurement')}: about {ladder.hours(left):.1f} hours")
        for point in grid.points():
            for contender in grid.contenders:
                measured = with_row(measured, ladder.measure(contender, point))
                record = summary(grid, ladder.identity, measured, costs)
                write_json(out / "evidence.json", record)
            if grid.compares and not is_timed(costs, point, grid.contenders):
                costs.append(ladder.cost_of_steps(point))
                record = summary(grid, ladder.identity, measured, costs)
                write_json(out / "evidence.json", record)
    if is_over.is_set():
        say(f"time is up (--minutes {minutes:g}); run the same command again to continue")
    return record


def is_timed(costs: Sequence[Mapping[str, Any]], point: GridPoint, contenders: Sequence[str]) -> bool:
    """Whether `costs` has the steps of all `contenders` at the size, context and compilation of `point`."""
    there = timed_at(costs, point.size, point.context, point.batch_size, point.compiled)
    return any(set(contenders) <= set(cost["seconds"]) for cost in there)


@contextmanager
def time_limit(minutes: float | None) -> Iterator[threading.Event]:
    """Leave the block after so many minutes, `None` for never; whether that came to pass.

    This process sends itself SIGTERM then, which runs take as the order to save themselves. `Interrupted` is raised in
    the block; it goes no further, but for a signal that somebody else sent.
    """
    is_over = threading.Event()
    if minutes is None:
        yield is_over
        return

    def end() -> None:
        is_over.set()
        os.kill(os.getpid(), signal.SIGTERM)

    def interrupt(number: int, frame: Any) -> None:
        raise Interrupted("stopped; run the same command again to continue", number)

    timer = threading.Timer(min(60 * minutes, threading.TIMEOUT_MAX), end)
    timer.daemon = True
    try:
        with handled(signal.SIGTERM, interrupt):
            timer.start()
            try:
                yield is_over
            finally:
                timer.cancel()
                timer.join()
    except Interrupted as error:
        if not is_over.is_set() or error.signal_number != signal.SIGTERM:
            raise
