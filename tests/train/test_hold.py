"""One process at a time in a run directory: the second is refused in one line,
and nothing is held by what has ended.
"""

from __future__ import annotations

import fcntl
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import tiny

from spherelm.data.output import locked
from spherelm.runs.checkpoint import WEIGHTS, latest_checkpoint
from spherelm.runs.record import LOCK, alone_in
from spherelm.train.trainer import Trainer, train

IN_USE = r"is in use by another process: wait until that ends, or choose another --out"
HOLDER = """
import fcntl, sys, time
file = open(sys.argv[1], "a")
fcntl.flock(file, fcntl.LOCK_EX)
print("held", flush=True)
time.sleep(600)
"""


@contextmanager
def another_process(directory: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that holds the directory as a run in it does, killed at the end."""
    command = [sys.executable, "-c", HOLDER, str(directory / LOCK)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == "held\n"
            yield process
        finally:
            process.kill()


def files(directory: Path) -> dict[Path, bytes]:
    """Everything in the directory but the lock, which another process has."""
    return {path: path.read_bytes() for path in directory.rglob("*") if path.is_file() and path.name != LOCK}


def test_a_second_process_is_refused_and_changes_nothing(data: Path, tmp_path: Path) -> None:
    config, run = tiny.run_config("ngpt", data, save_every=2), tmp_path / "run"
    loss = train(config, run, show_progress=False)
    part = run / "checkpoints" / ".step-00000008.part"
    part.mkdir()
    (part / WEIGHTS).write_text("what the other process is writing")
    with another_process(run):
        before = files(run)
        with pytest.raises(FileExistsError, match=rf"run {IN_USE}"):
            train(config, run, resume=True, show_progress=False)
        assert files(run) == before
    assert train(config, run, resume=True, show_progress=False) == loss, "the lock went with the process"
    assert not part.exists()


def test_of_two_that_start_at_once_one_is_refused(data: Path, tmp_path: Path) -> None:
    """The lock is taken before it is clear whose directory this is."""
    run = tmp_path / "run"
    run.mkdir()
    with another_process(run), pytest.raises(FileExistsError, match=IN_USE):
        train(tiny.run_config("gpt", data, steps=1), run, show_progress=False)
    assert [path.name for path in run.iterdir()] == [LOCK]
    train(tiny.run_config("gpt", data, steps=1), run, show_progress=False)
    assert not (run / LOCK).exists()


def test_a_run_is_held_from_its_start_to_its_end(data: Path, tmp_path: Path) -> None:
    config = tiny.run_config("gpt", data, steps=1)
    trainer = Trainer(config, tmp_path)
    with pytest.raises(FileExistsError, match=IN_USE):
        Trainer(config, tmp_path, resume=True)
    trainer.run(show_progress=False)
    Trainer(config, tmp_path, resume=True).run(show_progress=False)


def test_what_failed_holds_nothing(data: Path, tmp_path: Path) -> None:
    """Also where its traceback is still there, as in a notebook."""
    config = tiny.run_config("gpt", data, steps=2, save_every=1)
    train(config, tmp_path, show_progress=False)
    newest = latest_checkpoint(tmp_path)
    assert newest is not None
    (newest / WEIGHTS).write_bytes(b"damaged")
    with pytest.raises(ValueError, match="is damaged") as failed:
        train(config, tmp_path, resume=True, show_progress=False)
    assert failed.tb is not None
    with alone_in(tmp_path):
        pass


def test_a_lock_that_was_removed_meanwhile_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The holder removes the file at its end: who opened it before has a lock that nobody else will ever see."""
    path, flock = tmp_path / LOCK, fcntl.flock

    def late(file: object, how: int) -> None:
        path.unlink()
        flock(file, how)  # type: ignore[arg-type]

    monkeypatch.setattr(fcntl, "flock", late)
    with pytest.raises(FileExistsError, match="busy"), locked(path, "busy"):
        pass


def test_without_locks_in_the_file_system_it_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(file: object, how: int) -> None:
        raise OSError("Function not implemented")

    monkeypatch.setattr(fcntl, "flock", unknown)
    with alone_in(tmp_path):
        assert (tmp_path / LOCK).exists()
    assert not (tmp_path / LOCK).exists()


def test_a_killed_holder_leaves_a_file_that_holds_nothing(tmp_path: Path) -> None:
    with another_process(tmp_path) as holder:
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    assert (tmp_path / LOCK).exists()
    with alone_in(tmp_path):
        pass
