"""How many threads a run takes, by times that the tests make up."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from spherelm.runs.metrics import read_metrics
from spherelm.train import threads as module
from spherelm.train.threads import Rehearsal, Threads, fastest, threads
from spherelm.train.trainer import Trainer

MakeTrainer = Callable[..., Trainer]


@pytest.fixture(autouse=True)
def same_threads_afterwards() -> Iterator[None]:
    with threads(torch.get_num_threads()):
        yield


def machine(times: dict[int, float]) -> Callable[[], float]:
    """A step that takes so long on so many threads."""
    return lambda: times[torch.get_num_threads()]


@pytest.mark.parametrize(
    ("limit", "times", "wanted"),
    [
        (1, {1: 1.0}, 1),
        (2, {1: 1.0, 2: 0.6}, 2),
        (2, {1: 1.0, 2: 0.99}, 1),
        (2, {1: 1.0, 2: 2.7}, 1),
        (6, {1: 1.0, 2: 0.6, 4: 0.4, 6: 0.5}, 4),
        (8, {1: 1.0, 2: 0.6, 4: 0.7, 8: 0.3}, 8),
    ],
)
def test_the_fastest_number_is_taken(limit: int, times: dict[int, float], wanted: int) -> None:
    before = torch.get_num_threads()
    assert fastest(limit, machine(times)) == wanted
    assert torch.get_num_threads() == before


class Clock:
    """Time and idle cores as a test says."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.idle = 0.0, 0.0
        monkeypatch.setattr(module.time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(module, "idle_seconds", lambda: self.idle)

    def pass_by(self, seconds: float, idle: float = 0.0) -> None:
        self.now += seconds
        self.idle += seconds * idle


def test_a_slow_step_and_an_idle_core_are_reasons_to_look_again(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, times, asked = Clock(monkeypatch), {1: 1.0, 2: 0.6}, []

    def rehearse() -> float:
        asked.append(torch.get_num_threads())
        clock.pass_by(0.01)
        return times[torch.get_num_threads()]

    chosen = Threads(2, rehearse)
    assert chosen.count == 2
    clock.pass_by(10.0)

    def step(seconds: float, idle: float = 0.0) -> str | None:
        asked.clear()
        clock.pass_by(seconds, idle)
        return chosen.after(seconds)

    for _ in range(5):
        assert step(0.3) is None
        assert not asked
    times[2] = 2.7
    assert step(0.9) == "1 of 2 threads from now on: a step took 3.0 times as long as those before it"
    assert chosen.count == 1
    assert step(9.0, idle=0.0) is None, "as slow as it may be: there are none before it on one thread"
    assert not asked
    assert step(0.5, idle=0.0) is None
    assert not asked, "nothing is idle"
    assert step(0.5, idle=0.9) is None
    assert asked, "looked, and two threads are still slower"
    times[2] = 0.6
    assert step(0.5, idle=0.9) is None
    assert not asked, "it has just been looked at"
    clock.pass_by(5.0, idle=0.9)
    assert step(0.5, idle=0.9) == "2 of 2 threads from now on: a core is idle"


def test_looking_again_takes_little_time(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, looked = Clock(monkeypatch), []

    def rehearse() -> float:
        clock.pass_by(0.05)
        looked.append(0.05)
        return 1.0

    chosen = Threads(4, rehearse)
    for number in range(4000):
        seconds = 0.1 if number % 2 else 1.0
        clock.pass_by(seconds, idle=3.0)
        chosen.after(seconds)
    assert 0.01 < sum(looked) / clock.now < 0.025


def test_rehearsing_takes_the_time_it_is_given() -> None:
    assert 0 < Rehearsal({(8, 4): 1}, 4, torch.float32)() < module.WINDOW  # type: ignore[arg-type]


@pytest.mark.parametrize(("before", "asked", "wanted"), [(1, None, 1), (3, None, 2), (1, 2, 2)])
def test_a_run_stays_within_its_limit_and_leaves_the_number_as_it_was(
    before: int, asked: int | None, wanted: int, trainer: MakeTrainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The limit is the process's number, which OMP_NUM_THREADS sets; a run that names its number takes it."""
    limits: list[int] = []

    def noted(limit: int, rehearse: Any) -> int:
        limits.append(limit)
        return 2

    monkeypatch.setattr(module, "fastest", noted)
    monkeypatch.setattr(module, "MEASURING_SHARE", 1e-9)  # it does not look again, however slow a step is
    torch.set_num_threads(before)
    trainer("ngpt", steps=2, threads=asked).run(show_progress=False)
    assert torch.get_num_threads() == before
    records = [r for r in read_metrics(tmp_path / "run" / "metrics.jsonl") if r["kind"] == "train"]
    assert {r["threads"] for r in records} == {wanted}
    assert limits == ([before] if before > 1 else [])
