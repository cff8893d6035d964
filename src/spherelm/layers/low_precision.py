"""Products of matrices with operands of 8 or 4 bits, emulated:
rounded, read back, multiplied in the dtype of the input.

fp8 and mxfp8 are torchao's. nvfp4 is written out, since torchao has its stochastic rounding and its Hadamard transform
for GPUs alone; where it rounds to the nearest, a test holds it to torchao's to the last bit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import reduce
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from spherelm.errors import UserError
from spherelm.fields import check
from spherelm.layers.grouped import slices
from spherelm.third_parties import silenced


@dataclass(frozen=True)
class Precision:
    """The number format of the operands of products with the blocks' matrices; everything else is in the compute dtype.

    Attributes:
        kind: fp8: one scale a tensor. mxfp8: a power of two for 32 numbers. nvfp4: 4 bits, a scale for 16 numbers and
            one for the tensor. null: no such format.
        inputs: Whether the inputs of these products are rounded.
        weights: Whether the matrices are rounded.
        gradients: Whether the gradients of the results are rounded.
        amax: The largest entry that nvfp4's scale of a tensor supposes. unit: 1 for unit weights and inputs that are
            unit vectors, else measured; measured: always; one: 1 for all weights and inputs. Gradients
            are always measured.
        hadamard: Whether both operands of the weights' gradients pass a random Hadamard transform (nvfp4).
        stochastic: Whether gradients are rounded at random, right on average (nvfp4).
    """

    kind: Literal["fp8", "mxfp8", "nvfp4"] | None = None
    inputs: bool = True
    weights: bool = True
    gradients: bool = True
    amax: Literal["unit", "measured", "one"] = "unit"
    hadamard: bool = False
    stochastic: bool = True

    def __post_init__(self) -> None:
        check(self)


BLOCKS: Mapping[str, int] = {"fp8": 1, "mxfp8": 32, "nvfp4": 16}
"""By format, how many numbers along the contraction share a scale."""

E2M1_LARGEST = 6.0
"""Of E2M1, whose magnitudes are 0, 0.5, 1, 1.5, 2, 3, 4 and 6."""

E4M3 = torch.finfo(torch.float8_e4m3fn)
SMALLEST_AMAX = 1e-30
"""In place of the largest entry of zeros, so that the scale has an inverse."""


def torchao(purpose: str) -> Any:
    """The package, with what is used of it; raises `UserError` saying that `purpose` needs it if it is missing."""
    try:
        with silenced():  # on import it logs which kernels for GPUs it was built without
            import torchao.float8.float8_scaling_utils  # type: ignore[import-untyped]
            import torchao.prototype.mx_formats.mx_tensor  # type: ignore[import-untyped]
            import torchao.quantization  # type: ignore[import-untyped]
    except ImportError as error:
        raise UserError(f"{purpose} needs torchao: pip install '.[quantize]' in a clone of spherelm") from error
    return torchao


def to_fp8(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x` in 8 bits of the format `dtype` with one scale, read back:
    the largest entry becomes the largest of the format.
    """
    ao = torchao("fp8").float8
    config = ao.float8_training_tensor.LinearMMConfig()
    packed: Tensor = ao.float8_scaling_utils.hp_tensor_to_float8_dynamic(x, dtype, config)
    back: Tensor = packed.to_original_precision()  # type: ignore[attr-defined]
    return back


def to_mxfp8(x: Tensor) -> Tensor:
    """`x` [rows, n] as E4M3 with a power of two for each 32 numbers of a row, read back (OCP Microscaling, 2023)."""
    tensor = torchao("mxfp8").prototype.mx_formats.mx_tensor.MXTensor
    back: Tensor = tensor.to_mx(x.contiguous(), torch.float8_e4m3fn, BLOCKS["mxfp8"]).dequantize(x.dtype)
    return back


def to_nvfp4(x: Tensor, amax: Tensor | None = None, noise: torch.Generator | None = None) -> Tensor:
    """`x` [rows, n] as E2M1, with an E4M3 scale for each 16 numbers of a row and a float32 one for all, read back.

    amax: what the scale for all supposes as the largest entry, over 6 * 448; measured if left out. Larger
    entries are cut off
    there. noise: what stochastic rounding draws from; without it every number is torchao's `NVFP4Tensor.to_nvfp4`, in a
    seventh of the time.
    """
    largest = x.abs().amax() if amax is None else amax
    of_all = largest.float().clamp_min(SMALLEST_AMAX) / (E2M1_LARGEST * E4M3.max)
    blocks = x.float().unflatten(-1, (-1, BLOCKS["nvfp4"]))
    scales = (blocks.abs().amax(-1, keepdim=True) / E2M1_LARGEST / of_all).clamp_(E4M3.tiny, E4M3.max)
    scales = scales.to(torch.float8_e4m3fn).float()
    return (to_e2m1(blocks * (1 / of_all / scales), noise) * (of_all * scales)).flatten(-2).to(x.dtype)


