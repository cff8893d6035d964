"""What schedulers and users ask of a run while it trains: to save and leave."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

NOTED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
"""Ctrl-C, what a scheduler sends before it kills, and what Slurm is asked to send when time is nearly up."""


class Interrupted(RuntimeError):
    """The run was asked to stop by a signal and saved itself first."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message, signal_number)
        self.signal_number = signal_number

    def __str__(self) -> str:
        return str(self.args[0])


@contextmanager
def signals_noted() -> Iterator[list[int]]:
    """Collect the `NOTED` signals in the list given instead of dying of them; a second SIGINT is let through.

    One that is ignored stays so: SIGINT is in the workers of a sweep, whose parent tells them by SIGTERM, and in what a script
    puts into the background. Outside of the main thread, where Python allows no handlers, the list stays empty.
    """
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    before = {number: signal.getsignal(number) for number in NOTED if signal.getsignal(number) != signal.SIG_IGN}

    def note(number: int, frame: Any) -> None:
        if number == signal.SIGINT and number in received:
            raise KeyboardInterrupt
        received.append(number)

    for number in before:
        signal.signal(number, note)
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
