"""A run that is killed at any moment, and goes on, ends where an undisturbed one does, to the bit."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import pytest
import ranks
import tiny
from test_parallel import arguments

from spherelm.runs.checkpoint import latest_checkpoint

pytestmark = pytest.mark.slow
KILLS = 6
"""Beside those at chosen moments."""

AT_CALL = """
import os, signal
from torch.distributed.checkpoint.filesystem import FileSystem
from spherelm.runs import checkpoint
from spherelm.train import trainer

def killed_at(owner, name, call):
    function, calls = getattr(owner, name), iter(range(10**6))

    def killed(*arguments, **more):
        if next(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **more)

    setattr(owner, name, killed)

killed_at({where})
"""
MOMENTS = {
    "the first validation": "trainer, 'validation_losses', 0",
    "a later validation": "trainer, 'validation_losses', 1",
    "between the files of a checkpoint": "FileSystem, 'create_stream', 3",
    "before a checkpoint is renamed": "os, 'rename', 1",
    "before an old checkpoint is dropped": "checkpoint.shutil, 'rmtree', 1",
    "between loss and update": "trainer, 'clip_gradients', 5",
}


@pytest.mark.row("Interruption")
def test_killed_at_any_moment(data: Path, tmp_path: Path) -> None:
    run, whole = tmp_path / "run", tmp_path / "whole"
    flags = ("--save-every", "3", "--dtype", "bfloat16", "--keep", "2", "--resume")

    def job(out: Path, before: str = "", kill_after: float = 300.0) -> ranks.Job:
        return ranks.Job(1, arguments("ngpt", out, data, *flags, steps=300), before, kill_after=kill_after)

    draw = random.Random(1)
    jobs = [job(run, AT_CALL.format(where=where)) for where in MOMENTS.values()]
    jobs += [job(run, kill_after=draw.uniform(0.05, 0.7)) for _ in range(KILLS)]
    draw.shuffle(jobs)
    ended = ranks.run_ranks([*jobs, job(run), job(whole)], tmp_path / "err")
    codes = [rank.code for (rank,) in ended]
    assert codes[-2:] == [0, 0], ended[-2][0].err
    assert codes[:-2].count(-9) >= KILLS, "a fast machine may have been done before the last of them"
    assert set(codes[:-2]) <= {-9, 0}
    ours, theirs = latest_checkpoint(run), latest_checkpoint(whole)
    assert ours is not None
    assert theirs is not None
    tiny.assert_bitwise(ours, theirs)
    assert tiny.metrics(run) == tiny.metrics(whole), "no record is doubled, torn or lost"
    assert [path.name for path in (run / "checkpoints").iterdir() if path.name.startswith(".")] == []


KILL_ONE = """
import os, signal, sys
from spherelm.cli import main
from spherelm.train import trainer

gradients = trainer.gradients_of_batch

def killed(model, loader, step, *rest):
    if os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and step == 6:
        os.kill(os.getpid(), signal.SIGKILL)
    return gradients(model, loader, step, *rest)

trainer.gradients_of_batch = killed
main()
"""


@pytest.mark.row("Many processes")
def test_torchrun_restarts_a_run_that_lost_a_process(data: Path, tmp_path: Path) -> None:
    """With the command as it was first given: a restart goes on from the last checkpoint."""
    (tmp_path / "program.py").write_text(KILL_ONE)
    run, whole = tmp_path / "run", tmp_path / "whole"
    start = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", "1"]
    start += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "--monitor-interval", "0.1"]
    flags = ("--save-every", "4", "--strategy", "shard")
    done = subprocess.run(
        [*start, str(tmp_path / "program.py"), *arguments("ngpt", run, data, *flags, steps=10)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "-9" in done.stderr, "torchrun says that it lost one"
    ended = ranks.run_ranks([ranks.Job(2, arguments("ngpt", whole, data, *flags, steps=10))], tmp_path / "err")
    assert [rank.code for rank in ended[0]] == [0, 0]
    assert tiny.metrics(run) == tiny.metrics(whole)
