"""A model cut over two processes is the model of one: logits, gradients, and the weights after a few updates."""

from __future__ import annotations

from pathlib import Path

import pytest
import tensor_parallel_ranks as parallel
import torch
import torch.distributed as dist

from spherelm.errors import UserError
from spherelm.interop.tensor_parallel import check
from spherelm.models import GPTConfig, NGPTConfig, build


@pytest.mark.row("Tensor parallelism")
@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="torch was built without gloo")
def test_two_processes_are_one(tmp_path: Path) -> None:
    meeting, out = tmp_path / "meeting", tmp_path / "found.pt"
    torch.multiprocessing.spawn(parallel.work, (2, str(meeting), str(out)), nprocs=2)  # type: ignore[no-untyped-call]
    found = torch.load(out, weights_only=True)
    assert set(found) == set(parallel.CASES) | set(parallel.CUTS)
    for name, differences in found.items():
        for tensor, difference in differences.items():
            # Adam and Muon make much of small gradients, rounding included.
            assert difference < (1e-4 if tensor.endswith(("weight", "value")) and name in parallel.CASES else 3e-6), (
                name
            )


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (
            NGPTConfig(vocab_size=11, n_layers=1, d_model=12, n_heads=3, d_ff=8, max_seq_len=8),
            "n_heads=3 is not divided by 2",
        ),
        (
            GPTConfig(vocab_size=11, n_layers=1, d_model=12, n_heads=2, d_ff=9, max_seq_len=8),
            "d_ff=9 is not divided by 2",
        ),
    ],
)
def test_what_cannot_be_cut_is_refused(config: GPTConfig | NGPTConfig, said: str) -> None:
    with pytest.raises(UserError, match=said):
        check(build(config), 2)
