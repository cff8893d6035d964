"""TensorBoard, Weights & Biases and trackio, each the real library, read back by its own reader."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny

from spherelm.runs.metrics import read_metrics
from spherelm.train.metrics_log import MetricsLog
from spherelm.train.sinks import SINKS, check_names, numbers, open_sinks
from spherelm.train.trainer import Interrupted, Trainer

# What these libraries warn of on import is theirs.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::PendingDeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    # wandb leaves the pipes and sockets of its service to the interpreter's end.
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
Curve = list[tuple[int, float]]


@pytest.fixture(autouse=True)
def own_directories(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is written to the user's directories, nor read from the user's settings."""
    home = tmp_path_factory.mktemp("home")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name in ("TRACKIO_DIR", "WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(home / name))
    for name in ("WANDB_MODE", "WANDB_API_KEY", "TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL"):
        monkeypatch.delenv(name, raising=False)


def tensorboard_curve(run: Path, name: str) -> Curve:
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulators.EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


def wandb_records(path: Path) -> Iterator[bytes]:
    """The records of an offline run's file: after 7 bytes of header a LevelDB log, in blocks of 32 KiB."""
    data, position, parts = path.read_bytes(), 7, []
    assert data.startswith(b":W&B")
    while position + 7 <= len(data):
        if 32768 - position % 32768 < 7:
            position += 32768 - position % 32768
            continue
        length, kind = int.from_bytes(data[position + 4 : position + 6], "little"), data[position + 6]
        parts.append(data[position + 7 : position + 7 + length])
        position += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            yield b"".join(parts)
            parts = []


def wandb_curve(run: Path, name: str) -> Curve:
    messages = importlib.import_module("wandb.proto.wandb_internal_pb2")
    curve = []
    for path in sorted((run / "wandb").glob("offline-run-*/run-*.wandb")):
        for data in wandb_records(path):
            items = messages.Record.FromString(data).history.item
            row = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}
            if name in row:
                curve.append((row["step"], row[name]))
    return curve


def trackio_curve(run: Path, name: str) -> Curve:
    storage = importlib.import_module("trackio.sqlite_storage").SQLiteStorage
    assert str(run.resolve()) in storage.get_runs("spherelm")
    rows = storage.get_logs("spherelm", str(run.resolve()))
    return [(row["step"], row[name]) for row in rows if name in row]


READERS: dict[str, Callable[[Path, str], Curve]] = {
    "tensorboard": tensorboard_curve,
    "wandb": wandb_curve,
    "trackio": trackio_curve,
}


def expected(run: Path, kind: str, field: str) -> Curve:
    return [(r["step"], pytest.approx(r[field])) for r in read_metrics(run / "metrics.jsonl") if r["kind"] == kind]


def awaited(there: Callable[[], bool], seconds: float = 30.0) -> None:
    """Wait until `there`, no longer than so many seconds: on a busy machine wandb's own process writes late."""
    end = time.monotonic() + seconds
    while not there() and time.monotonic() < end:
        time.sleep(0.1)


@pytest.mark.row("Logs")
@pytest.mark.parametrize("name", SINKS)
def test_a_resumed_run_is_told_whole_and_once(name: str, data: Path, tmp_path: Path) -> None:
    """Cut off after step 4, its last checkpoint at step 2: steps 3 and 4 are done twice and told once."""
    pytest.importorskip(name)
    run = tmp_path / "run"
    config = tiny.run_config("ngpt", data, log_to=name, save_every=2, diagnose_every=2, eval_every=3)
    first = Trainer(config, run)
    update = first._update

    def killed(step: int, lr: float) -> Any:
        if step == 3:
            raise Interrupted("killed", 9)
        return update(step, lr)

    first._update = killed  # type: ignore[method-assign, assignment]
    with pytest.raises(Interrupted):
        first.run(show_progress=False)
    Trainer(config, run, resume=True).run(show_progress=False)
    read = READERS[name]
    awaited(lambda: len(read(run, "train/loss")) >= 6)
    assert read(run, "train/loss") == expected(run, "train", "loss")
    assert [step for step, _ in read(run, "train/loss")] == [1, 2, 3, 4, 5, 6]
    assert read(run, "val/loss") == expected(run, "val", "loss")
    assert [step for step, _ in read(run, "train/angle_max/matrix")] == [2, 4, 6]
    assert [step for step, _ in read(run, "train/alpha_A/1")] == [2, 4, 6]


