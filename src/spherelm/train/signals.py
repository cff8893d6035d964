"""Signals from schedulers and users during a run: save and exit."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

NOTED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
"""Ctrl-C, what a scheduler sends before it kills, what Slurm is asked to send when time is nearly up,
a lost connection.
"""


class Interrupted(RuntimeError):
    """The run was asked to stop by a signal and saved itself first."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message, signal_number)
        self.signal_number = signal_number

    def __str__(self) -> str:
        return str(self.args[0])


class Stop(BaseException):
    """Leave what is under way, because of the signal `number`.
    No `Exception`, since what is under way may catch those.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


@dataclass
class Noted:
    """The signals that came, in their order.
    raises: whether the next one raises `Stop` wherever the program then is.
    """

    numbers: list[int] = field(default_factory=list)
    raises: bool = False

    @property
    def first(self) -> int:
        """The first signal, 0 if there was none."""
        return self.numbers[0] if self.numbers else 0

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Let a signal break off what runs in this context, which must leave nothing half done."""
        self.raises = True
        try:
            yield
        finally:
            self.raises = False


@contextmanager
def signals_noted() -> Iterator[Noted]:
    """Note the `NOTED` signals instead of dying of them; a second SIGINT is let through.

    One that is ignored stays so: SIGINT and SIGHUP are in the workers of a sweep, whose parent tells them by SIGTERM,
    SIGINT in what a script puts into the background, SIGHUP under nohup. Outside of the main thread, where Python
    allows no handlers, none is noted.
    """
    noted = Noted()
    if threading.current_thread() is not threading.main_thread():
        yield noted
        return
    before = {number: signal.getsignal(number) for number in NOTED if signal.getsignal(number) != signal.SIG_IGN}

    def note(number: int, frame: Any) -> None:
        if number == signal.SIGINT and number in noted.numbers:
            raise KeyboardInterrupt
        noted.numbers.append(number)
        if noted.raises:
            noted.raises = False
            raise Stop(number)

    for number in before:
        signal.signal(number, note)
    try:
        yield noted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
