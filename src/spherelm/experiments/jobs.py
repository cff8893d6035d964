"""Many runs at once: a process for each group of cores, resumable, with what each of them says and a bar over all."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch

from spherelm.counting import counted
from spherelm.errors import StorageError, UserError
from spherelm.progress import Bar, has_bars, own_screen_lock, say
from spherelm.runs.config import RunConfig
from spherelm.runs.metrics import in_words, is_record, read_metrics
from spherelm.runs.record import claim_directory, described
from spherelm.third_parties import silence
from spherelm.train.batches import open_data
from spherelm.train.checks import check_runs
from spherelm.train.guard import Diverged
from spherelm.train.opening import warnings
from spherelm.train.precision import best_device
from spherelm.train.signals import Interrupted
from spherelm.train.trainer import train

# A pool, and no process of `spherelm train --config` for each run: that costs 4.8 seconds of a core more than a run in
# a process that is there (6.1 instead of 1.3 for one update: imports and flags), and a run of the demo takes 45. For
# `make demo`, nine runs in two processes, it is 8 % more.
POLL_SECONDS = 0.5


@dataclass(frozen=True)
class Job:
    """A run to be done, and the directory it is done in."""

    config: RunConfig
    out: Path


def cores() -> int:
    """How many processor cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def default_workers(jobs: int) -> int:
    """One process a core, where small models run fastest; one process in all where there is an accelerator."""
    return 1 if torch.accelerator.is_available() else max(1, min(jobs, cores()))


def workers_for(jobs: int, asked: int | None) -> int:
    """The number of processes asked for, or `default_workers` where that is `None`; `ValueError` for none at all."""
    if asked is not None and asked < 1:
        raise UserError(f"--workers must be at least 1, got {asked}")
    return asked or default_workers(jobs)


def threads_each(workers: int) -> int:
    """The processor threads of each of `workers` processes:
    a part of the cores, and no more than OMP_NUM_THREADS allows.
    """
    allowed = os.environ.get("OMP_NUM_THREADS", "")
    share = max(1, cores() // workers)
    return min(share, int(allowed)) if allowed.isdecimal() and int(allowed) else share


def start_worker(threads: int) -> None:
    """Prepare a worker process: its share of the cores, and an end (saved, as by SIGTERM) when its parent is gone."""
    silence()
    torch.set_num_threads(threads)
    own_screen_lock()
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow_parent() -> None:
        wait([parent.sentinel])
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=follow_parent, daemon=True).start()


def do_job(job: Job) -> float:
    """Do the run, or the rest of it, and return its final validation loss in nats; NaN if it diverged.

    Raises `ValueError` naming the field if the directory holds a run of another configuration.
    """
    done = final_loss(job.out, job.config.train.steps)
    if done is not None:
        claim_directory(job.out, described(job.config, open_data(job.config).identity), resume=True)
        return done
    try:
        return train(job.config, job.out, resume=True, show_progress=False)
    except Diverged as error:
        (job.out / "diverged.txt").write_text(f"{error}\n", encoding="utf-8")
        return math.nan


def _work(job: Job) -> float:
    """Do a job in a worker. A worker that gets a signal to stop ends with it:
    it must neither begin nor wait for another.
    """
    try:
        return do_job(job)
    except Interrupted as error:
        os._exit(128 + error.signal_number)
    except KeyboardInterrupt:
        os._exit(128 + signal.SIGINT)


def final_loss(run: Path, steps: int) -> float | None:
    """The validation loss of `run` at its last step; NaN if it diverged, `None` if it is not finished."""
    if (run / "diverged.txt").exists():
        return math.nan
    if not (run / "metrics.jsonl").exists():
        return None
    records = [r for r in read_metrics(run / "metrics.jsonl") if r["kind"] == "val" and r["step"] == steps]
    return records[-1]["loss"] if records else None


class Followed:
    """A run that another process does, seen by its `metrics.jsonl`. steps: how many updates that showed so far."""

    def __init__(self, job: Job, show: bool = True) -> None:
        self.job, self._show, self._read, self._file = job, show, 0, 0
        self._bar: Bar | None = None
        self.steps, self._kinds = 0, set[str]()
        for record in self._new_records():
            self._is_new(record)

    def look(self) -> None:
        """Say what is new as the run itself would, but for the bar."""
        for record in self._new_records():
            train = self.job.config.train
            if self._bar is None:  # only now, so that its time is that of the run
                every = train.log_every or (0 if has_bars() else None)
                self._bar = Bar(self.job.out.name, train.steps, self.steps, show=self._show, every=every)
            before = self.steps
            if not self._is_new(record):
                continue  # a resumed run repeats the updates after its checkpoint
            if record["kind"] == "train":
                self._bar.update(self.steps - before, in_words(record))
            else:
                self._bar.line(in_words(record))

    def _is_new(self, record: dict[str, Any]) -> bool:
        """Note a record; whether none of its kind and step, or of a later step, was there before."""
        if record["step"] > self.steps:
            self.steps, self._kinds = record["step"], set()
        new = record["step"] == self.steps and record["kind"] not in self._kinds
        self._kinds |= {record["kind"]} if new else set()
        return new

    def _new_records(self) -> list[dict[str, Any]]:
        """The records whose lines came to the file, whole, since it was last read."""
        try:
            with (self.job.out / "metrics.jsonl").open("rb") as file:
                # A resumed run begins with a new file, which may be the longer one by now.
                about = os.fstat(file.fileno())
                if about.st_ino != self._file or about.st_size < self._read:
                    self._file, self._read = about.st_ino, 0
                file.seek(self._read)
                whole = file.read().rpartition(b"\n")[0]
        except OSError:
            return []
        self._read += len(whole) + bool(whole)
        records = []
        for line in whole.splitlines():
            with suppress(ValueError):  # the run itself says what is wrong with a line
                records.append(json.loads(line))
        return [record for record in records if is_record(record)]


