"""Many runs at once: a process for each group of cores, resumable, with one progress bar over all of them."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from spherelm.counting import counted
from spherelm.errors import StorageError, UserError
from spherelm.runs.config import RunConfig, to_dict
from spherelm.runs.metrics import read_metrics
from spherelm.runs.record import claim_directory
from spherelm.third_parties import silence
from spherelm.train.batches import open_data
from spherelm.train.guard import Diverged
from spherelm.train.signals import Interrupted
from spherelm.train.trainer import check_runs, train

# A pool, and no process of `spherelm train --config` for each run: that costs 4.8 seconds of a core more than a run in a
# process that is there (6.1 instead of 1.3 for one update: imports and flags), and a run of the demo takes 45. For `make demo`,
# nine runs in two processes, it is 8 % more.
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
    """The processor threads of each of `workers` processes: a part of the cores, and no more than OMP_NUM_THREADS allows."""
    allowed = os.environ.get("OMP_NUM_THREADS", "")
    share = max(1, cores() // workers)
    return min(share, int(allowed)) if allowed.isdecimal() and int(allowed) else share


def _start_worker(threads: int) -> None:
    """Prepare a worker process: its share of the cores, and an end (saved, as by SIGTERM) when its parent is gone."""
    silence()
    torch.set_num_threads(threads)
    # tqdm's own lock is a semaphore between processes, which a worker that is stopped would be reported to leak.
    tqdm.set_lock(threading.RLock())
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
        wanted = {**to_dict(job.config), "data_identity": open_data(job.config).identity}
        claim_directory(job.out, wanted, resume=True)
        return done
    try:
        return train(job.config, job.out, resume=True, show_progress=False)
    except Diverged as error:
        (job.out / "diverged.txt").write_text(f"{error}\n", encoding="utf-8")
        return math.nan


def _work(job: Job) -> float:
    """Do a job in a worker. A worker that is told to stop ends with it: it must neither begin nor wait for another."""
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


def steps_done(run: Path) -> int:
    """How many updates the log of `run` shows."""
    try:
        with (run / "metrics.jsonl").open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 4096))
            lines = file.read().decode("utf-8", "replace").splitlines()
        return max((int(json.loads(line)["step"]) for line in lines[1:] or lines), default=0)
    except (OSError, ValueError):
        return 0


def run_jobs(jobs: list[Job], workers: int | None = None, description: str = "training") -> list[float]:
    """Do all `jobs`, those first that come first, and return their final validation losses in the same order.

    workers: processes at once, by default `default_workers`. description: of what is shown; nothing is shown if it is empty.
    Finished runs are taken as they are, begun ones go on. Raises what a run raises, before any begins if that is how it is
    made; `ValueError` for two jobs in one directory; Ctrl-C and SIGTERM let every run save itself and raise `Interrupted`.
    """
    if not jobs:
        return []
    twice = [out for out, count in Counter(job.out for job in jobs).items() if count > 1]
    if twice:
        raise UserError(f"two runs would share the directory {twice[0]}: let each value occur once")
    check_runs([job.config for job in jobs])
    workers = workers_for(len(jobs), workers)
    context, share = multiprocessing.get_context("spawn"), (threads_each(workers),)
    with _interrupts_ignored():  # also by the process that multiprocessing starts to clean up
        pool_of_workers = ProcessPoolExecutor(workers, context, initializer=_start_worker, initargs=share)
    with _noted_interrupts() as asked, pool_of_workers as pool:
        try:
            with _interrupts_ignored():
                futures = [pool.submit(_work, job) for job in jobs]
            _watch(jobs, futures, description)
            return [future.result() for future in futures]
        except (BrokenProcessPool, KeyboardInterrupt) as error:
            if isinstance(error, BrokenProcessPool) and not asked:
                raise StorageError(
                    "a training process was killed (out of memory?): use fewer --workers; the same "
                    "command goes on, compare with --resume"
                ) from error
            # A worker that has ended after a signal to the whole group may be noticed here before the signal is.
            _stop(pool)
            raise Interrupted(
                "stopped; every run under way saved itself; the same command goes on, compare with --resume",
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
    """Show how many updates of all are done until every future is; raises what the first that fails raises."""
    total = sum(job.config.train.steps for job in jobs)
    with tqdm(total=total, desc=description, unit="step", smoothing=0.05, disable=not description) as bar:
        while True:
            finished = sum(future.done() for future in futures)
            for future in futures:
                if future.done():
                    future.result()
            steps = [
                job.config.train.steps if f.done() else steps_done(job.out)
                for job, f in zip(jobs, futures, strict=True)
            ]
            bar.set_postfix_str(f"{finished} of {counted(len(jobs), 'run')} done", refresh=False)
            bar.update(sum(steps) - bar.n)
            if finished == len(jobs):
                return
            time.sleep(POLL_SECONDS)