def to_e2m1(x: Tensor, noise: torch.Generator | None = None) -> Tensor:
    """Each number of float32 `x` as the nearest of E2M1, of two as near as each other the one with an even code.

    noise: what to draw from; then it is one of the two around the number, the nearer the likelier, so that the mean is
    `x`. Beyond 6 it is 6.
    """
    # Half of the power of two below: what lies between neighbours, but below 1, where it is as between 1 and 2.
    step = (x.view(torch.int32) & 0x7F800000).view(torch.float32).clamp_(min=1).mul_(0.5)
    steps = x / step
    if noise is None:
        steps.round_()
    else:
        steps.add_(torch.rand(x.shape, generator=noise, device=x.device)).floor_()
    return steps.mul_(step).clamp_(-E2M1_LARGEST, E2M1_LARGEST)


def hadamard(signs: Tensor) -> Tensor:
    """The orthogonal matrix [16, 16] of a Hadamard transform behind random `signs` [16]."""
    two = torch.tensor([[1.0, 1.0], [1.0, -1.0]], device=signs.device)
    return signs.unsqueeze(1) * reduce(torch.kron, [two] * 4) / 4


class LowPrecisionProduct:
    """`scale * (x W^T)` with rounded operands, forward and backward: in place of `linear.folded_product`.

    Each operand is rounded along the axis that its product contracts: x and W over in_features; backward, the gradient
    and W over out_features, the gradient and x over tokens, which zeros fill up to whole blocks. The matrix is rounded
    without the scale, which multiplies the result. unit_inputs, unit_weights: whether their entries are at most 1.
    noise: what stochastic rounding draws from.
    """

    def __init__(self, precision: Precision, unit_inputs: bool, unit_weights: bool, noise: torch.Generator) -> None:
        assert precision.kind is not None
        self.precision, self.noise = precision, noise
        ones = {"unit": (unit_inputs, unit_weights), "measured": (False, False), "one": (True, True)}[precision.amax]
        self.is_one = {"inputs": ones[0], "weights": ones[1], "gradients": False}
        signs = torch.ones(BLOCKS["nvfp4"], device=noise.device)
        if precision.hadamard:
            signs = torch.randint(0, 2, signs.shape, generator=noise, device=noise.device) * 2.0 - 1
        self.rotation = hadamard(signs) if precision.hadamard else None

    def __call__(self, x: Tensor, weight: Tensor, scale: Tensor | None = None) -> Tensor:
        """[..., in_features], [out_features, in_features] and [out_features] -> [..., out_features]."""
        y: Tensor = _Rounded.apply(x, weight, self)
        return y if scale is None else y * scale.to(y.dtype)

    def rounded(self, operand: str, x: Tensor, dtype: torch.dtype, turned: bool = False) -> Tensor:
        """An operand [rows, contracted] in few bits, or as it is where that is not rounded;
        the result is of `dtype`.
        """
        kind = self.precision.kind
        if not getattr(self.precision, operand) or not x.numel():
            return x.to(dtype)
        if kind == "fp8":
            return to_fp8(x, torch.float8_e5m2 if operand == "gradients" else torch.float8_e4m3fn).to(dtype)
        if kind == "mxfp8":
            return to_mxfp8(x).to(dtype)
        noise = self.noise if operand == "gradients" and self.precision.stochastic else None
        # Sixteen entries of 1 that are turned may become one of 4.
        amax = x.new_ones(()) if self.is_one[operand] and not turned else None
        return to_nvfp4(x, amax, noise).to(dtype)

    def over_tokens(self, x: Tensor) -> Tensor:
        """`x` [tokens, features] as [features, tokens], filled up to whole blocks,
        and turned where that is asked for.
        """
        blocks = F.pad(x.T, (0, -len(x) % BLOCKS[str(self.precision.kind)]))
        if self.rotation is None:
            return blocks
        parts = blocks.unflatten(-1, (-1, BLOCKS["nvfp4"]))
        return (parts @ self.rotation.to(parts.dtype)).flatten(-2)


class _Rounded(torch.autograd.Function):
    """`LowPrecisionProduct` without the scale; its gradient is that of no function,
    so that there are no second ones.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, how: LowPrecisionProduct) -> Tensor:
        ctx.how = how
        ctx.save_for_backward(x, weight)
        rows = how.rounded("inputs", x.flatten(0, -2), x.dtype)
        return F.linear(rows, how.rounded("weights", weight, x.dtype)).unflatten(0, x.shape[:-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (x, weight), how, grad = ctx.saved_tensors, ctx.how, grad_outputs[0].flatten(0, -2)
        of_x = of_weight = None
        if ctx.needs_input_grad[0]:
            rows = how.rounded("gradients", grad, grad.dtype)
            of_x = F.linear(rows, how.rounded("weights", weight.T, grad.dtype)).view_as(x)
        if ctx.needs_input_grad[1]:
            turned = how.rotation is not None
            rows = how.rounded("gradients", how.over_tokens(grad), grad.dtype, turned)
            columns = how.rounded("inputs", how.over_tokens(x.flatten(0, -2)), grad.dtype, turned)
            of_weight = F.linear(rows, columns).to(weight.dtype)
        return of_x, of_weight, None


def by_groups(product: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`product`, of one matrix, for rows of groups that each have a matrix of their own:
    in place of `folded_groups`.
    """

    def of_groups(rows: Tensor, weight: Tensor, ends: Tensor, scale: Tensor | None = None) -> Tensor:
        scales = [None] * len(weight) if scale is None else scale
        return torch.cat(
            [
                product(rows[start:end], matrix, own)
                for (start, end), matrix, own in zip(slices(ends), weight, scales, strict=True)
            ]
        )

    return of_groups
