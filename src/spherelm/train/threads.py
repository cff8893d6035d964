"""How many processor threads a run computes with: as many as are fastest beside whatever else the machine does.

The threads of OpenMP wait for one another after every operation, spinning. Where another program takes a core, the one
that waits for that core holds up all others, and a step on two threads takes several times as long as on one
(docs/performance.md).
"""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F

from spherelm.errors import UserError
from spherelm.models import Decoder
from spherelm.train.rehearsal import Products, Shapes, matrices

WINDOW = 0.015
"""Seconds that each number of threads is tried for, twice."""

SLOW = 1.5
"""A step that takes so many times the median of those before it is a reason to look again."""

REMEMBERED = 20
"""Steps that the median is of."""

MEASURING_SHARE = 0.02
"""The most time that looking again may take, of all time."""

GAIN = 0.95
"""In what part of the time of fewer threads more of them have to do the same work."""


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Compute with `count` processor threads in this process, for a while;
    what changes the number meanwhile is undone too.
    """
    if count < 1:
        raise UserError(f"--threads must be at least 1, got {count}")
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Rehearsal:
    """Work of a step's kind, products and what stands between them, for a moment."""

    def __init__(self, shapes: Shapes, rows: int, dtype: torch.dtype) -> None:
        self._products = [Products(shape, rows, dtype) for shape in shapes]

    def __call__(self) -> float:
        """Seconds of a round, the mean of as many as `WINDOW` has room for."""
        rounds, start = 0, time.perf_counter()
        while (passed := time.perf_counter() - start) < WINDOW or not rounds:
            for products in self._products:
                out, grad_x, _ = products()
                (F.silu(out) * out).add_(1)
                F.silu(grad_x).mul_(grad_x)
            rounds += 1
        return (time.perf_counter() - start if rounds == 1 else passed) / rounds


def fastest(limit: int, rehearse: Callable[[], float]) -> int:
    """The number of threads, of 1, 2, 4 and so on to `limit`, with which `rehearse` takes the least time; sets nothing.

    Each is tried twice, in turn, and the better time counts.
    """
    counts = sorted({min(2**k, limit) for k in range(limit.bit_length() + 1)})
    times = dict.fromkeys(counts, float("inf"))
    for _ in range(2):
        for count in counts:
            with threads(count):
                times[count] = min(times[count], rehearse())
    best = counts[0]
    for count in counts[1:]:
        if times[count] < GAIN * times[best]:
            best = count
    return best


def idle_seconds() -> float | None:
    """How long all cores together had nothing to do since the machine started; `None` where the system does not say."""
    try:
        first = Path("/proc/stat").read_text(encoding="utf-8").split("\n", 1)[0].split()
        return sum(map(int, first[4:6])) / 100
    except (OSError, ValueError, IndexError):
        return None


class Threads:
    """Sets the number of threads of this process, now and again while steps are made.

    limit: the most there may be. rehearse: as for `fastest`. Looks again where a step is slow, and where less than the
    limit is used and a core has had nothing to do; not so often that it takes more than `MEASURING_SHARE` of the time.
    """

    def __init__(self, limit: int, rehearse: Callable[[], float]) -> None:
        self.limit, self._rehearse = limit, rehearse
        self._choose()

    @property
    def count(self) -> int:
        """How many there are now."""
        return torch.get_num_threads()

    def _choose(self) -> None:
        start = time.perf_counter()
        torch.set_num_threads(fastest(self.limit, self._rehearse))
        now = time.perf_counter()
        self._seconds: deque[float] = deque(maxlen=REMEMBERED)
        self._quiet_until = now + (now - start) / MEASURING_SHARE
        self._idle, self._since = idle_seconds(), now

    def after(self, seconds: float) -> str | None:
        """To be called after a step that took so many seconds;
        says why, and what, where the number of threads changed.
        """
        before, median = self.count, statistics.median(self._seconds) if self._seconds else seconds
        self._seconds.append(seconds)
        if self.limit == 1 or time.perf_counter() < self._quiet_until:
            return None
        if seconds > SLOW * median:
            reason = f"a step took {seconds / median:.1f} times as long as those before it"
        elif before < self.limit and self._free_cores() > 0.7:
            reason = "a core is idle"
        else:
            return None
        self._choose()
        return None if self.count == before else f"{self.count} of {self.limit} threads from now on: {reason}"

    def _free_cores(self) -> float:
        """How many cores had nothing to do, in the mean since this was last asked."""
        idle, now = idle_seconds(), time.perf_counter()
        if idle is None or self._idle is None:
            return 0.0
        free = (idle - self._idle) / max(now - self._since, 1e-9)
        self._idle, self._since = idle, now
        return free


def threads_for(model: Decoder, rows: int) -> Threads | None:
    """The tuner of the number of threads for `model` on `rows` tokens at once,
    at most the present number; `None` for 1.
    """
    limit, dtype = torch.get_num_threads(), model.runtime.compute_dtype or torch.float32
    return None if limit == 1 else Threads(limit, Rehearsal(matrices(model), rows, dtype))
