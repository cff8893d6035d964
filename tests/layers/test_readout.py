"""The read-out and logit gradient preconditioning, against the formula and against the plain gradient."""

from __future__ import annotations

from typing import Any

import paper
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from spherelm.layers.linear import UnitLinear
from spherelm.layers.loss import linear_cross_entropy
from spherelm.layers.readout import preconditioned, preconditioner, read_logits, scaled
from spherelm.models import NGPT, NGPTConfig, build

CONFIG: dict[str, Any] = {"vocab_size": 31, "n_layers": 2, "d_model": 16, "n_heads": 2, "d_ff": 24, "max_seq_len": 8}


def parts() -> tuple[Tensor, UnitLinear, Tensor, Tensor]:
    """Features [5, 6], a head of 9 entries, positive scales, and targets, in float64."""
    head = UnitLinear(6, 9).double()
    with torch.no_grad():
        head.weight.copy_(paper.norm(torch.randn(9, 6).double()))
    h = paper.norm(torch.randn(5, 6).double()).requires_grad_()
    s_z = (torch.rand(9).double() + 0.5).requires_grad_()
    return h, head, s_z, torch.randint(9, (5,))


@given(st.floats(0.1, 2.0), st.integers(0, 2**20))
def test_gradients_are_the_formulas(q: float, seed: int) -> None:
    """Through whole logits and through the chunked loss."""
    torch.manual_seed(seed)
    h, head, s_z, targets = parts()
    z = s_z * (h @ head.weight.T)
    dz = torch.autograd.grad(paper.cross_entropy(z, targets), z, retain_graph=True)[0]
    du = paper.preconditioned_cosine_gradient(s_z.detach(), dz, q)
    expected = du @ head.weight, du.T @ h, (dz * (h @ head.weight.T)).sum(0)
    readout = preconditioned(h, head, s_z, q)
    torch.testing.assert_close(read_logits(readout), z)
    losses = (
        paper.cross_entropy(read_logits(readout), targets),
        linear_cross_entropy(readout.features, readout.weight, targets, readout.pullback),
    )
    for loss in losses:
        torch.testing.assert_close(loss, paper.cross_entropy(z, targets))
        torch.testing.assert_close(torch.autograd.grad(loss, [h, head.weight, s_z], retain_graph=True), expected)


def gradients(model: NGPT, tokens: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    model.loss(tokens, tokens.roll(-1, 1)).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def pair(q: float) -> tuple[NGPT, NGPT]:
    """The same model without and with preconditioning, its logits' scales all different."""
    plain, other = build(NGPTConfig(**CONFIG)), build(NGPTConfig(**CONFIG, logit_preconditioning=q))
    assert isinstance(plain, NGPT)
    assert isinstance(other, NGPT)
    with torch.no_grad():
        plain.head.s_z.value.mul_(torch.rand(31) * 8 + 2)
    other.load_state_dict(plain.state_dict())
    return plain.double(), other.double()


def test_at_q_1_it_is_the_plain_gradient_over_the_mean_scale() -> None:
    plain, other = pair(1.0)
    tokens = torch.randint(31, (2, 8))
    mean = plain.head.s_z().mean()
    expected = gradients(plain, tokens)
    for name, gradient in gradients(other, tokens).items():
        torch.testing.assert_close(gradient, expected[name] / (1 if name == "head.s_z.value" else mean))


def test_the_forward_pass_is_unchanged_at_any_q() -> None:
    plain, other = pair(0.37)
    tokens = torch.randint(31, (2, 8))
    torch.testing.assert_close(plain(tokens), other(tokens))
    torch.testing.assert_close(plain.loss(tokens, tokens), other.loss(tokens, tokens))


def test_a_negative_scale_keeps_its_sign_and_makes_no_nan() -> None:
    s_z = torch.tensor([4.0, -1.0, 3.0])
    torch.testing.assert_close(preconditioner(s_z, 0.5), torch.tensor([2.0**0.5, -(0.5**0.5), 1.5**0.5]))
    torch.testing.assert_close(preconditioner(s_z, 1.0), s_z / 2)


def test_without_it_the_scale_sits_in_the_rows() -> None:
    h, head, s_z, _ = parts()
    readout = scaled(h, head, s_z)
    torch.testing.assert_close(read_logits(readout), s_z * (h @ head.weight.T))
    assert readout.pullback is None


def test_a_negative_exponent_is_refused() -> None:
    with pytest.raises(ValueError, match=r"logit_preconditioning must be at least 0, got -1\.0"):
        NGPTConfig(**CONFIG, logit_preconditioning=-1.0)