class Remembered:
    """A sink that remembers what it is told."""

    def __init__(self, new: bool) -> None:
        self.new, self.told, self.closed = new, [], False  # type: ignore[var-annotated]

    def write(self, step: int, values: dict[str, float]) -> None:
        self.told.append((step, values))

    def close(self) -> None:
        self.closed = True


def test_a_sink_that_joins_later_is_told_the_past_first(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path, 0)
    for step in (1, 2, 3):
        log.write("train", step=step, loss=float(step))
    log.close()
    old, new = Remembered(False), Remembered(True)
    log = MetricsLog(path, 2, [old, new])
    for step in (3, 4):
        log.write("train", step=step, loss=float(step))
    log.close()
    assert old.told == [(4, {"train/loss": 4.0})], "step 3 it was told before"
    assert new.told == [(step, {"train/loss": float(step)}) for step in (1, 2, 3, 4)]
    assert old.closed
    assert new.closed


def test_numbers_have_flat_names_and_text_is_left_out() -> None:
    record = {"kind": "train", "step": 3, "loss": 1, "lr_by_role": {"matrix": 0.5}, "alpha_A": [0.1, 0.2], "note": "x"}
    flat = {"train/loss": 1.0, "train/lr_by_role/matrix": 0.5, "train/alpha_A/0": 0.1, "train/alpha_A/1": 0.2}
    assert numbers(record) == flat


@pytest.mark.parametrize("name", SINKS)
def test_what_is_not_installed_is_named_with_its_extra(
    name: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(
        ValueError, match=rf"--log-to {name} needs {name}: pip install '\.\[logs\]' in a clone of spherelm"
    ):
        Trainer(tiny.run_config("ngpt", data, log_to=name), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_an_unknown_sink_is_named() -> None:
    with pytest.raises(ValueError, match="--log-to csv is unknown: choose among tensorboard,wandb,trackio"):
        check_names("csv")
    assert check_names("") == []
    assert open_sinks("", Path("nowhere"), {}) == []


NO_NETWORK = """
import socket, sys
from pathlib import Path


connect = socket.socket.connect
def local_only(self, address):
    host = address[0] if isinstance(address, tuple) else "127.0.0.1"
    if host not in ("127.0.0.1", "::1", "localhost"):
        Path(sys.argv[1], "network").write_text(repr(address))
        raise OSError(f"a connection to {address}")
    return connect(self, address)

socket.socket.connect = local_only
from spherelm.train.metrics_log import MetricsLog
from spherelm.train.sinks import open_sinks

run = Path(sys.argv[1])
log = MetricsLog(run / "metrics.jsonl", 0, open_sinks("wandb,trackio", run, {"lr": 1}))
log.write("train", step=1, loss=1.0)
log.close()
"""


@pytest.mark.row("Logs")
def test_a_process_with_sinks_ends_well_and_calls_nobody(tmp_path: Path) -> None:
    """wandb's service is a process of its own: it must not keep this one, nor print."""
    pytest.importorskip("wandb")
    pytest.importorskip("trackio")
    words = [sys.executable, "-c", NO_NETWORK, str(tmp_path)]
    answer = subprocess.run(words, capture_output=True, text=True, timeout=120, check=False)
    assert (answer.returncode, answer.stdout) == (0, ""), answer.stderr
    assert not (tmp_path / "network").exists()
    assert wandb_curve(tmp_path, "train/loss") == [(1, 1.0)]
