"""Rotary position embedding: channel i is paired with channel i + d_k/2, as Llama does in Hugging Face transformers.

Beside it the formula of NVIDIA/ngpt's code, which is not a rotation: what its checkpoints were trained with; and no
rotation at all. Which of them a model uses is decided where it is built, by a name in `ROPES`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from spherelm.sphere import inverse_length, norm, shortest, transformed, unit_gradient

RotaryTable = tuple[Tensor, Tensor]
"""cos and sin, each [seq, d_k/2] (or [batch, 1, seq, d_k/2] where sequences start at different positions)."""

Rotation = Callable[[Tensor, RotaryTable], Tensor]
"""A function that encodes positions in queries and keys [batch, heads, seq, d_k]: `rotate`, for instance."""

MakeTable = Callable[[Tensor, int, float], RotaryTable]
"""(positions, d_k, base) -> table: what a model calls once a pass."""


def angles(positions: Tensor, d_k: int, base: float) -> Tensor:
    """Every position's rotation angles in radians, `position * base^(-2i/d_k)`: [..., seq] -> [..., seq, d_k/2]."""
    exponents = torch.arange(0, d_k, 2, device=positions.device, dtype=positions.dtype) / d_k
    return positions.unsqueeze(-1) * torch.pow(base, -exponents)


def rotary_table(positions: Tensor, d_k: int, base: float) -> RotaryTable:
    """The cosines and sines of every position's rotation angles (Su et al., arXiv 2104.09864).

    positions: floating point [..., seq], in the dtype the angles shall have (float32 or float64); d_k: even channels
    per head. Computed at each forward pass (a few thousand angles), so there is no table to outgrow or to load wrongly.
    """
    turns = angles(positions, d_k, base)
    return turns.cos(), turns.sin()


def rotate(x: Tensor, table: RotaryTable) -> Tensor:
    """Rotate every pair of channels (i, i + d_k/2) of `x` by its position's angle; lengths do not change.

    x: [batch, heads, seq, d_k]; the result has the dtype of `x`, the rotation is computed in that of the table.
    """
    cos, sin = table
    if transformed() or torch.compiler.is_compiling() or cos.requires_grad or sin.requires_grad:
        first, second = x.to(cos.dtype).chunk(2, dim=-1)
        turned = torch.addcmul(first * cos, second, sin, value=-1), torch.addcmul(second * cos, first, sin)
        return torch.cat(turned, dim=-1).to(x.dtype)
    rotated: Tensor = _Rotation.apply(x, cos, sin)
    return rotated


class _Rotation(torch.autograd.Function):
    """`rotate` without its intermediate results: both halves are written where they belong,
    and the way back is a rotation.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        wide = x.to(cos.dtype)
        out = wide.new_empty(wide.shape)
        (first, second), (to_first, to_second) = wide.chunk(2, dim=-1), out.chunk(2, dim=-1)
        torch.mul(first, cos, out=to_first).addcmul_(second, sin, value=-1)
        torch.mul(second, cos, out=to_second).addcmul_(first, sin)
        return out.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return rotate(grad_outputs[0], (cos, -sin)), None, None


def _unit_rotated(x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """`rotate(Norm(x))` in the dtype of `x`, and `1 / ||x||`."""
    wide = x.to(cos.dtype)
    inverse = inverse_length(wide, -1, shortest(x.dtype))
    return (rotate(wide, (cos, sin)) * inverse).to(x.dtype), inverse


class _UnitRotation(torch.autograd.Function):
    """`rotate(Norm(x))` in one pass; keeps its result, which attention keeps anyway, and one length a vector.

    What it gives back is as in `sphere`'s `_Norm`.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        out, inverse = _unit_rotated(x, cos, sin)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(out, inverse, cos, sin)
        return out, inverse

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor | None]:
        out, inverse, cos, sin = ctx.saved_tensors
        back = (cos, -sin)
        of_x = rotate(unit_gradient(out, inverse, grad_outputs, -1), back).to(out.dtype)
        grad = grad_outputs[0]
        if grad is None or not any(ctx.needs_input_grad[1:]):
            return of_x, None, None
        return of_x, *_table_gradient(rotate(out.to(cos.dtype), back), grad.to(cos.dtype), cos.shape)


def _table_gradient(x: Tensor, grad: Tensor, shape: torch.Size) -> tuple[Tensor, Tensor]:
    """The gradients of cos and sin, each of `shape`, from that of `rotate(x, (cos, sin))`."""
    (first, second), (grad_first, grad_second) = x.chunk(2, dim=-1), grad.chunk(2, dim=-1)
    of_cos, of_sin = grad_first * first + grad_second * second, grad_second * first - grad_first * second
    return of_cos.sum_to_size(shape), of_sin.sum_to_size(shape)


