"""The maths of the unit hypersphere: pure functions on tensors, no modules, no parameters.

Every length is reduced in float32, whatever the dtype of the input (float64 stays float64), and the
result comes back in the dtype of the input: bfloat16 lengths compound over dozens of layers.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

TINY = 1e-12
"""Vectors shorter than this are taken for zero, which stays zero instead of becoming NaN, and so does its gradient."""


def shortest(*dtypes: torch.dtype) -> float:
    """Below which length a vector of these dtypes is taken for zero:
    `TINY`, in float16 the smallest normal number, 6.1e-5.

    What is shorter has lost its digits there, and its gradient, which grows as 1 / length, would not
    fit into the format.
    """
    return max(TINY, *(torch.finfo(dtype).tiny for dtype in dtypes))


def transformed() -> bool:
    """Whether torch.func or forward-mode differentiation looks on:
    then plain operations serve, which have every derivative.
    """
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def _wide(x: Tensor) -> Tensor:
    """`x` in the dtype that lengths are computed in: float32, or float64 if it is that already."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def unit_gradient(out: Tensor, inverse: Tensor, grads: tuple[Tensor | None, ...], dim: int) -> Tensor:
    """The gradient of x, at full precision, from `grads`: of `out = x / ||x||` along `dim` and `inverse = 1 / ||x||`.

    The second is there only where the backward pass is itself differentiated, to which x is known by these two alone.
    """
    grad, grad_inverse = grads
    moved = tangent(out, _wide(torch.zeros_like(out) if grad is None else grad), dim) * inverse
    if grad_inverse is None or torch.compiler.is_compiling():
        return moved
    return moved - out * (inverse.square() * grad_inverse)


