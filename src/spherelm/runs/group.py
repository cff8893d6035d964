"""The processes of a run, and the few numbers they agree on. A run of one process has a `Group` of one, which does nothing."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

T = TypeVar("T")
ANSWER_SECONDS = 10.0
"""How long ranks wait for one another's sign of life after a collective operation failed."""


class RankLost(RuntimeError):
    """Some processes of the run no longer answer."""


class ElsewhereFailed(RuntimeError):
    """What all ranks were to do failed on another rank, for the reason given."""


@dataclass(frozen=True)
class Group:
    """The processes of a run, seen from one of them.

    mesh: [replicas, parts] or [parts] for sharded strategies, else `None`. store: where ranks leave signs of life.
    saving: the ranks again, for writing checkpoints beside the training.
    """

    rank: int = 0
    world_size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    mesh: DeviceMesh | None = None
    store: Any = None
    saving: dist.ProcessGroup | None = None

    @property
    def is_first(self) -> bool:
        """Whether this process writes what only one may write."""
        return self.rank == 0

    @property
    def is_alone(self) -> bool:
        """Whether there are no others."""
        return self.world_size == 1

    def gather(self, values: list[float]) -> list[list[float]]:
        """The `values` of every rank, in the order of ranks; all must call, with equally many."""
        if self.is_alone:
            return [values]
        parts = [torch.empty(len(values), dtype=torch.float64) for _ in range(self.world_size)]
        dist.all_gather(parts, torch.tensor(values, dtype=torch.float64))
        return [part.tolist() for part in parts]

    def summed(self, counts: Tensor) -> Tensor:
        """The sum of the `counts` of every rank; all must call, with one shape."""
        if not self.is_alone:
            dist.all_reduce(counts := counts.clone())
        return counts

    def together(self, action: Callable[[], T]) -> T:
        """Do `action` on every rank; where it fails on any, it fails on all.

        What it raises is raised where it is raised; the other ranks raise `ElsewhereFailed`.
        """
        failure: Exception | None = None
        try:
            result = action()
        except Exception as error:
            failure = error
        if any(flag for (flag,) in self.gather([float(failure is not None)])):
            reasons: list[Any] = [None] * self.world_size
            if not self.is_alone:
                dist.all_gather_object(reasons, None if failure is None else str(failure) or type(failure).__name__)
            if failure is not None:
                raise failure
            raise ElsewhereFailed(next(f"rank {rank}: {why}" for rank, why in enumerate(reasons) if why is not None))
        return result

    def first(self, action: Callable[[], T]) -> T:
        """Have the first rank do `action`, and return its result on every rank. Fails as `together` does."""
        box: list[Any] = [self.together(action if self.is_first else lambda: None)]
        if not self.is_alone:
            dist.broadcast_object_list(box, src=0)
        result: T = box[0]
        return result

    @torch.no_grad()
    def strangers(self, model: nn.Module) -> list[int]:
        """The ranks whose weights differ from those of the first rank that should hold the same; all must call."""
        if self.is_alone:
            return []
        parts = 1 if self.mesh is None else self.mesh.size(-1)
        own = sum((own_part(p).double().sum() for p in model.parameters()), torch.zeros((), dtype=torch.float64))
        sums = [value for (value,) in self.gather([float(own)])]
        return [rank for rank, value in enumerate(sums) if math.isfinite(value) and value != sums[rank % parts]]

    def silent_ranks(self) -> list[int]:
        """Which ranks give no sign of life after a collective operation failed, having waited a while for them."""
        try:
            self.store.set(f"alive/{self.rank}", "1")
            return sorted(silent_among(range(self.world_size), self.store, "alive/"))
        except RuntimeError:  # the store itself is gone, and with it the process that kept it
            return [0]

    @contextmanager
    def answering(self) -> Iterator[None]:
        """Turn the failure of a collective operation into `RankLost`, which names the ranks that do not answer."""
        try:
            yield
        except RuntimeError as error:
            if self.is_alone or not is_communication(error):
                raise
            silent = self.silent_ranks()
            names = ", ".join(map(str, silent)) or "none, so that it is the network"
            raise RankLost(
                f"rank {self.rank} could not reach the others ({str(error).splitlines()[0][:200]}); ranks that no longer "
                f"answer (killed, hung, or their machine lost): {names}; the run goes on from its last checkpoint with --resume"
            ) from error


def is_communication(error: RuntimeError) -> bool:
    """Whether an error comes from processes that do not reach each other."""
    return isinstance(error, dist.DistError) or any(
        word in str(error) for word in ("gloo", "Gloo", "NCCL", "Timed out")
    )


def own_part(tensor: Tensor) -> Tensor:
    """`tensor`, or of a sharded one the part that this process holds."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def silent_among(ranks: Iterable[int], store: Any, prefix: str = "") -> set[int]:
    """Those of `ranks` that have not left a sign in the `store` after a while."""
    waiting, end = set(ranks), time.monotonic() + ANSWER_SECONDS
    while waiting and time.monotonic() < end:
        waiting = {rank for rank in waiting if not store.check([f"{prefix}{rank}"])}
        time.sleep(0.02)
    return waiting
