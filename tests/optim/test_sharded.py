"""Every optimizer on weights that two processes share (FSDP2) moves them as one process does.

Rows of `q`, `k`, `v`, `u`, `v` and of the embeddings are whole on each process; the columns of both `o` are cut, so
that their lengths need both.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import sharded_steps
import torch
import torch.distributed as dist


@pytest.mark.row("Optimizers")
@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="torch was built without gloo")
def test_two_processes_are_one(tmp_path: Path) -> None:
    meeting, out = tmp_path / "meeting", tmp_path / "found.pt"
    torch.multiprocessing.spawn(sharded_steps.work, (2, str(meeting), str(out)), nprocs=2)  # type: ignore[no-untyped-call]
    found = torch.load(out, weights_only=True)
    experts = {f"{n} {name}" for n in (5, 6) for name in sharded_steps.EXPERTS}
    assert set(found) == set(sharded_steps.OPTIMS) | experts | set(sharded_steps.SPREADS)
    for name, differences in found.items():
        assert len(differences) > 20
        assert max(differences) < 2e-6, name
