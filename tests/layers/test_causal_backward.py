"""The backward pass of causal attention in blocks of keys, against autograd of the plain formula in float64."""

from __future__ import annotations

import math
from typing import Any
from unittest import mock

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd

from spherelm.layers import causal_backward
from spherelm.layers.attention import attend


def inputs(seq: int, dtype: torch.dtype) -> list[Tensor]:
    return [torch.randn(2, 3, seq, 8, dtype=torch.float64).to(dtype).requires_grad_() for _ in range(3)]


def plain(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Softmax attention of each query on the keys up to its own, and the logarithm of each row's sum."""
    scores = (q @ k.mT * scale).masked_fill(torch.ones(q.shape[2], q.shape[2]).triu(1).bool(), -torch.inf)
    return scores.softmax(-1) @ v, scores.logsumexp(-1)


@pytest.mark.parametrize("seq", [1, 128, 300, 1025])  # one block, one full, a short last one, four and a rest
def test_gradients_are_those_of_the_formula(seq: int) -> None:
    q, k, v = inputs(seq, torch.float64)
    out, logsumexp = plain(q, k, v, 0.3)
    grad = torch.randn_like(out)
    expected = torch.autograd.grad(out, (q, k, v), grad)
    got = causal_backward.attention_gradients(
        q.detach(), k.detach(), v.detach(), out.detach(), logsumexp.detach(), grad, 0.3
    )
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-11)


# Dynamo makes an instance of every autograd.Function that it traces, of which torch itself warns.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_a_compiled_training_step_in_bfloat16_takes_it_and_is_right_to_rounding() -> None:
    q, k, v = inputs(256, torch.bfloat16)
    grad = torch.randn(q.shape).bfloat16()
    graphs: list[str] = []

    def traced(module: Any, example: Any) -> Any:
        # Not made into machine code, which would take longer than all else here.
        graphs.append(module.code)
        return make_boxed_func(module.forward)

    torch.compiler.reset()
    compiled = torch.compile(lambda *x: attend(*x, 1 / math.sqrt(8), None), backend=aot_autograd(fw_compiler=traced))
    compiled(q, k, v).backward(grad)
    forward, backward = graphs
    assert "flash_attention" in forward
    assert "flash_attention" not in backward
    wide = [x.detach().double().requires_grad_() for x in (q, k, v)]
    expected = torch.autograd.grad(plain(*wide, 1 / math.sqrt(8))[0], wide, grad.double())
    for x, right in zip((q, k, v), expected, strict=True):
        assert (x.grad - right).norm() / right.norm() < 0.01  # type: ignore[operator]


def test_everything_else_stays_with_torch() -> None:
    q, k, v = inputs(256, torch.bfloat16)
    assert not causal_backward.products_are_faster(q, k, v, None), "not compiled"
    with mock.patch.object(torch.compiler, "is_compiling", return_value=True):
        assert causal_backward.products_are_faster(q, k, v, None)
        assert not causal_backward.products_are_faster(q, k, v, torch.ones(256, 256).bool()), "a mask"
        assert not causal_backward.products_are_faster(q, k[:, :1], v[:, :1], None), "heads that share keys"
        assert not causal_backward.products_are_faster(*(x[:, :, :100] for x in (q, k, v)), None), "short"
        assert not causal_backward.products_are_faster(*(x.float() for x in (q, k, v)), None), "float32"
        with torch.no_grad():
            assert not causal_backward.products_are_faster(q, k, v, None), "no gradient"
