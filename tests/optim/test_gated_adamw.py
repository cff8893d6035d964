"""GatedAdamW against the formula of its paper, in float64, and against torch's AdamW where the two are the same."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from spherelm.optim.gated_adamw import GatedAdamW, gates


def trained(make: Any, gradients: list[Tensor], start: Tensor) -> Tensor:
    """Where an optimizer, made of a list of parameters, takes `start` by these gradients."""
    parameter = torch.nn.Parameter(start.clone())
    optimizer = make([parameter])
    for gradient in gradients:
        parameter.grad = gradient.clone()
        optimizer.step()
    return parameter.detach()


def by_the_formula(
    gradients: list[Tensor], theta: Tensor, eps: float, eps_gate: float, a: float, alpha: float
) -> Tensor:
    """`theta <- theta - eta (alpha gamma m_hat / d + lambda theta)`, written out; eta .01, lambda .1, betas .9, .95."""
    m = v = torch.zeros_like(theta)
    for t, g in enumerate(gradients, 1):
        m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g**2
        d = (v / (1 - 0.95**t)).sqrt() + eps
        gamma = 1 / (1 + (d / eps_gate) ** (-a))
        theta = theta - 0.01 * (alpha * gamma * m / (1 - 0.9**t) / d + 0.1 * theta)
    return theta


@pytest.mark.row("Optimizers")
@given(st.floats(0.1, 2.0), st.sampled_from([1e-6, 1e-3, 1.0]), st.sampled_from([0.0, 1e-8, 1e-2]))
def test_it_is_the_formula(a: float, eps_gate: float, eps: float) -> None:
    torch.manual_seed(0)
    start, gradients = torch.randn(5, 3).double(), [torch.randn(5, 3).double() * 10.0**-k for k in range(5)]
    settings: dict[str, Any] = {"eps": eps, "eps_gate": eps_gate, "a": a, "alpha": 1.3}
    got = trained(lambda p: GatedAdamW(p, 0.01, weight_decay=0.1, **settings), gradients, start)
    torch.testing.assert_close(got, by_the_formula(gradients, start, **settings), rtol=1e-12, atol=1e-12)


@given(st.sampled_from([1e-8, 1e-3, 0.5]), st.floats(0, 0.2))
def test_at_a_1_it_is_adamw(eps_gate: float, weight_decay: float) -> None:
    start, gradients = torch.randn(4, 7).double(), [torch.randn(4, 7).double() for _ in range(6)]
    ours = trained(
        lambda p: GatedAdamW(p, 0.02, eps=0.0, eps_gate=eps_gate, a=1.0, weight_decay=weight_decay), gradients, start
    )
    theirs = trained(
        lambda p: torch.optim.AdamW(p, 0.02, (0.9, 0.95), eps=eps_gate, weight_decay=weight_decay), gradients, start
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_the_gate_is_half_open_at_its_eps_and_opens_with_the_gradient() -> None:
    d = torch.logspace(-12, 4, 65, dtype=torch.float64)
    (opened,) = gates((d,), 1e-4, 0.5)
    assert (opened.diff() > 0).all()
    assert opened[0] < 2e-4
    assert opened[-1] > 0.9998
    assert gates((torch.tensor([1e-4]),), 1e-4, 0.5)[0].item() == pytest.approx(0.5, abs=1e-6)
    torch.testing.assert_close(gates((d,), 1e-4, 1.0)[0], d / (d + 1e-4), rtol=1e-12, atol=0)


def test_where_there_is_no_gradient_nothing_moves() -> None:
    start = torch.randn(3)
    for eps in (0.0, 1e-16):
        assert trained(lambda p: GatedAdamW(p, 1.0, eps=eps), [torch.zeros(3)] * 3, start).equal(start)  # noqa: B023


def test_a_gradient_too_small_for_its_square_does_not_blow_up() -> None:
    start = torch.zeros(3)
    moved = trained(lambda p: GatedAdamW(p, 1.0, eps=0.0, a=0.1), [torch.full((3,), 1e-24)], start)
    assert moved.abs().max() < 0.1  # as the formula says: 0.025, which nothing in float32 can tell from 0
    default = trained(lambda p: GatedAdamW(p, 1.0), [torch.full((3,), 1e-24)], start)
    assert default.isfinite().all()


def test_a_gradient_that_is_no_number_is_not_hidden() -> None:
    gradient = torch.tensor([math.nan, 1.0])
    assert trained(lambda p: GatedAdamW(p, 0.1), [gradient, torch.ones(2)], torch.zeros(2)).isnan().tolist() == [
        True,
        False,
    ]


def test_half_of_it_saved_and_loaded_goes_on_to_the_bit() -> None:
    start, gradients = torch.randn(4, 3), [torch.randn(4, 3) for _ in range(6)]
    whole = trained(lambda p: GatedAdamW(p, 0.1), gradients, start)
    parameter = torch.nn.Parameter(start.clone())
    first = GatedAdamW([parameter], 0.1)
    for gradient in gradients[:3]:
        parameter.grad = gradient
        first.step()
    second = GatedAdamW([parameter], 0.7)
    second.load_state_dict(first.state_dict())
    for gradient in gradients[3:]:
        parameter.grad = gradient
        second.step()
    assert parameter.detach().equal(whole)


@pytest.mark.parametrize("field", ["lr", "eps_gate", "a", "alpha", "eps", "weight_decay"])
def test_settings_out_of_range_are_refused(field: str) -> None:
    settings = {"lr": 0.1, field: -1.0}
    with pytest.raises(ValueError, match=rf"{field}.*-1\.0"):
        GatedAdamW([torch.nn.Parameter(torch.zeros(1))], **settings)  # type: ignore[arg-type]
