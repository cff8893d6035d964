"""Runs of one thread, several at once, each finished one a line of a results file; a script's `run` command.

A wanted run is a dictionary, its key. A line is the key with what was measured, and lines whose key is there are not
done again. Where the script is stopped, runs under way save themselves, and the same command goes on with them.
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

from spherelm.data.output import write_json
from spherelm.experiments.jobs import start_worker
from spherelm.train.signals import Interrupted

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
    measure: Measure, keys: list[Key], taken: Any, results: Path, out: Path, until: float, keep: Callable[[Key], bool]
) -> None:
    """Do runs until there are none left, the time is over, or the script ends.

    taken: how many of `keys` all processes have taken; its lock is the results file's too.
    """
    start_worker(1)
    while time.time() < until:
        with taken.get_lock():
            place, taken.value = taken.value, taken.value + 1
        if place >= len(keys):
            return
        key = keys[place]
        start, directory = time.process_time(), out / name_of(key)
        try:
            found = measure(key, directory)
        except Interrupted as error:
            raise SystemExit(str(error)) from None
        line = {**key, **found, "seconds": round(time.process_time() - start, 1)}
        if not keep(key):
            shutil.rmtree(directory, ignore_errors=True)
        with taken.get_lock():
            add(results, line)
        print(directory.name, line["loss"], line["seconds"], flush=True)


def do(
    wanted: Iterable[Key], measure: Measure, results: Path, out: Path, minutes: float, workers: int,
    keep: Callable[[Key], bool] = none,
) -> None:  # fmt: skip
    """Do the wanted runs that have no line yet, with so many processes, and start none after so many minutes.

    keep: whether the directory of a finished run stays.
    """
    until, context = time.time() + 60 * minutes, multiprocessing.get_context("spawn")
    arguments = (measure, left(wanted, results), context.Value("i", 0), results, out, until, keep)
    processes = [context.Process(target=work, args=arguments) for _ in range(workers)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
