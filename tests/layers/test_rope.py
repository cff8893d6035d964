from __future__ import annotations

import paper
import pytest
import torch

from spherelm.layers.rope import rotary_table, rotate


@pytest.mark.parametrize("d_k", [2, 8, 10])
@pytest.mark.parametrize("base", [10000.0, 50.0])
def test_rotation_is_the_papers(d_k: int, base: float) -> None:
    x = torch.randn(2, 3, 7, d_k, dtype=torch.float64)
    ours = rotate(x, rotary_table(torch.arange(7.0, dtype=torch.float64), d_k, base))
    torch.testing.assert_close(ours, paper.rope(x, base), rtol=1e-13, atol=1e-13)


def test_channel_i_is_paired_with_channel_i_plus_half() -> None:
    x = torch.zeros(1, 1, 2, 6)
    x[..., 1] = 1
    moved = rotate(x, rotary_table(torch.tensor([0.0, 1.0]), 6, 10000.0))[0, 0, 1]
    assert moved.nonzero().flatten().tolist() == [1, 4]


def test_lengths_do_not_change_and_position_zero_is_left_alone() -> None:
    x = torch.randn(2, 3, 9, 8, dtype=torch.float64)
    moved = rotate(x, rotary_table(torch.arange(9.0, dtype=torch.float64), 8, 10000.0))
    torch.testing.assert_close(moved.norm(dim=-1), x.norm(dim=-1), rtol=1e-14, atol=0)
    assert torch.equal(moved[:, :, 0], x[:, :, 0])


def test_positions_may_start_anywhere_and_differ_by_sequence() -> None:
    x = torch.randn(2, 3, 9, 8, dtype=torch.float64)
    whole = rotate(x, rotary_table(torch.arange(9.0, dtype=torch.float64), 8, 10000.0))
    tail = rotate(x[:, :, 4:], rotary_table(torch.arange(4.0, 9.0, dtype=torch.float64), 8, 10000.0))
    torch.testing.assert_close(tail, whole[:, :, 4:], rtol=1e-14, atol=1e-14)
    starts = torch.stack([torch.arange(0.0, 5.0), torch.arange(4.0, 9.0)]).double().unsqueeze(1)
    mixed = rotate(torch.stack([x[0, :, :5], x[1, :, 4:]]), rotary_table(starts, 8, 10000.0))
    torch.testing.assert_close(mixed, torch.stack([whole[0, :, :5], whole[1, :, 4:]]), rtol=1e-14, atol=1e-14)


def test_bfloat16_is_rotated_in_the_tables_precision() -> None:
    x = torch.randn(1, 2, 5, 8).bfloat16()
    table = rotary_table(torch.arange(5.0), 8, 10000.0)
    moved = rotate(x, table)
    assert moved.dtype == torch.bfloat16
    assert torch.equal(moved, rotate(x.float(), table).bfloat16())
