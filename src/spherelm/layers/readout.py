"""From the last hidden state to logits: the matrix, the learned scale of each of its rows,
and how gradients come back.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from spherelm.layers.linear import Linear


class Readout(NamedTuple):
    """Features [..., d_model], and the matrix [vocab, d_model] that turns them into logits.

    pullback: [vocab, d_model], what carries the gradient of the logits back to the features, where not
    the matrix itself.
    """

    features: Tensor
    weight: Tensor
    pullback: Tensor | None = None


def read_logits(readout: Readout) -> Tensor:
    """[..., vocab] in the dtype of the features."""
    features, weight, pullback = readout
    if pullback is None:
        return F.linear(features, weight.to(features.dtype))
    product: Tensor = _PulledLinear.apply(features, weight.to(features.dtype), pullback.to(features.dtype))
    return product


class _OnlyFirst(Function):
    """Hands on a gradient that is the derivative of nothing, of the tensors `of`, and refuses to be differentiated.

    To differentiate such a gradient means to go through the pass that made it, where the true derivative were needed.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(gradient: Tensor, *of: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        raise RuntimeError(
            "logit_preconditioning defines a gradient that has no second derivatives: "
            "build the model with logit_preconditioning=0, whose logits are the same, and load its weights"
        )


def _only_first(gradient: Tensor, *of: Tensor) -> Tensor:
    """`gradient`, refusing second derivatives where they could follow."""
    handed: Tensor = (
        _OnlyFirst.apply(gradient, *of) if torch.is_grad_enabled() and not torch.compiler.is_compiling() else gradient
    )
    return handed


class _PulledLinear(Function):
    """`x W^T`, whose gradient with respect to x goes through another matrix than W."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor, pullback: Tensor) -> Tensor:
        return F.linear(x, weight)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        x, _, pullback = inputs
        ctx.save_for_backward(x, pullback)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, None]:
        x, pullback = ctx.saved_tensors
        (grad,) = grad_outputs
        of_weight = grad.flatten(0, -2).T @ x.flatten(0, -2)
        return _only_first(grad @ pullback, grad, x), _only_first(of_weight, grad, x), None


class _PreconditionedRows(Function):
    """`s W` row by row, whose gradient with respect to W is `c` times that of the product instead of `s` times."""

    generate_vmap_rule = True

    @staticmethod
    def forward(weight: Tensor, s: Tensor, c: Tensor) -> Tensor:
        return weight * s.unsqueeze(-1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        weight, _, c = inputs
        ctx.save_for_backward(weight, c)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, None]:
        weight, c = ctx.saved_tensors
        (grad,) = grad_outputs
        of_s = (grad * weight).sum(-1)
        return _only_first(grad * c.unsqueeze(-1), grad, weight), _only_first(of_s, grad, weight), None


def scaled(features: Tensor, head: Linear, s_z: Tensor) -> Readout:
    """Logits `z = s_z (h E_out^T)` (nGPT, eq. 3): the scale [vocab] is folded into the rows of the matrix."""
    return Readout(features, head.scaled_weight(s_z).to(features.dtype))


def preconditioner(s_z: Tensor, q: float) -> Tensor:
    """`(s_z / mean(s_z))^q`, [vocab], a constant to autograd; the power of a negative quotient keeps its sign."""
    quotient = s_z.detach() / s_z.detach().mean()
    return quotient.sign() * quotient.abs() ** q


def preconditioned(features: Tensor, head: Linear, s_z: Tensor, q: float) -> Readout:
    """Logits as `scaled` has them, `z = s_z u` of the cosines u,
    with logit gradient preconditioning (arXiv 2608.01284).

    Backward, `dL/du = (s_z / mean(s_z))^q dL/dz` instead of `s_z dL/dz`: the size of the scale no longer multiplies
    every gradient below it. `dL/ds_z` is unchanged. features: [..., d_model]; head: [vocab, d_model]; s_z:
    [vocab], effective.
    This gradient is that of no loss: second derivatives and forward-mode differentiation are refused.
    """
    weight, c = head.scaled_weight(), preconditioner(s_z, q)
    return Readout(features, _PreconditionedRows.apply(weight, s_z, c), (weight * c.unsqueeze(-1)).detach())


Reading = Callable[[Tensor, Linear, Tensor], Readout]
"""(h, head, s_z) -> readout."""


def reading(q: float) -> Reading:
    """How logits are read and their gradients come back: with preconditioning of exponent q, or plainly for 0."""
    return partial(preconditioned, q=q) if q else scaled