def unit_rotate(x: Tensor, table: RotaryTable) -> Tensor:
    """`rotate(Norm(x))`, which is `Norm(rotate(x))`: a rotation keeps lengths. Shapes and dtypes as in `rotate`."""
    out: Tensor = (_unit_rotated if transformed() else _UnitRotation.apply)(x, *table)[0]
    return out


def nvidia_table(positions: Tensor, d_k: int, base: float) -> RotaryTable:
    """NVIDIA/ngpt's cosines and sines, arguments and shapes as in `rotary_table`.

    Its table holds sines in the even and cosines in the odd columns, and is then cut in the middle as if the sines came
    first: so the "sines" are sines and cosines of the fast half of the angles, the "cosines" those of the slow half.
    """
    turns = angles(positions, d_k, base)
    sin, cos = torch.stack((turns.sin(), turns.cos()), dim=-1).flatten(-2).chunk(2, dim=-1)
    return cos, sin


def nvidia_rotate(x: Tensor, table: RotaryTable) -> Tensor:
    """NVIDIA/ngpt's formula for queries and keys: neighbours (x_2i, x_2i+1) become (-x_2i+1 cos_i, x_2i sin_i).

    Not a rotation: a rotation would add (x_2i cos_i, x_2i+1 cos_i) to (-x_2i+1 sin_i, x_2i sin_i). Lengths change, and
    the score of a query and a key depends on where they stand and not on their distance alone. Dtypes as in `rotate`.
    """
    cos, sin = table
    wide = x.to(cos.dtype)
    return torch.stack((-wide[..., 1::2] * cos, wide[..., ::2] * sin), dim=-1).flatten(-2).to(x.dtype)


def unit_nvidia_rotate(x: Tensor, table: RotaryTable) -> Tensor:
    """`Norm(nvidia_rotate(x))`: since the formula is linear, what it is of `Norm(x)` as well."""
    return norm(nvidia_rotate(x, table))


def no_table(positions: Tensor, d_k: int, base: float) -> RotaryTable:
    """In place of a table where there is no rotation; arguments as in `rotary_table`."""
    return positions, positions


def unrotated(x: Tensor, table: RotaryTable) -> Tensor:
    """`x`: no position is put into it. Attention then knows of order only what the causal mask
    and other layers tell.
    """
    return x


def unit_unrotated(x: Tensor, table: RotaryTable) -> Tensor:
    """`Norm(x)`."""
    return norm(x)


@dataclass(frozen=True)
class Rope:
    """A way to put positions into queries and keys: what is computed once a pass, and what is done with it.

    unit_rotation: `Norm(rotation(x))`.
    """

    table: MakeTable
    rotation: Rotation
    unit_rotation: Rotation


ROPES = {
    "standard": Rope(rotary_table, rotate, unit_rotate),
    "nvidia": Rope(nvidia_table, nvidia_rotate, unit_nvidia_rotate),
    "none": Rope(no_table, unrotated, unit_unrotated),
}
"""By the name that a config's field `rope` has."""


def interpolated(table: MakeTable, factor: float) -> MakeTable:
    """`table` with every position divided by `factor`: position interpolation (Chen et al., arXiv 2306.15595)."""
    return partial(_interpolated_table, table, factor)


def _interpolated_table(table: MakeTable, factor: float, positions: Tensor, d_k: int, base: float) -> RotaryTable:
    return table(positions / factor, d_k, base)


def yarn(factor: float, trained_length: int) -> MakeTable:
    """The standard table with the frequencies of YaRN (Peng et al., arXiv 2309.00071, "NTK-by-parts").

    Pairs that turn more than 32 times within `trained_length` positions keep their frequency, those that turn less
    than once have it divided by `factor`; in between the two are mixed, linearly in the pair's number, as in
    the authors' code. Its attention temperature is `yarn_temperature`.
    """
    return partial(_yarn_table, factor, trained_length)


def _yarn_table(factor: float, trained_length: int, positions: Tensor, d_k: int, base: float) -> RotaryTable:
    # The numbers (not whole) of the pairs that turn so many times within the trained length.
    fastest, slowest = (
        d_k * math.log(trained_length / (2 * math.pi * turns)) / (2 * math.log(base)) for turns in (32, 1)
    )
    first, last = max(math.floor(fastest), 0), min(math.ceil(slowest), d_k - 1)
    pairs = torch.arange(d_k // 2, device=positions.device, dtype=positions.dtype)
    slowed = ((pairs - first) / max(last - first, 1e-3)).clamp(0, 1)
    turns = angles(positions, d_k, base) * (1 - slowed + slowed / factor)
    return turns.cos(), turns.sin()


def yarn_temperature(factor: float) -> float:
    """YaRN's factor of every attention score, `(0.1 ln(factor) + 1)^2`; 1 for factor 1 or less.

    Other code puts its root on cosines and sines. nGPT normalizes queries and keys after the rotation, which would take
    it out again: it belongs on the scores.
    """
    return (0.1 * math.log(max(factor, 1.0)) + 1) ** 2
