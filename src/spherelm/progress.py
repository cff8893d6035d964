"""Progress of long work on stderr: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import os
import sys
import threading
import time
from types import TracebackType
from typing import Any

from tqdm import tqdm

LINE_SECONDS = 10.0
"""Between two plain lines."""


def say(message: str) -> None:
    """Write a line of ours to stderr, above a bar if there is one."""
    write_line(f"spherelm: {' '.join(message.split())}")


def write_line(line: str) -> None:
    """Write `line` to stderr as it is. A terminal that is gone is no error."""
    try:
        tqdm.write(line, file=sys.stderr)
    except OSError:  # it may be why a run stops
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())


def has_bars() -> bool:
    """Whether stderr is a terminal, and the variable TQDM_DISABLE leaves bars on."""
    return sys.stderr.isatty() and not os.environ.get("TQDM_DISABLE")


def own_screen_lock() -> None:
    """In a worker process: a lock that is no semaphore between processes,
    which would be reported to leak if it is stopped.
    """
    tqdm.set_lock(threading.RLock())


class Bar:
    """How far a piece of work is, used as a context.

    Args:
        name: What the work is called.
        total: How many `unit` there are, `None` where that is not known.
        done: How many are done already.
        unit: What is counted, in the singular; "B" for bytes.
        show: Whether anything is shown.
        every: Write a plain line each time that so many more are done, and no bar; 0 for neither; `None` for a bar on a
            terminal, and else a plain line every `LINE_SECONDS` and one at the end.
        leave: Whether the bar, or the line at the end, stays when the work is done.
    """

    def __init__(
        self,
        name: str,
        total: int | None,
        done: int = 0,
        unit: str = "step",
        show: bool = True,
        every: int | None = None,
        leave: bool = True,
    ) -> None:
        self.name, self.total, self.done, self.unit, self.leave = name, total, done, unit, leave
        self._show, self._every = show, every
        self._said = time.monotonic()
        self._first: tuple[int, float] | None = None
        self._bar: Any = None
        if show and every is None and has_bars():
            self._bar = tqdm(
                total=total, initial=done, desc=name, unit=unit, unit_scale=unit == "B", leave=leave, disable=False
            )

    def __enter__(self) -> Bar:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the bar, if there is one."""
        if self._bar is not None:
            self._bar.close()

    def update(self, more: int = 1, text: str = "") -> None:
        """Note that so many more are done. text: what else there is to say now."""
        self.done += more
        if self._first is None:  # its time may be that of compilation
            self._first = (self.done, time.monotonic())
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update(more)
        elif self._show and self._is_due(more):
            self._said = time.monotonic()
            self.line(", ".join(filter(None, (text, self._left()))))

    def line(self, text: str) -> None:
        """Write a line that stays: where the work stands, and `text`."""
        if self._show:
            write_line(f"{self.name}: {', '.join(filter(None, (self._place(), text)))}")

    def _is_due(self, more: int) -> bool:
        if self._every is not None:
            return self._every > 0 and more > 0 and self.done % self._every == 0
        return time.monotonic() - self._said >= LINE_SECONDS or (self.leave and more > 0 and self.done == self.total)

    def _place(self) -> str:
        counts = (self.done,) if self.total is None else (self.done, self.total)
        if self.unit == "B":
            return "/".join(f"{tqdm.format_sizeof(count)}B" for count in counts)
        return f"{self.unit} {'/'.join(f'{count:,}' for count in counts)}"

    def _left(self) -> str:
        """The time left at the mean speed since the first update."""
        done, start = self._first or (self.done, 0.0)
        if self.total is None or not done < self.done < self.total:
            return ""
        seconds = (time.monotonic() - start) / (self.done - done)
        return f"{tqdm.format_interval(seconds * (self.total - self.done))} left"
