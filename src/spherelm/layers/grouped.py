"""Products of groups of rows with a matrix for each group, as a mixture of experts needs them.

Torch has a kernel for it, whose input must be of single precision or less and lie in memory as the kernel wants it. For
everything else there is a loop over the groups. Torch is told of both as one operation, so that it can be compiled, and
counted without data, whichever it is.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

KERNEL_BYTES = 16
"""The kernel wants rows whose length in bytes is a multiple of this."""


@torch.library.custom_op("spherelm::grouped_product", mutates_args=())
def grouped_product(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """`rows[i] weight[g]^T` for every row i of group g: [rows, in] and [groups, out, in] -> [rows, out].

    ends: int32 [groups], ascending, where each group's rows end; the last is the number of rows. A group may be empty. rows and
    weight have one dtype, and so has the result.
    """
    return kernel_product(rows, weight, ends) if has_kernel(rows, weight) else looped_product(rows, weight, ends)


@torch.library.custom_op("spherelm::grouped_product_backward", mutates_args=())
def grouped_product_backward(grad: Tensor, rows: Tensor, weight: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of `rows` and `weight` from `grad`, that of `grouped_product`'s result."""
    backward = kernel_backward if has_kernel(rows, weight) else looped_backward
    return backward(grad.contiguous(), rows, weight, ends)


def has_kernel(rows: Tensor, weight: Tensor) -> bool:
    """Whether torch's kernel takes these: it is the faster one, where there is any."""
    kinds = (torch.bfloat16,) if rows.device.type == "cuda" else (torch.float32, torch.bfloat16, torch.float16)
    aligned = all(size * rows.element_size() % KERNEL_BYTES == 0 for size in weight.shape[1:])
    return hasattr(F, "grouped_mm") and rows.dtype in kinds and aligned


def kernel_product(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """`grouped_product` by torch's kernel."""
    return F.grouped_mm(rows, weight.transpose(1, 2), offs=ends)


def kernel_backward(grad: Tensor, rows: Tensor, weight: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
    """`grouped_product_backward` by torch's kernel."""
    return F.grouped_mm(grad, weight, offs=ends), F.grouped_mm(grad.T, rows, offs=ends)


def looped_product(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """`grouped_product`, one group after the other."""
    out = rows.new_empty(rows.shape[0], weight.shape[1])
    for group, (start, end) in enumerate(_slices(ends)):
        torch.mm(rows[start:end], weight[group].T, out=out[start:end])
    return out


def looped_backward(grad: Tensor, rows: Tensor, weight: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
    """`grouped_product_backward`, one group after the other."""
    of_rows, of_weight = rows.new_empty(rows.shape), weight.new_empty(weight.shape)
    for group, (start, end) in enumerate(_slices(ends)):
        torch.mm(grad[start:end], weight[group], out=of_rows[start:end])
        torch.mm(grad[start:end].T, rows[start:end], out=of_weight[group])
    return of_rows, of_weight


def _slices(ends: Tensor) -> list[tuple[int, int]]:
    found = ends.tolist()
    return list(zip([0, *found[:-1]], found, strict=True))


@grouped_product.register_fake
def _shape(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    return rows.new_empty(rows.shape[0], weight.shape[1])


@grouped_product_backward.register_fake
def _shapes(grad: Tensor, rows: Tensor, weight: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
    return rows.new_empty(rows.shape), weight.new_empty(weight.shape)


def _keep(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
    return (*grouped_product_backward(grad, *ctx.saved_tensors), None)


grouped_product.register_autograd(_backward, setup_context=_keep)
