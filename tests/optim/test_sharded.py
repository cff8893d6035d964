"""Every optimizer on weights that two processes share (FSDP2) moves them as one process does.

Rows of `q`, `k`, `v`, `u`, `v` and of the embeddings are whole on each process; the columns of both `o` are cut, so
that their lengths need both.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import sharded_steps
from two_ranks import found_by_two, needs_gloo


@pytest.mark.row("Optimizers")
@needs_gloo
def test_two_processes_are_one(tmp_path: Path) -> None:
    found = found_by_two(sharded_steps.work, tmp_path)
    experts = {f"{n} {name}" for n in (5, 6) for name in sharded_steps.EXPERTS}
    assert set(found) == set(sharded_steps.OPTIMS) | experts | set(sharded_steps.SPREADS)
    for name, differences in found.items():
        assert len(differences) > 20
        assert max(differences) < 2e-6, name
