"""Products of groups of rows with a matrix for each group, as a mixture of experts needs them.

Torch has a kernel for it, whose input must be of single precision or less and lie in memory as the kernel wants it. For
everything else there is a loop over the groups. Torch sees both as one operation, so that it can be compiled, and
counted without data, whichever it is.
"""

from __future__ import annotations

from itertools import count
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from spherelm.sphere import transformed

KERNEL_BYTES = 16
"""The kernel wants rows whose length in bytes is a multiple of this."""


def free_name(name: str) -> str:
    """The name to register an operation of this module under:
    `name`, with a number if torch has one of that name already.

    This text is also part of the file that goes with an exported model, which may be loaded beside this package and
    more than once. Torch frees an operation whose name is given to another, and whoever still calls the first
    reads freed memory.
    """
    package = __name__.partition(".")[0]
    taken = getattr(torch.ops, package)
    names = (name if i == 0 else f"{name}_{i}" for i in count())
    return f"{package}::{next(each for each in names if not hasattr(taken, each))}"


@torch.library.custom_op(free_name("grouped_product"), mutates_args=())
def grouped_product(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """`rows[i] weight[g]^T` for every row i of group g: [rows, in] and [groups, out, in] -> [rows, out].

    ends: int32 [groups], ascending, where each group's rows end; the last is the number of rows. A group may be empty.
    rows and weight have one dtype, and so has the result.
    """
    product = kernel_product if has_kernel(rows, weight) else looped_product
    if not wants_few_lengths(rows):
        return product(rows, weight, ends)
    room = Room.around(ends)
    return product(room.put(rows), weight, room.ends)[room.place]


@torch.library.custom_op(free_name("grouped_product_backward"), mutates_args=())
def grouped_product_backward(grad: Tensor, rows: Tensor, weight: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of `rows` and `weight` from `grad`, that of `grouped_product`'s result."""
    backward = kernel_backward if has_kernel(rows, weight) else looped_backward
    if not wants_few_lengths(rows):
        return backward(grad.contiguous(), rows, weight, ends)
    room = Room.around(ends)
    of_rows, of_weight = backward(room.put(grad), room.put(rows), weight, room.ends)
    return of_rows[room.place], of_weight


def wants_few_lengths(rows: Tensor) -> bool:
    """Whether the product is slow for every new length of a group.

    16-bit products on a processor are oneDNN's, which compiles code for each length that it has not met
    and keeps the last
    1024. A router's groups have new lengths at every step: the compilation took ten times as long as the products
    (`benchmarks/grouped.py`).
    """
    return rows.device.type == "cpu" and rows.element_size() == 2


def rounded_up(counts: Tensor) -> Tensor:
    """Whole numbers `counts` rounded up to one of eight to an octave, by less than an eighth;
    below 64 to a multiple of 8.
    """
    unit = 2 ** (counts.clamp(min=64).log2().floor().long() - 3)
    return (counts + unit - 1) // unit * unit


class Room(NamedTuple):
    """Groups with rows of zeros at the end of each, such that their lengths are few (`rounded_up`).

    ends: int32 [groups], as `grouped_product` has them, with the zeros. place: int64 [rows], where each row is now.
    """

    ends: Tensor
    place: Tensor

    @classmethod
    def around(cls, ends: Tensor) -> Room:
        """Room for groups that end at `ends`."""
        counts = ends.diff(prepend=ends.new_zeros(1)).long()
        wide = rounded_up(counts).cumsum(0)
        moved = (wide - ends).roll(1)
        moved[0] = 0
        return cls(wide.int(), torch.arange(int(ends[-1])) + moved.repeat_interleave(counts))

    def put(self, rows: Tensor) -> Tensor:
        """`rows` [rows, width] with the zeros between them."""
        return rows.new_zeros(int(self.ends[-1]), rows.shape[1]).index_copy_(0, self.place, rows)


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
    for group, (start, end) in enumerate(slices(ends)):
        torch.mm(rows[start:end], weight[group].T, out=out[start:end])
    return out


def looped_backward(grad: Tensor, rows: Tensor, weight: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
    """`grouped_product_backward`, one group after the other."""
    of_rows, of_weight = rows.new_empty(rows.shape), weight.new_empty(weight.shape)
    for group, (start, end) in enumerate(slices(ends)):
        torch.mm(grad[start:end], weight[group], out=of_rows[start:end])
        torch.mm(grad[start:end].T, rows[start:end], out=of_weight[group])
    return of_rows, of_weight


def slices(ends: Tensor) -> list[tuple[int, int]]:
    """Where the rows of each group begin and end."""
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


def _second_backward(ctx: Any, of_grad_rows: Tensor, of_grad_weight: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
    """The gradients of `grouped_product_backward`'s arguments: each result is a product of two of the three tensors."""
    grad, rows, weight, ends = ctx.saved_tensors
    of_grad = grouped_product(of_grad_rows, weight, ends) + grouped_product(rows, of_grad_weight, ends)
    of_rows, _ = grouped_product_backward(grad, rows, of_grad_weight, ends)
    _, of_weight = grouped_product_backward(grad, of_grad_rows, weight, ends)
    return of_grad, of_rows, of_weight, None


grouped_product.register_autograd(_backward, setup_context=_keep)
grouped_product_backward.register_autograd(_second_backward, setup_context=_keep)


def product_by_groups(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """`grouped_product`, or where torch.func transforms it `plain_product`."""
    product = plain_product if transformed() else grouped_product
    return product(rows, weight, ends)


def plain_product(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """`grouped_product` by torch's plain operations, which can be transformed:
    rows times all matrices, then each row's own.
    """
    group = (torch.arange(len(rows), device=ends.device).unsqueeze(1) >= ends).sum(1)
    products = torch.einsum("ri,goi->rgo", rows, weight)
    return products.take_along_dim(group[:, None, None], dim=1).squeeze(1)
