"""Many runs in processes of their own: results in order, nothing done twice, and every way to stop them."""

from __future__ import annotations

import contextlib
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from spherelm.data.prepare import prepare
from spherelm.experiments import jobs as module
from spherelm.experiments.jobs import Followed, Job, default_workers, do_job, final_loss, run_jobs
from spherelm.runs.checkpoint import latest_checkpoint
from spherelm.runs.metrics import read_metrics
from spherelm.train.signals import Interrupted
from spherelm.train.trainer import train

PATIENCE = 300
"""Seconds until a process that does nothing is given up:
a busy machine may be a hundred times slower than a free one.
"""


def steps_done(run: Path) -> int:
    """How many updates the log of `run` shows."""
    log = run / "metrics.jsonl"
    return max((record["step"] for record in read_metrics(log)), default=0) if log.exists() else 0


def job(data: Path, out: Path, arm: str = "gpt", **fields: Any) -> Job:
    return Job(tiny.run_config(arm, data, **fields), out)


def test_results_come_in_order_and_finished_runs_are_taken_as_they_are(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In one worker: a finished run, one that diverges, one that was begun, one that is new."""
    finished, begun = tmp_path / "finished", tmp_path / "begun"
    done = train(tiny.run_config("gpt", data), finished, show_progress=False)
    files = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    train(tiny.run_config("ngpt", data, save_every=3), begun, show_progress=False)
    whole = final_loss(begun, 6)
    shutil.rmtree(begun / "checkpoints" / "step-00000006")
    lines = (begun / "metrics.jsonl").read_text().splitlines(keepends=True)
    (begun / "metrics.jsonl").write_text("".join(lines[:-4]))

    losses = run_jobs(
        [
            job(data, finished),
            job(data, tmp_path / "diverges", lr=1e30),
            job(data, begun, "ngpt", save_every=3),
            job(data, tmp_path / "new", "gpt", seed=1),
        ],
        workers=1,
        description="four runs",
    )
    new = read_metrics(tmp_path / "new" / "metrics.jsonl")[-1]
    assert losses[0] == done
    assert math.isnan(losses[1])
    assert losses[2] == whole, "resumed, it ends as the uninterrupted run did"
    assert losses[3] == new["loss"]
    assert new["step"] == 6
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*")} == files
    assert "lower --lr" in (tmp_path / "diverges" / "diverged.txt").read_text()
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "four runs" in shown.err
    assert "4 of 4 runs done" in shown.err


def test_no_jobs_are_done_at_once() -> None:
    assert run_jobs([]) == []


@pytest.mark.parametrize(("arm", "lr"), [("gpt", 1e30), ("ngpt", 1e6)], ids=["no number", "worse than untrained"])
def test_a_diverged_run_is_nan_and_stays_so(arm: str, lr: float, data: Path, tmp_path: Path) -> None:
    diverging = Job(tiny.run_config(arm, data, lr=lr), tmp_path / "run")
    assert math.isnan(do_job(diverging))
    metrics = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    assert math.isnan(do_job(diverging))
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == metrics


@pytest.mark.parametrize("fields", [{}, {"lr": 1e30}], ids=["finished", "diverged"])
def test_a_finished_run_of_another_config_is_not_taken(fields: dict[str, Any], data: Path, tmp_path: Path) -> None:
    do_job(job(data, tmp_path / "run", **fields))
    with pytest.raises(ValueError, match=r"made with another config: train\.batch_size is 4 there and 2 now"):
        do_job(job(data, tmp_path / "run", batch_size=2, **fields))


def test_a_finished_run_is_taken_where_its_text_was_moved_and_not_where_it_was_exchanged(tmp_path: Path) -> None:
    def one(data: Path) -> Job:
        return job(data, tmp_path / "run", steps=1)

    data = tiny.make_data(tmp_path)
    loss = do_job(one(data))
    moved = data.rename(tmp_path / "moved")
    assert do_job(one(moved)) == loss
    (tmp_path / "train.txt").write_text(tiny.text(5))
    prepare([tmp_path / "train.txt"], data, "bytes", val=[tmp_path / "val.txt"])
    with pytest.raises(ValueError, match=r"made with another config: data_identity\.train is"):
        do_job(one(data))


def test_two_runs_never_share_a_directory(data: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"two runs would share the directory .*run: give each value once"):
        run_jobs([job(data, tmp_path / "run"), job(data, tmp_path / "other"), job(data, tmp_path / "run", seed=1)])
    assert not list(tmp_path.iterdir())


def test_the_final_loss_is_the_validation_at_the_last_step(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert final_loss(run, 6) is None
    loss = train(tiny.run_config("gpt", data), run, show_progress=False)
    assert final_loss(run, 6) == loss
    assert final_loss(run, 8) is None, "a longer run has not finished"
    assert final_loss(run, 5) is None, "there was no validation at step 5"


def test_a_run_is_followed_by_its_log(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every validation is said once: not those of before, nor those made again, and no line that is half written."""
    done = job(data, tmp_path / "run")
    train(done.config, done.out, show_progress=False)
    log = done.out / "metrics.jsonl"
    lines = log.read_bytes().splitlines(keepends=True)
    kinds = [(record["kind"], record["step"]) for record in read_metrics(log)]
    second = kinds.index(("val", 2)) + 1
    log.write_bytes(b"".join(lines[:second]))
    followed = Followed(done)
    followed.look()
    assert (followed.steps, capsys.readouterr().err) == (2, "")
    log.write_bytes(b"".join(lines[: second - 1]))  # as a run begins that goes on from step 1
    followed.look()
    for more in (lines[second - 1], lines[second], lines[second + 1], lines[second + 2][:-5]):
        with log.open("ab") as file:
            file.write(more)
        followed.look()
    said = capsys.readouterr().err
    assert (followed.steps, said.count("validation loss"), "step 4/6" in said) == (4, 0, False), said
    replacement = log.with_suffix(".new")
    replacement.write_bytes(b"".join(b" " * 7 + line for line in lines))
    replacement.replace(log)  # as a resumed run does, and by now it is longer than it was, with lines elsewhere
    followed.look()
    assert followed.steps == 6
    losses = [record["loss"] for record in read_metrics(log) if record["kind"] == "val" and record["step"] > 2]
    assert re.findall(r"validation loss (\S+)", capsys.readouterr().err) == [f"{loss:.4f}" for loss in losses]


def test_a_process_a_core_and_one_in_all_beside_an_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "cores", lambda: 4)
    for accelerator, workers in ((False, [1, 3, 4]), (True, [1, 1, 1])):
        monkeypatch.setattr(torch.accelerator, "is_available", lambda answer=accelerator: answer)
        assert [default_workers(jobs) for jobs in (1, 3, 9)] == workers


