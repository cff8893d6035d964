"""Commands run as torchrun runs them: N processes, each a rank, that meet and exit on their own. Also a program.

Importing torch takes seconds, so one process imports it and forks the ranks of every job given to it; each of them
returns from this file's last line and ends as any Python program does, which is what their exit codes are about.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import socket
import subprocess
import sys
import time
import warnings
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Job:
    """A spherelm command for `processes` ranks.

    before: Python that each of them runs first, with its rank as `rank`. prepare: Python that is run before any of them
    starts. kill_after: seconds until all are killed.
    """

    processes: int
    arguments: list[str]
    before: str = ""
    prepare: str = ""
    kill_after: float = 300.0  # ranks that do not end are stuck, even on a busy machine


@dataclass(frozen=True)
class Ended:
    """The result of a rank: its exit code, negative for the signal that killed it, and what it wrote to stderr."""

    code: int
    err: str


def run_ranks(jobs: list[Job], directory: Path) -> list[list[Ended]]:
    """Run one job after the other; what became of each rank of each."""
    directory.mkdir(parents=True, exist_ok=True)
    given = json.dumps([vars(job) for job in jobs])
    done = subprocess.run(
        [sys.executable, __file__, str(directory)],
        input=given,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    codes: list[list[int]] = json.loads(done.stdout.splitlines()[-1])
    return [
        [Ended(code, (directory / f"{job}-{rank}.err").read_text()) for rank, code in enumerate(of_job)]
        for job, of_job in enumerate(codes)
    ]


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def _become_rank(rank: int, job: dict[str, Any], port: int, err: Path) -> None:
    """In a forked process: the environment that torchrun gives, stderr to a file, stdout nowhere."""
    for target, path in ((2, err), (1, Path(os.devnull))):
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, target)
    if job["processes"] > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(job["processes"])}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    warnings.filterwarnings("error", append=True)  # what is not filtered by those who know of it
    sys.argv = ["spherelm", *job["arguments"]]
    exec(job["before"], {"rank": rank})


def _wait(pids: list[int], seconds: float) -> list[int]:
    """The exit codes of forked ranks; those that take longer are killed."""
    codes: dict[int, int] = {}
    end = time.monotonic() + seconds
    while len(codes) < len(pids):
        for pid in pids:
            if pid not in codes and (found := os.waitpid(pid, os.WNOHANG))[0]:
                codes[pid] = os.waitstatus_to_exitcode(found[1])
        if time.monotonic() > end:
            for pid in set(pids) - codes.keys():
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)
    return [codes[pid] for pid in pids]


USED = (
    "spherelm.train.trainer",
    "spherelm.experiments.sweep",
    "spherelm.cli",
    "torch._dynamo",
    "torch.distributed._composable",
    "torch.distributed.checkpoint.hf_storage",
    "torch.distributed.checkpoint.state_dict_loader",
    "torch.distributed.checkpoint.state_dict_saver",
    "torch.distributed.fsdp",
)
"""Modules imported before forking, so that ranks need not import them."""


def _fork_all(directory: Path) -> bool:
    """Run the jobs on stdin; True in a rank, which has then to run its command."""
    for name in USED:
        import_module(name)
    gc.collect()
    gc.freeze()  # so that ranks need not look through all of it
    jobs, codes = json.load(sys.stdin), []
    for number, job in enumerate(jobs):
        exec(job["prepare"], {})
        port, pids = free_port(), []
        for rank in range(job["processes"]):
            pid = os.fork()
            if pid == 0:
                _become_rank(rank, job, port, directory / f"{number}-{rank}.err")
                return True
            pids.append(pid)
        codes.append(_wait(pids, job["kill_after"]))
    print(json.dumps(codes))
    return False


if __name__ == "__main__" and _fork_all(Path(sys.argv[1])):
    from spherelm.cli import main

    main()
