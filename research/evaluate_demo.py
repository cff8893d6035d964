"""Evaluates the runs of a comparison: tasks, and perplexity over length.
Made docs/results/eval-demo.json and length.json.

    python research/evaluate_demo.py lengths runs/demo ../shared/data/books/test-000.jsonl.xz docs/results/length.json
    python research/evaluate_demo.py tasks runs/demo ../shared/data/evals docs/results/eval-demo.json

The file is rewritten after each run, and runs already in it are not measured again. A number behind the words ends it
after so many runs.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from spherelm.data.output import write_json
from spherelm.evaluate.harness import PAPER_TASKS, TaskSettings, evaluate_tasks
from spherelm.evaluate.lengths import LengthPlan
from spherelm.evaluate.positions import Positions
from spherelm.interop.huggingface import to_hf
from spherelm.models import build
from spherelm.runs.config import read_config
from spherelm.runs.record import versions
from spherelm.train.evaluation import perplexity_of_run, tasks_of_run, transformers_tokenizer

LENGTHS = (256, 512, 1024, 2048)
STRETCH = LENGTHS[-1] / LENGTHS[0]
NTK_BASE = round(10000 * STRETCH ** (64 / 62))
"""The base at which the slowest pair of 64 channels turns `STRETCH` times slower and the fastest as before."""

POSITIONS = {
    "as trained": Positions(),
    f"base {NTK_BASE}": Positions(rope_base=NTK_BASE),
    f"linear:{STRETCH:g}": Positions(scaling="linear", factor=STRETCH),
    f"yarn:{STRETCH:g}": Positions(scaling="yarn", factor=STRETCH),
}
RUNS = [f"{arm}-{seed}" for seed in range(3) for arm in ("gpt", "ngpt")]
Jobs = Iterator[tuple[str, Callable[[], dict[str, Any]]]]


def lengths(runs: Path, books: Path) -> Jobs:
    """Sliding windows for the first seed as it was trained; disjoint ones for every run and way to place positions."""
    for name in RUNS[:2]:
        plan = LengthPlan(LENGTHS, stride=LENGTHS[0], document_tokens=LENGTHS[-1])
        yield f"{name}, as trained, sliding", lambda name=name, plan=plan: perplexity_of_run(runs / name, [books], plan)
    for label, positions in POSITIONS.items():
        for name in RUNS:
            yield (
                f"{name}, {label}, disjoint",
                lambda name=name, positions=positions: perplexity_of_run(
                    runs / name, [books], LengthPlan(LENGTHS, document_tokens=2 * LENGTHS[-1]), positions
                ),
            )


def untrained(run: Path, settings: TaskSettings) -> dict[str, Any]:
    """The scores of a model of the shape of `run` as it is before its first update."""
    torch.manual_seed(0)
    model = build(read_config(run / "config.json").model).eval()
    return evaluate_tasks(to_hf(model), transformers_tokenizer(run), PAPER_TASKS, settings)


def tasks(runs: Path, data: Path) -> Jobs:
    """All five tasks, whole, for an untrained model and for every run."""
    settings = TaskSettings(data)
    yield "untrained ngpt", lambda: untrained(runs / "ngpt-0", settings)
    for name in RUNS:
        yield name, lambda name=name: tasks_of_run(runs / name, PAPER_TASKS, settings)


def main() -> None:
    """Read the arguments and write the result."""
    kind, runs, data, out = sys.argv[1], *map(Path, sys.argv[2:5])
    found = json.loads(out.read_text())["results"] if out.exists() else {}
    wanted = [(name, job) for name, job in {"lengths": lengths, "tasks": tasks}[kind](runs, data) if name not in found]
    for name, job in wanted[: int(sys.argv[5]) if len(sys.argv) > 5 else None]:
        found[name] = job()
        command = " ".join(["python research/evaluate_demo.py", *sys.argv[1:5]])
        write_json(out, {"command": command, "versions": versions(), "results": found})
        print(name, flush=True)


if __name__ == "__main__":
    main()
