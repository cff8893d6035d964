"""`sphere.norm` and `sphere.step` as hand-written Triton kernels, forward and backward, for CUDA without torch.compile.

Same arguments, results and autograd as there, along the last axis. Each row is read once and written once a pass;
lengths are float32. Second derivatives are computed by `sphere`'s own passes, and by `sphere` what torch.func
transforms. Not timed: no GPU was at hand. Tested against `sphere` in Triton's interpreter on a CPU
(TRITON_INTERPRET=1).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from spherelm import sphere
from spherelm.sphere import shortest, transformed

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError(
        "spherelm.layers.triton_sphere needs triton: pip install '.[triton]' in a clone of spherelm"
    ) from error

PROGRAMS = 256
"""How many programs share the rows in the backward pass of a step, each with a sum for alpha of its own."""


@triton.jit
def _unit_row(x, width, offsets, tiny):
    length = tl.sqrt(tl.sum(tl.where(offsets < width, x * x, 0.0), axis=0))
    inverse = tl.where(length < tiny, 0.0, 1.0 / tl.maximum(length, tiny))
    return x * inverse, inverse


@triton.jit
def _tangent_row(out, grad, inverse):
    return (grad - out * tl.sum(out * grad, axis=0)) * inverse


@triton.jit
def _norm_forward(x, out, inverses, width, tiny, size: tl.constexpr):
    row, offsets = tl.program_id(0).to(tl.int64), tl.arange(0, size)
    inside = offsets < width
    vector = tl.load(x + row * width + offsets, mask=inside, other=0.0).to(tl.float32)
    unit, inverse = _unit_row(vector, width, offsets, tiny)
    tl.store(out + row * width + offsets, unit, mask=inside)
    tl.store(inverses + row, inverse)


@triton.jit
def _norm_backward(out, grad, inverses, grad_x, width, size: tl.constexpr):
    row, offsets = tl.program_id(0).to(tl.int64), tl.arange(0, size)
    inside = offsets < width
    unit = tl.load(out + row * width + offsets, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(grad + row * width + offsets, mask=inside, other=0.0).to(tl.float32)
    tl.store(grad_x + row * width + offsets, _tangent_row(unit, g, tl.load(inverses + row)), mask=inside)


@triton.jit
def _step_forward(h, target, alpha, out, inverses, width, tiny, size: tl.constexpr):
    row, offsets = tl.program_id(0).to(tl.int64), tl.arange(0, size)
    inside = offsets < width
    start = tl.load(h + row * width + offsets, mask=inside, other=0.0).to(tl.float32)
    end = tl.load(target + row * width + offsets, mask=inside, other=0.0).to(tl.float32)
    moved = start + tl.load(alpha + offsets, mask=inside, other=0.0).to(tl.float32) * (end - start)
    unit, inverse = _unit_row(moved, width, offsets, tiny)
    tl.store(out + row * width + offsets, unit, mask=inside)
    tl.store(inverses + row, inverse)


@triton.jit
def _step_backward(
    h, target, alpha, inverses, grad, grad_h, grad_target, alpha_sums, rows, width, programs, size: tl.constexpr
):
    first, offsets = tl.program_id(0).to(tl.int64), tl.arange(0, size)
    inside = offsets < width
    part = tl.load(alpha + offsets, mask=inside, other=0.0).to(tl.float32)
    total = tl.zeros((size,), dtype=tl.float32)
    for row in range(first, rows, programs):
        start = tl.load(h + row * width + offsets, mask=inside, other=0.0).to(tl.float32)
        end = tl.load(target + row * width + offsets, mask=inside, other=0.0).to(tl.float32)
        g = tl.load(grad + row * width + offsets, mask=inside, other=0.0).to(tl.float32)
        inverse = tl.load(inverses + row)
        # The result again, at full precision: the stored one may be bfloat16.
        moved = _tangent_row((start + part * (end - start)) * inverse, g, inverse)
        total += moved * (end - start)
        tl.store(grad_target + row * width + offsets, moved * part, mask=inside)
        tl.store(grad_h + row * width + offsets, moved - moved * part, mask=inside)
    tl.store(alpha_sums + first * width + offsets, total, mask=inside)


def _rows(x: Tensor | None) -> tuple[Tensor, int, int, int]:
    """`x` with its rows concatenated, how many there are, how wide, and the power of two that holds one."""
    assert x is not None
    width = x.shape[-1]
    return x.contiguous(), x.numel() // width, width, triton.next_power_of_2(width)


def _lengths(x: Tensor) -> Tensor:
    """Room for one length a row of `x`."""
    return torch.empty(*x.shape[:-1], 1, dtype=torch.float32, device=x.device)


def _differentiated(grads: tuple[Tensor | None, ...]) -> bool:
    """Whether a backward pass is itself differentiated:
    is to be, or is now, through the lengths that it was given back.
    """
    return torch.is_grad_enabled() or grads[0] is None or grads[1] is not None


class _TritonNorm(sphere._Norm):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, least: float) -> tuple[Tensor, Tensor]:
        x, rows, width, size = _rows(x)
        out, inverses = torch.empty_like(x), _lengths(x)
        _norm_forward[(rows,)](x, out, inverses, width, least, size=size)
        ctx.dim = dim
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(out, inverses)
        return out, inverses

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor, None, None]:
        if _differentiated(grad_outputs):
            return sphere._Norm.backward(ctx, *grad_outputs)
        out, inverses = ctx.saved_tensors
        grad, rows, width, size = _rows(grad_outputs[0])
        grad_x = torch.empty_like(grad)
        _norm_backward[(rows,)](out, grad, inverses, grad_x, width, size=size)
        return grad_x, None, None


class _TritonStep(sphere._Step):
    @staticmethod
    def forward(ctx: Any, h: Tensor, target: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor]:
        (h, rows, width, size), target, alpha = _rows(h), target.contiguous(), alpha.contiguous()
        out, inverses = torch.empty_like(h), _lengths(h)
        _step_forward[(rows,)](h, target, alpha, out, inverses, width, shortest(h.dtype), size=size)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(h, target, alpha, inverses, out)
        return out, inverses

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        if _differentiated(grad_outputs):
            return sphere._Step.backward(ctx, *grad_outputs)
        h, target, alpha, inverses, _ = ctx.saved_tensors
        grad, rows, width, size = _rows(grad_outputs[0])
        programs = min(rows, PROGRAMS)
        grad_h, grad_target = torch.empty_like(h), torch.empty_like(target)
        sums = torch.empty(programs, width, dtype=torch.float32, device=h.device)
        results = grad_h, grad_target, sums
        _step_backward[(programs,)](h, target, alpha, inverses, grad, *results, rows, width, programs, size=size)
        return grad_h, grad_target, sums.sum(0).to(alpha.dtype)


def norm(x: Tensor) -> Tensor:
    """`sphere.norm` along the last axis; float32, bfloat16 or float16."""
    unit: Tensor = sphere.norm(x) if transformed() else _TritonNorm.apply(x, -1, shortest(x.dtype))[0]
    return unit


def step(h: Tensor, target: Tensor, alpha: Tensor) -> Tensor:
    """`sphere.step`; h, target: [..., d], alike in shape and dtype; alpha: [d].
    Raises `ValueError` for another alpha.
    """
    if alpha.shape != h.shape[-1:] or target.shape != h.shape:
        raise ValueError(
            f"the Triton step takes h and target alike and alpha [{h.shape[-1]}], got {tuple(h.shape)}, "
            f"{tuple(target.shape)} and {tuple(alpha.shape)}: use spherelm.sphere.step"
        )
    moved: Tensor = sphere.step(h, target, alpha) if transformed() else _TritonStep.apply(h, target, alpha)[0]
    return moved
