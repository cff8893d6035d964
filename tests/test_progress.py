"""Progress of long work: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import io
import os
import sys
from types import SimpleNamespace

import pytest

from spherelm import progress
from spherelm.progress import LINE_SECONDS, Bar, say


class Clock:
    """Time that passes when it is told to."""

    now = 0.0


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: clock.now))
    return clock


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def on_terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """stderr, as if it were a terminal from here on."""
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    return terminal


def work(steps: int = 100, **options: int | bool | None) -> None:
    with Bar("work", steps, **options) as bar:  # type: ignore[arg-type]
        for step in range(1, steps + 1):
            bar.update(1, f"loss {step}")


def test_lines_come_by_the_clock_and_at_the_end(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with Bar("work", 100) as bar:
        for step in range(1, 101):
            clock.now += 1.0
            bar.update(1, f"loss {step}")
    lines = capsys.readouterr().err.splitlines()
    steps = [int(line.split("step ")[1].split("/")[0]) for line in lines]
    assert steps == [*range(10, 101, int(LINE_SECONDS))]
    assert lines[4] == "work: step 50/100, loss 50, 00:50 left", "as many seconds as steps"
    assert "left" not in lines[-1]


def test_the_first_piece_takes_no_part_in_the_time_left(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with Bar("work", 21) as bar:
        clock.now += 1000.0  # compilation
        bar.update()
        for _ in range(10):
            clock.now += 1.0
            bar.update()
    assert capsys.readouterr().err.splitlines()[-1].endswith("step 11/21, 00:10 left")


@pytest.mark.parametrize(("every", "steps"), [(30, [30, 60, 90]), (1, [*range(1, 101)]), (0, [])])
@pytest.mark.usefixtures("clock")
def test_lines_come_every_so_many(every: int, steps: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """On a terminal as well, where there is no bar then."""
    terminal = on_terminal(monkeypatch)
    work(every=every)
    said = terminal.getvalue()
    assert [int(line.split("step ")[1].split("/")[0]) for line in said.splitlines()] == steps
    assert "\r" not in said


def test_a_terminal_gets_a_bar_and_lines_above_it(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = on_terminal(monkeypatch)
    with Bar("work", 3) as bar:
        bar.update(1, "loss 1")
        say("something else")
        bar.line("validation loss 2")
        bar.update(2)
    shown = [line.rpartition("\r")[2] for line in terminal.getvalue().split("\n")]
    assert shown[:2] == ["spherelm: something else", "work: step 1/3, validation loss 2"]
    assert "3/3" in shown[2]
    assert shown[3:] == [""]


@pytest.mark.usefixtures("clock")
def test_who_wants_no_bars_gets_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = on_terminal(monkeypatch)
    monkeypatch.setenv("TQDM_DISABLE", "1")
    work()
    assert terminal.getvalue() == "work: step 100/100, loss 100\n"


def test_nothing_is_shown_where_nothing_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = on_terminal(monkeypatch)
    work(show=False)
    assert terminal.getvalue() == ""


@pytest.mark.usefixtures("clock")
def test_bytes_are_counted_in_their_units(capsys: pytest.CaptureFixture[str]) -> None:
    for leave in (False, True):
        with Bar("reading", 2_500_000, unit="B", leave=leave) as bar:
            bar.update(2_500_000)
    assert capsys.readouterr().err == "reading: 2.50MB/2.50MB\n"


def test_a_terminal_that_is_gone_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """And what is written there afterwards goes nowhere: its descriptor, a pipe without a reader, is replaced."""
    reader, writer = os.pipe()
    os.close(reader)

    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(5, "Input/output error")

        def fileno(self) -> int:
            return writer

    monkeypatch.setattr(sys, "stderr", Gone())
    say("into the void")
    assert os.write(writer, b"more") == 4
    os.close(writer)