def say_before(jobs: Sequence[Job], workers: int | None) -> None:
    """Warn of what may be wrong with the runs of `jobs`, so many of them at once."""
    for line in warnings((job.config for job in jobs), best_device(), workers_for(len(jobs), workers)):
        say(line)


def run_jobs(jobs: list[Job], workers: int | None = None, description: str = "training") -> list[float]:
    """Do all `jobs`, those first that come first, and return their final validation losses in the same order.

    workers: processes at once, by default `default_workers`. description: of what is shown; nothing is shown if it is
    empty. Finished runs are taken as they are, unfinished ones resume. Raises a run's error, before any starts if that
    is how it is made; `ValueError` for two jobs in one directory; Ctrl-C and SIGTERM let every run save itself and
    raise `Interrupted`.
    """
    if not jobs:
        return []
    twice = [out for out, count in Counter(job.out for job in jobs).items() if count > 1]
    if twice:
        raise UserError(f"two runs would share the directory {twice[0]}: give each value once")
    check_runs([job.config for job in jobs])
    workers = workers_for(len(jobs), workers)
    context, share = multiprocessing.get_context("spawn"), (threads_each(workers),)
    total = counted(sum(job.config.train.steps for job in jobs), "update")
    way = f"{workers} at once on {counted(*share, 'thread')} each"
    if description:
        say(f"{description}: {counted(len(jobs), 'run')} of {total} in all, {way}, in {jobs[0].out.parent}")
    with _interrupts_ignored():  # also by the process that multiprocessing starts to clean up
        pool_of_workers = ProcessPoolExecutor(workers, context, initializer=start_worker, initargs=share)
    with _noted_interrupts() as asked, pool_of_workers as pool:
        try:
            with _interrupts_ignored():
                futures = [pool.submit(_work, job) for job in jobs]
            _watch(jobs, futures, description)
            return [future.result() for future in futures]
        except (BrokenProcessPool, KeyboardInterrupt) as error:
            if isinstance(error, BrokenProcessPool) and not asked:
                raise StorageError(
                    "a training process was killed (out of memory?): use fewer --workers and run the same "
                    "command again (compare: add --resume)"
                ) from error
            # A worker that has ended after a signal to the whole group may be noticed here before the signal is.
            _stop(pool)
            raise Interrupted(
                "stopped; every run under way was saved; run the same command again to continue (compare: add --resume)",
                asked[0] if asked else signal.SIGINT,
            ) from error
        except BaseException:
            _stop(pool)
            raise


def _stop(pool: ProcessPoolExecutor) -> None:
    """Have the runs under way save themselves, start nothing new, and wait for that."""
    for process in multiprocessing.active_children():
        process.terminate()
    pool.shutdown(wait=True, cancel_futures=True)


@contextmanager
def _noted_interrupts() -> Iterator[list[int]]:
    """Have SIGTERM and SIGHUP raise `KeyboardInterrupt` as Ctrl-C does, and collect all three in the list given."""
    asked: list[int] = []

    def interrupt(number: int, frame: Any) -> None:
        asked.append(number)
        raise KeyboardInterrupt

    def unless_ignored(number: signal.Signals) -> Any:  # SIGINT is in the background, SIGHUP under nohup
        return signal.SIG_IGN if signal.getsignal(number) is signal.SIG_IGN else interrupt

    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    with ExitStack() as handlers:
        for number in numbers:
            handlers.enter_context(handled(number, unless_ignored(number)))
        yield asked


@contextmanager
def _interrupts_ignored() -> Iterator[None]:
    """Have processes that start now ignore Ctrl-C and a lost terminal, which reach them too: the parent stops them."""
    with handled(signal.SIGINT, signal.SIG_IGN), handled(signal.SIGHUP, signal.SIG_IGN):
        yield


@contextmanager
def handled(number: signal.Signals, handler: Any) -> Iterator[None]:
    """Handle a signal so; does nothing outside of the main thread, where Python allows no handlers."""
    in_main_thread = threading.current_thread() is threading.main_thread()
    before = signal.signal(number, handler) if in_main_thread else None
    try:
        yield
    finally:
        if in_main_thread:
            signal.signal(number, before)


def _watch(jobs: list[Job], futures: list[Future[float]], description: str) -> None:
    """Show what the runs say, and how many updates of all are done; raises what the first future that fails raises."""
    total, followed = sum(job.config.train.steps for job in jobs), [Followed(job, bool(description)) for job in jobs]

    def steps_done(ended: Sequence[bool]) -> int:
        """Of all runs; one is at its end when its process says so, which it does too where it diverged."""
        last = [job.config.train.steps for job in jobs]
        return sum(n if end else min(one.steps, n - 1) for n, end, one in zip(last, ended, followed, strict=True))

    with Bar(description, total, steps_done([False] * len(jobs)), show=bool(description)) as bar:
        while True:
            ended = [future.done() for future in futures]  # asked once, so that all that is said agrees
            finished = sum(ended)
            for future in futures:
                if future.done():
                    future.result()
            for one in followed:
                one.look()
            bar.update(steps_done(ended) - bar.done, f"{finished} of {counted(len(jobs), 'run')} done")
            if finished == len(jobs):
                return
            time.sleep(POLL_SECONDS)
