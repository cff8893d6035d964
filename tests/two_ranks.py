"""What two processes find together, over gloo."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

needs_gloo = pytest.mark.skipif(
    not dist.is_available() or not dist.is_gloo_available(), reason="torch was built without gloo"
)


def found_by_two(work: Callable[[], Any], directory: Path) -> Any:
    """What `work`, a function of a module, returns in the first of two processes that both call it."""
    out = directory / "found.pt"
    torch.multiprocessing.spawn(_meet, (work, str(directory / "meeting"), str(out)), nprocs=2)  # type: ignore[no-untyped-call]
    return torch.load(out, weights_only=True)


def _meet(rank: int, work: Callable[[], Any], meeting: str, out: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    found = work()
    if rank == 0:
        torch.save(found, out)
    gc.collect()
    dist.barrier()
    dist.destroy_process_group()