class _Norm(torch.autograd.Function):
    """`x / ||x||`, whose backward pass is `(g - o (o . g)) / ||x||` for the result o, which it keeps.

    `1 / ||x||` is given back too, for nobody but a second derivative, whose way to x leads through both.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, least: float) -> tuple[Tensor, Tensor]:
        out, inverse = _normalized(x, dim, least)
        ctx.dim = dim
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(out, inverse)
        return out, inverse

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor, None, None]:
        out, inverse = ctx.saved_tensors
        return unit_gradient(out, inverse, grad_outputs, ctx.dim).to(out.dtype), None, None


class _Step(torch.autograd.Function):
    """`Norm(h + alpha (target - h))`; of all it computes, it keeps its arguments, its result and one length a vector.

    What it gives back is as in `_Norm`.
    """

    @staticmethod
    def forward(ctx: Any, h: Tensor, target: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor]:
        moved, inverse = _moved(h, target, alpha)
        out = moved.mul_(inverse).to(h.dtype)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(h, target, alpha, inverse, out)
        return out, inverse

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        h, target, alpha, inverse, out = ctx.saved_tensors
        grad_moved = unit_gradient(out, inverse, grad_outputs, -1)
        grad_target = grad_moved * alpha
        # Narrow factors are widened within the products: a compiler would keep a copy that has the name of its own.
        grad_alpha = _summed_to(grad_moved * target - grad_moved * h, alpha.shape)
        return (grad_moved - grad_target).to(h.dtype), grad_target.to(target.dtype), grad_alpha


def inverse_length(x: Tensor, dim: int = -1, least: float = TINY) -> Tensor:
    """`1 / ||x||` of the vectors along `dim`, which stays with size 1; 0 for those no longer than `least`."""
    length = torch.linalg.vector_norm(x, dim=dim, keepdim=True)
    return torch.threshold(length, least, torch.inf).reciprocal()


def _normalized(x: Tensor, dim: int, least: float) -> tuple[Tensor, Tensor]:
    """`x / ||x||` in the dtype of `x`, and `1 / ||x||`."""
    wide = _wide(x)
    inverse = inverse_length(wide, dim, least)
    return (wide * inverse).to(x.dtype), inverse


def _moved(h: Tensor, target: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor]:
    """`h + alpha (target - h)` at full precision, and one over its length."""
    start = _wide(h)
    moved = torch.addcmul(start, _wide(target) - start, alpha)
    return moved, inverse_length(moved, -1, shortest(h.dtype, target.dtype))


def _summed_to(x: Tensor, shape: torch.Size) -> Tensor:
    """`x.sum_to_size(shape)`; down to [d] as a product with ones: compiled for a CPU, a column sum walks strided."""
    if shape != x.shape[-1:]:
        return x.sum_to_size(shape)
    rows = x.flatten(0, -2)
    return rows.new_ones(1, len(rows)).mm(rows).squeeze(0)


def norm(x: Tensor, dim: int = -1, least: float | None = None) -> Tensor:
    """Put every vector along `dim` on the unit sphere: `x / ||x||_2` (nGPT, section 2.1).

    x: any shape and floating dtype; the result has the same. A zero vector stays zero, and gets a gradient of zero; so
    does one shorter than `least`, by default what is `shortest` in the dtype of `x`.
    """
    least = shortest(x.dtype) if least is None else least
    unit: Tensor = (_normalized if transformed() else _Norm.apply)(x, dim, least)[0]
    return unit


def squared_length(w: Tensor, dim: int) -> Tensor:
    """`||w||^2` of the vectors along `dim`, which stays with size 1, in float32 (float64 for that)."""
    wide = _wide(w)
    # Torch's norm is one pass and accurate along rows; along columns it is slow and adds up errors, and a sum is
    # neither.
    if dim % w.ndim == w.ndim - 1:
        return torch.linalg.vector_norm(wide, dim=dim, keepdim=True).square()
    return wide.square().sum(dim, keepdim=True)


def retraction_factor(square: Tensor) -> Tensor:
    """The factor that makes a vector of this squared length unit; 1 where it already is, up to rounding:
    so it is idempotent.

    "Up to rounding" is within 8 units in the last place of 1, more than `norm` itself leaves.
    """
    is_unit = (square - 1).abs() <= 8 * torch.finfo(square.dtype).eps
    return square.clamp_min(TINY**2).rsqrt().masked_fill(is_unit, 1.0)


def step(h: Tensor, target: Tensor, alpha: Tensor) -> Tensor:
    """Move `h` on the sphere a part `alpha` of the way to `target`: `Norm(h + alpha (target - h))` (nGPT, eqs. 10, 11).

    h, target: [..., d] unit vectors; alpha: broadcastable, [d] in the paper, non-negative. Linear interpolation
    followed by normalization approximates `slerp` for small angles (nGPT, eqs. 6-9). Result: [..., d], unit.
    """
    if transformed():
        moved, inverse = _moved(h, target, alpha)
        return (moved * inverse).to(h.dtype)
    out: Tensor = _Step.apply(h, target, alpha)[0]
    return out


def riemannian_step(h: Tensor, target: Tensor, alpha: Tensor) -> Tensor:
    """The step along the tangent at `h`: `Norm(h - alpha (h (h . target) - target))` (nGPT, appendix, eqs. 24-26).

    Shapes as in `step`.
    """
    start, end = _wide(h), _wide(target)
    along = (start * end).sum(-1, keepdim=True)
    return norm(start - alpha * (start * along - end), least=shortest(h.dtype, target.dtype)).to(h.dtype)


def slerp(a: Tensor, b: Tensor, t: float | Tensor) -> Tensor:
    """Spherical linear interpolation: the point a part `t` of the way along the great circle from `a` to
    `b` (nGPT, eq. 6).

    a, b: [..., d] unit vectors that are not antipodal. Equal points give that point.
    """
    start, end = _wide(a), _wide(b)
    between = angle(start, end).unsqueeze(-1)
    sine = between.sin()
    safe = sine.clamp_min(TINY)
    weights = torch.sin((1 - t) * between) / safe, torch.sin(t * between) / safe
    straight = norm(start + t * (end - start))
    return torch.where(sine < 1e-6, straight, weights[0] * start + weights[1] * end).to(a.dtype)


def tangent(w: Tensor, g: Tensor, dim: int = -1) -> Tensor:
    """The part of `g` that is tangent to the sphere at the unit vectors `w` along `dim`: `g - (w . g) w`.

    Result: the shape and dtype of `g`, orthogonal to `w` along `dim`.
    """
    wide = _wide(g)
    return (wide - w * (w * wide).sum(dim, keepdim=True)).to(g.dtype)


def angle(a: Tensor, b: Tensor, dim: int = -1) -> Tensor:
    """The angle in radians between unit vectors along `dim`, in [0, pi], of zero vectors 0; that dimension is removed.

    `2 atan2(||a - b||, ||a + b||)` (Kahan) is accurate everywhere; `acos(a . b)` loses half its digits near 0 and pi.
    """
    start, end = _wide(a), _wide(b)
    apart = torch.linalg.vector_norm(start - end, dim=dim)
    together = torch.linalg.vector_norm(start + end, dim=dim)
    nowhere = (apart == 0) & (together == 0)
    return 2 * torch.atan2(apart, together.masked_fill(nowhere, 1))


def capped_move(old: Tensor, new: Tensor, max_angle: float, dim: int = -1) -> Tensor:
    """Where an update from unit vectors `old` to candidates `new` ends if no vector may turn by more than `max_angle`.

    The angular step cap of "Training nGPT" (arXiv 2608.01284): with `t` the tangent part of the candidate and
    `phi = atan2(||t||, old . new)`, a vector with `phi > max_angle` lands at `cos(max_angle) old + sin(max_angle)
    t/||t||`; any other keeps its candidate, of whatever length, to be renormalized. The opposite point, to rounding,
    leaves no direction to turn in: such a vector stays where it was.

    old, new: the same shape, vectors along `dim`; max_angle: radians.
    """
    start, end = norm(_wide(old), dim), _wide(new)  # a unit vector in half precision is none in this
    along = (start * end).sum(dim, keepdim=True)
    across = end - along * start
    across = across - (start * across).sum(dim, keepdim=True) * start  # what rounding left, where the candidate is long
    length = torch.linalg.vector_norm(across, dim=dim, keepdim=True)
    landed = math.cos(max_angle) * start + math.sin(max_angle) * across / length.clamp_min(TINY)
    rounding = torch.finfo(end.dtype).eps * torch.linalg.vector_norm(end, dim=dim, keepdim=True)
    landed = torch.where(length > rounding, landed, start)
    return torch.where(torch.atan2(length, along) > max_angle, landed, end).to(new.dtype)
