"""The cost of several processes and of checkpoints on this machine:
strong scaling, and seconds of training lost per save.

python benchmarks/scaling.py --json docs/results/scaling.json

Scaling: the same updates by one process on 2 threads, by two processes of one thread each under torchrun (whole copies,
and parts), in turn for several rounds; the ratio is of a round's median step times. Saving: `Trainer` steps with and
without a checkpoint now and then, in turn; what a save costs is how much longer the steps took in all, and how long the
step that asked for it was held up. All on the shipped text.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

SHAPE = ("n_layers=6", "d_model=256", "n_heads=4")


def command(out: Path, steps: int, processes: int, *more: str) -> list[str]:
    """`spherelm train` as a user gives it."""
    start = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)] if processes > 1 else []
    run = ["-m", "spherelm", "train", "--arm", "ngpt", "--out", str(out), "--steps", str(steps), "--batch-size", "8"]
    run += ["--eval-every", "0", "--no-compile", "--dtype", "float32", "--lr", "0.004", *more, "--set", *SHAPE]
    return [sys.executable, *start, *run]


def step_seconds(out: Path) -> float:
    """The median time of an update, by the run's own record, without the first three."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    clock = [line["seconds"] for line in lines if line["kind"] == "train"]
    return statistics.median(after - before for before, after in pairwise(clock[3:]))


def scaling(directory: Path, rounds: int, steps: int) -> dict[str, Any]:
    """Step times of each way to spread a run, and their ratios to one process on two threads."""
    ways: dict[str, tuple[int, str, tuple[str, ...]]] = {
        "1 process x 2 threads": (1, "2", ()),
        "1 process x 1 thread": (1, "1", ()),
        "2 processes x 1 thread, replicate": (2, "1", ("--strategy", "replicate")),
        "2 processes x 1 thread, shard": (2, "1", ("--strategy", "shard")),
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds):
        for name, (processes, threads, flags) in ways.items():
            out = directory / f"{number}-{len(name)}-{processes}-{threads}"
            environment = {**os.environ, "OMP_NUM_THREADS": threads}
            subprocess.run(
                command(out, steps, processes, *flags), check=True, capture_output=True, env=environment, text=True
            )
            times[name].append(step_seconds(out))
            print(f"round {number + 1}: {name}: {times[name][-1]:.3f} s a step", flush=True)
    first = times["1 process x 2 threads"]
    ratios = {
        name: statistics.median(own / base for own, base in zip(of, first, strict=True)) for name, of in times.items()
    }
    return {"step_seconds": times, "ratio_to_one_process_on_two_threads": ratios}


def saving(directory: Path, rounds: int, steps: int) -> dict[str, Any]:
    """Seconds that `steps` updates take with and without one checkpoint started in their middle, and what it holds."""
    from spherelm.data.sources import parse_data
    from spherelm.recipes import make_run
    from spherelm.train.trainer import Trainer

    shape = {"n_layers": 6, "d_model": 256, "n_heads": 4, "batch_size": 8, "steps": 10**6, "dtype": "float32"}
    trainer = Trainer(make_run("ngpt", vocab_size=parse_data(None).vocab_size, lr=4e-3, **shape), directory / "saving")
    updates = iter(range(10**6))

    def run(save: bool) -> tuple[float, float]:
        start, held = time.perf_counter(), 0.0
        for i in range(steps):
            trainer._update(next(updates), 4e-3)
            if save and i == steps // 2:
                before = time.perf_counter()
                trainer._save()
                held = time.perf_counter() - before
        trainer.checkpoints.wait()
        return time.perf_counter() - start, held

    run(save=True)
    pairs = [(run(save=False)[0], run(save=True)) for _ in range(rounds)]
    checkpoint = next((directory / "saving" / "checkpoints").iterdir())
    return {
        "parameters": sum(p.numel() for p in trainer.model.parameters()),
        "checkpoint_mb": sum(path.stat().st_size for path in checkpoint.iterdir()) / 1e6,
        "step_seconds": statistics.median(plain for plain, _ in pairs) / steps,
        "seconds_lost": statistics.median(with_save - plain for plain, (with_save, _) in pairs),
        "seconds_held": statistics.median(held for _, (_, held) in pairs),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=15, help="updates of a timed run")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        found: dict[str, Any] = {"saving": saving(Path(name), arguments.rounds, arguments.steps)}
        print(json.dumps(found["saving"], indent=1))
        found["scaling"] = scaling(Path(name), arguments.rounds, arguments.steps)
    print(json.dumps(found["scaling"]["ratio_to_one_process_on_two_threads"], indent=1))
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