@pytest.mark.parametrize(
    ("allowed", "threads"),
    [("1", [1, 1]), ("3", [3, 2]), ("16", [8, 2]), ("", [8, 2]), ("0", [8, 2]), ("many", [8, 2])],
)
def test_processes_take_no_more_threads_than_the_user_allows(
    allowed: str, threads: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two spinning threads a process beside other work cost ten times the processor time."""
    monkeypatch.setattr(module, "cores", lambda: 8)
    monkeypatch.setenv("OMP_NUM_THREADS", allowed)
    assert [module.threads_each(workers) for workers in (1, 4)] == threads


def test_processes_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "cores", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert [module.threads_each(workers) for workers in (1, 2, 3, 8, 20)] == [8, 4, 2, 1, 1]


def test_what_a_run_raises_is_raised_and_the_others_stop(data: Path, tmp_path: Path) -> None:
    """The first run cannot start; the second would take days and is not waited for."""
    missing = Job(tiny.run_config("gpt", tmp_path / "no data"), tmp_path / "first")
    with pytest.raises(FileNotFoundError, match="no data directory"):
        run_jobs([missing, job(data, tmp_path / "days", steps=10**6)], workers=1)


class Sweep:
    """`spherelm sweep` over two arms with two seeds each, a million steps, in a process group of its own."""

    def __init__(self, data: Path, out: Path, workers: int) -> None:
        flags = ["--out", out, "--data", data, "--steps", 10**6, "--seeds", 2, "--workers", workers]
        flags += ["--vary", "n_layers=1", "d_model=16", "n_heads=2", "seq_len=8", "batch_size=1", "eval_every=0"]
        command = [sys.executable, "-m", "spherelm", "sweep", "--lr", "0.01", *map(str, flags)]
        self.out = out
        self.process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def wait_for_runs(self, count: int) -> None:
        """Wait until so many runs have made some steps."""
        deadline = time.monotonic() + PATIENCE
        while sum(steps_done(run) > 3 for run in self.out.glob("*seed=*")) < count:
            assert self.process.poll() is None, self.process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.1)

    def wait_until_all_are_gone(self) -> None:
        deadline = time.monotonic() + PATIENCE
        while lives(self.process.pid):
            assert time.monotonic() < deadline, "some process of the group lives on"
            time.sleep(0.1)

    def kill(self) -> None:
        """Whatever happened, leave nothing behind."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.communicate()


def lives(group: int) -> bool:
    """Whether a process group has members that run; where nobody collects orphans, dead ones stay listed."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    states = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it ended just now
            fields = stat.read_text().rpartition(")")[2].split()
            states.append((int(fields[2]), fields[0]))
    return not states or any(its_group == group and state not in "ZX" for its_group, state in states)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stop", "code", "workers"),
    [
        ("Ctrl-C", 130, 2),
        ("lost terminal", 129, 1),
        ("SIGKILL to the parent", -9, 1),
    ],
)
def test_a_stopped_sweep_saves_its_runs_and_starts_no_others(
    stop: str, code: int, workers: int, data: Path, tmp_path: Path
) -> None:
    sweep = Sweep(data, tmp_path / "sweep", workers)
    try:
        sweep.wait_for_runs(workers)
        if code > 0:  # a terminal sends it to the whole group
            os.killpg(sweep.process.pid, code - 128)
        else:
            sweep.process.send_signal(signal.SIGKILL)
        out, err = sweep.process.communicate(timeout=PATIENCE)
        sweep.wait_until_all_are_gone()
    finally:
        sweep.kill()
    assert sweep.process.returncode == code, err
    assert out == ""
    assert "Traceback" not in err
    runs = sorted((tmp_path / "sweep").glob("*seed=*"))
    assert len(runs) == workers, "no other run was started"
    for run in runs:
        saved = latest_checkpoint(run)
        assert saved is not None, run
        assert saved.name == f"step-{steps_done(run):08d}", "saved where it stood"
    if code != -9:
        line = err.splitlines()[-1]
        assert line.startswith(
            "spherelm: stopped; every run under way was saved; run the same command again to continue"
        )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_each_of_three_signals_stops_all(number: signal.Signals) -> None:
    with module._noted_interrupts() as asked, pytest.raises(KeyboardInterrupt):
        signal.raise_signal(number)
    assert asked == [number]


def test_ctrl_c_is_raised_as_interrupted_where_it_was_taken(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For whoever calls this from Python: when the exception arrives,
    the runs are saved and the signals are put back.
    """
    run = tmp_path / "run"
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)

    def watch(*_: Any) -> None:
        deadline = time.monotonic() + PATIENCE
        while steps_done(run) < 3:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "_watch", watch)
    with pytest.raises(Interrupted, match="every run under way was saved") as error:
        run_jobs([job(data, run, steps=10**6), job(data, tmp_path / "next", steps=10**6)], workers=1)
    assert error.value.signal_number == signal.SIGINT
    assert latest_checkpoint(run) is not None
    assert not (tmp_path / "next").exists()
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
