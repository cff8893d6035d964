"""Both ways to multiply groups of rows are the product group by group, forward and backward."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from spherelm.layers import grouped
from spherelm.layers.grouped import Room, grouped_product, has_kernel, rounded_up, wants_few_lengths

SIZES = [3, 0, 5, 8]


def inputs(dtype: torch.dtype, n_in: int = 16, n_out: int = 24) -> tuple[Tensor, Tensor, Tensor]:
    rows = torch.randn(sum(SIZES), n_in, dtype=dtype, requires_grad=True)
    weight = torch.randn(len(SIZES), n_out, n_in, dtype=dtype, requires_grad=True)
    return rows, weight, torch.tensor(SIZES).cumsum(0, dtype=torch.int32)


def plain(rows: Tensor, weight: Tensor) -> Tensor:
    return torch.cat([part @ matrix.T for part, matrix in zip(rows.split(SIZES), weight, strict=True)])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n_in", [16, 10])
@pytest.mark.parametrize("kernel", [True, False])
def test_it_is_the_product_group_by_group(
    dtype: torch.dtype, n_in: int, kernel: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With torch's kernel wherever it can be, and without it."""
    if not kernel:
        monkeypatch.setattr(grouped, "has_kernel", lambda rows, weight: False)
    rows, weight, ends = inputs(dtype, n_in)
    ours, theirs = grouped_product(rows, weight, ends), plain(rows, weight)
    direction = torch.randn(1, theirs.shape[1], dtype=dtype).expand_as(theirs)
    tolerance = {"rtol": 1e-2, "atol": 1e-1} if dtype == torch.bfloat16 else {}
    pairs = [(ours, theirs)]
    pairs += zip(*(torch.autograd.grad(y, [rows, weight], direction) for y in (ours, theirs)), strict=True)
    for one, other in pairs:
        torch.testing.assert_close(one, other, **tolerance)
    assert pairs[2][0][1].abs().max() == 0, "a group without rows"


def test_the_kernel_takes_aligned_rows_of_single_precision_and_less() -> None:
    if not hasattr(torch.nn.functional, "grouped_mm"):
        pytest.skip("this torch has no grouped_mm")
    assert has_kernel(*inputs(torch.float32)[:2])
    assert has_kernel(*inputs(torch.bfloat16)[:2])
    assert not has_kernel(*inputs(torch.float64)[:2])
    assert not has_kernel(*inputs(torch.float32, n_in=10)[:2])
    assert not has_kernel(*inputs(torch.float32, n_out=22)[:2])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_it_is_one_operation_that_torch_knows(dtype: torch.dtype) -> None:
    """Its shape without data, its gradient, what it leaves alone: torch's own checks of an operation."""
    torch.library.opcheck(grouped_product, inputs(dtype))


def test_lengths_of_groups_are_few_and_hardly_longer() -> None:
    counts = torch.arange(100_000)
    lengths = rounded_up(counts)
    assert (lengths >= counts).all()
    assert (lengths[64:] * 8 < counts[64:] * 9).all()
    assert (lengths[:65] - counts[:65] < 8).all()
    assert len(lengths.unique()) == 9 + 8 * 10 + 5, "0 to 64 by 8, eight an octave to 65536, part of the next"


def test_room_keeps_rows_and_fills_with_zeros() -> None:
    counts = torch.tensor([0, 3, 130, 0, 8, 1000, 0])
    room = Room.around(counts.cumsum(0).int())
    assert room.ends.diff(prepend=torch.zeros(1, dtype=torch.int32)).tolist() == [0, 8, 144, 0, 8, 1024, 0]
    rows = torch.randn(int(counts.sum()), 4)
    put = room.put(rows)
    assert torch.equal(put[room.place], rows)
    assert put.count_nonzero() == rows.count_nonzero()
    group_of = torch.bucketize(room.place, room.ends, right=True)
    assert torch.equal(group_of, torch.arange(7).repeat_interleave(counts))


@pytest.mark.parametrize("kernel", [True, False])
def test_room_does_not_change_a_16_bit_product(kernel: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Integers of which every product and sum is exact in bfloat16's products, so both are equal to the last bit."""
    if not kernel:
        monkeypatch.setattr(grouped, "has_kernel", lambda rows, weight: False)
    counts = torch.tensor([70, 0, 5, 129])
    rows = torch.randint(-3, 4, (204, 16)).bfloat16().requires_grad_()
    weight = torch.randint(-3, 4, (4, 8, 16)).bfloat16().requires_grad_()
    assert wants_few_lengths(rows)
    results = []
    for few in (True, False):
        with monkeypatch.context() as patch:
            patch.setattr(grouped, "wants_few_lengths", lambda rows, few=few: few)
            made = grouped_product(rows, weight, counts.cumsum(0).int())
            results.append([made, *torch.autograd.grad(made, [rows, weight], torch.ones_like(made))])
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)
