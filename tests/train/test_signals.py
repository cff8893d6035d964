"""The command in a process of its own, stopped as a user or a scheduler stops it."""

from __future__ import annotations

import fcntl
import os
import pty
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path
from typing import Any

import pytest
import tiny

from spherelm.recipes import make_run
from spherelm.runs.checkpoint import latest_checkpoint
from spherelm.runs.metrics import read_metrics
from spherelm.train.signals import Interrupted, signals_noted
from spherelm.train.trainer import Trainer

SIZES: dict[str, Any] = {"steps": 10**6, "seq_len": 8, "batch_size": 1}
PATIENCE = 300
"""Seconds until a process that does nothing is given up:
a busy machine may be a hundred times slower than a free one.
"""


def command(out: Path, data: Path) -> list[str]:
    words = [sys.executable, "-m", "spherelm", "train", "--arm", "ngpt", "--out", str(out), "--data", str(data)]
    words += ["--steps", "1000000", "--seq-len", "8", "--batch-size", "1", "--dtype", "float32"]
    return [*words, "--eval-every", "0", "--lr", "0.01"]


def wait_for_lines(path: Path, lines: int, process: subprocess.Popen[Any]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not path.exists() or path.read_bytes().count(b"\n") < lines:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)


def stop_after(trainer: Trainer, step: int) -> None:
    """Run until `step`, and save there."""
    update = trainer._update

    def last(current: int, lr: float) -> tuple[float, float]:
        if current + 1 == step:
            signal.raise_signal(signal.SIGTERM)
        return update(current, lr)

    trainer._update = last  # type: ignore
    with pytest.raises(Interrupted):
        trainer.run(show_progress=False)
    assert trainer.progress.step == step


@pytest.mark.row("Interruption")
def test_a_stopped_command_saves_and_goes_on_bitwise(data: Path, tmp_path: Path) -> None:
    run, number = tmp_path / "run", signal.SIGINT
    process = subprocess.Popen(command(run, data), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for_lines(run / "metrics.jsonl", 4, process)
    process.send_signal(number)
    out, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 128 + number, err
    assert out == ""
    assert "Traceback" not in err
    checkpoint = latest_checkpoint(run)
    assert checkpoint is not None
    step = int(checkpoint.name.removeprefix("step-"))
    resume_command = f"spherelm train --resume {run}"
    assert err.splitlines()[-1] == f"spherelm: {number.name}: saved {run} at step {step}; resume with: {resume_command}"

    config = make_run("ngpt", data=str(data), vocab_size=257, dtype="float32", eval_every=0, lr=0.01, **SIZES)
    stop_after(Trainer(config, run, resume=True), step + 2)
    stop_after(Trainer(config, tmp_path / "uninterrupted"), step + 2)
    ours, theirs = latest_checkpoint(run), latest_checkpoint(tmp_path / "uninterrupted")
    assert ours is not None
    assert theirs is not None
    tiny.assert_bitwise(ours, theirs)


def test_a_lost_connection_saves(data: Path, tmp_path: Path) -> None:
    """The terminal that a run writes to is gone, and the kernel sends SIGHUP."""
    run, (ours, theirs) = tmp_path / "run", pty.openpty()
    process = subprocess.Popen(
        command(run, data),
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )
    os.close(theirs)
    wait_for_lines(run / "metrics.jsonl", 4, process)
    os.close(ours)
    assert process.wait(PATIENCE) == 128 + signal.SIGHUP
    checkpoint = latest_checkpoint(run)
    assert checkpoint is not None
    assert read_metrics(run / "metrics.jsonl")[-1]["step"] == int(checkpoint.name.removeprefix("step-"))


def test_handlers_are_put_back(data: Path, tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    config = make_run("gpt", data=str(data), vocab_size=257, n_layers=1, d_model=8, n_heads=1, **{**SIZES, "steps": 2})
    Trainer(config, tmp_path / "run").run(show_progress=False)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_a_second_interrupt_ends_at_once(data: Path, tmp_path: Path) -> None:
    """For whoever does not want to wait for the step to end."""
    config = make_run("gpt", data=str(data), vocab_size=257, n_layers=1, d_model=8, n_heads=1, **SIZES)
    trainer = Trainer(config, tmp_path / "run")

    def impatient(step: int, lr: float) -> tuple[float, float]:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        raise AssertionError("the second one was swallowed")

    trainer._update = impatient  # type: ignore
    with pytest.raises(KeyboardInterrupt):
        trainer.run(show_progress=False)
    assert latest_checkpoint(tmp_path / "run") is None


def test_ctrl_c_after_another_signal_is_still_a_first_one() -> None:
    """A sweep's parent sends SIGTERM for the Ctrl-C that its workers get as well, and theirs may be noticed last."""
    with signals_noted() as noted:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGTERM):
            signal.raise_signal(number)
        assert noted.numbers == [signal.SIGTERM, signal.SIGINT, signal.SIGTERM]
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_an_ignored_signal_stays_ignored() -> None:
    """As Ctrl-C is in a sweep's workers: the parent alone takes it, and tells them otherwise."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with signals_noted() as noted:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGTERM)
            assert noted.numbers == [signal.SIGTERM]
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
