"""Both ways to multiply groups of rows are the product group by group, forward and backward."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from spherelm.layers import grouped
from spherelm.layers.grouped import grouped_product, has_kernel

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
