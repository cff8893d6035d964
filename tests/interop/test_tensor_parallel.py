"""A model cut over two processes is the model of one: logits, gradients, and the weights after a few updates."""

from __future__ import annotations

from pathlib import Path

import pytest
import tensor_parallel_ranks as parallel
from two_ranks import found_by_two, needs_gloo

from spherelm.errors import UserError
from spherelm.interop.tensor_parallel import check
from spherelm.models import GPTConfig, NGPTConfig, build


@pytest.mark.row("Tensor parallelism")
@needs_gloo
def test_two_processes_are_one(tmp_path: Path) -> None:
    found = found_by_two(parallel.work, tmp_path)
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
