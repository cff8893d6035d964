"""The processes of a run, and the few numbers they agree on: of one process, which agrees with itself.

`train.parallel.Ranks` is a group of many; whoever has either calls the same methods.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

T = TypeVar("T")


@dataclass(frozen=True)
class Group:
    """The processes of a run, seen from one of them; as it is, the only one.

    mesh: a `DeviceMesh` [replicas, parts] or [parts] for sharded strategies, else `None`. saving: the processes again,
    as torch's `ProcessGroup` for writing checkpoints beside the training.
    """

    rank: int = 0
    world_size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    mesh: Any = None
    saving: Any = None

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
        return [values]

    def summed(self, counts: Tensor) -> Tensor:
        """The sum of the `counts` of every rank; all must call, with one shape."""
        return counts

    def together(self, action: Callable[[], T]) -> T:
        """Do `action` on every rank; where it fails on any, it fails on all."""
        return action()

    def first(self, action: Callable[[], T]) -> T:
        """Have the first rank do `action`, and return its result on every rank. Fails as `together` does."""
        return action()

    def unequal_ranks(self, model: nn.Module) -> list[int]:
        """The ranks whose weights differ from those of the first rank that should hold the same; all must call."""
        return []

    def answering(self) -> AbstractContextManager[Any]:
        """A context in which the failure of a collective operation says which ranks do not answer."""
        return nullcontext()
