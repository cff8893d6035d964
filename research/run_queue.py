"""Runs of one thread, several at once, each finished one a line of a results file; a script's `run` command.

A wanted run is a dictionary, its key. A line is the key with what was measured, and lines whose key is there are not
done again. The process that is stopped leaves the directories of runs under way, which resume.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import shutil
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from spherelm.runs.record import write_json

Key = dict[str, Any]
Measure = Callable[[Key, Path], dict[str, Any]]
"""Does the run of a key in a directory and returns what its line says besides."""


def lines(results: Path, kind: str = "runs") -> list[dict[str, Any]]:
    """The lines of a results file, those under the name `kind`."""
    found: list[dict[str, Any]] = json.loads(results.read_text(encoding="utf-8"))[kind] if results.exists() else []
    return found


def add(results: Path, line: dict[str, Any], kind: str = "runs") -> None:
    """Append a line to a results file."""
    content = json.loads(results.read_text(encoding="utf-8")) if results.exists() else {}
    write_json(results, {**content, kind: [*content.get(kind, []), line]})


def name_of(key: Key) -> str:
    """The name of the directory of a run."""
    words = (f"{value:g}" if isinstance(value, float) else str(value) for value in key.values())
    return "-".join(words).replace(" ", "-")


def left(wanted: Iterable[Key], results: Path) -> list[Key]:
    """The keys that have no line yet."""
    done = lines(results)
    return [key for key in wanted if not any(key.items() <= line.items() for line in done)]


def number(loss: float) -> float | None:
    """A loss as JSON takes it: nothing for one that diverged."""
    return None if math.isnan(loss) else loss


def none(key: Key) -> bool:
    """Keep no directory."""
    return False


def work(
    measure: Measure, jobs: Any, lock: Any, results: Path, out: Path, until: float, keep: Callable[[Key], bool]
) -> None:
    """Do runs until there are none left, or the time is over."""
    torch.set_num_threads(1)
    while time.time() < until:
        with lock:
            key = jobs.pop(0) if len(jobs) else None
        if key is None:
            return
        start, directory = time.process_time(), out / name_of(key)
        line = {**key, **measure(key, directory), "seconds": round(time.process_time() - start, 1)}
        if not keep(key):
            shutil.rmtree(directory, ignore_errors=True)
        with lock:
            add(results, line)
        print(directory.name, line["loss"], line["seconds"], flush=True)


def do(
    wanted: Iterable[Key], measure: Measure, results: Path, out: Path, minutes: float, workers: int,
    keep: Callable[[Key], bool] = none,
) -> None:  # fmt: skip
    """Do the wanted runs that have no line yet, with so many processes, and start none after so many minutes.

    keep: whether the directory of a finished run stays. A process that is stopped saves its run, and the same command
    goes on with it.
    """
    until, context = time.time() + 60 * minutes, multiprocessing.get_context("spawn")
    with context.Manager() as manager:
        jobs, lock = manager.list(left(wanted, results)), manager.Lock()
        arguments = (measure, jobs, lock, results, out, until, keep)
        processes = [context.Process(target=work, args=arguments) for _ in range(workers)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
