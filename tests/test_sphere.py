"""Properties of the maths of the sphere, and its agreement with the paper's formulas."""

from __future__ import annotations

import math

import paper
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from spherelm import sphere

EXACT = 1e-14
seeds = st.integers(0, 2**20)
widths = st.integers(2, 33)
parts = st.floats(0, 1)
angles = st.floats(1e-3, 1.5)


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def unit(seed: int, *shape: int) -> Tensor:
    return paper.norm(draw(seed, *shape))


def turned(start: Tensor, seed: int, by: Tensor | float) -> Tensor:
    """Unit vectors at the angle ``by`` from the unit vectors ``start``, in a random direction."""
    across = draw(seed, *start.shape)
    across = paper.norm(across - (across * start).sum(-1, keepdim=True) * start)
    by = torch.as_tensor(by, dtype=torch.float64)
    return torch.cos(by) * start + torch.sin(by) * across


def close(got: Tensor, wanted: Tensor, tolerance: float = EXACT) -> None:
    torch.testing.assert_close(got, wanted, rtol=tolerance, atol=tolerance)


@given(seeds, widths, st.integers(-3, 2), st.floats(-9, 9))
def test_norm_is_unit_along_any_axis_and_keeps_the_direction(seed: int, width: int, dim: int, magnitude: float) -> None:
    x = draw(seed, 3, width, 2) * 10**magnitude
    unit_x = sphere.norm(x, dim)
    close(unit_x, paper.norm(x, dim))
    close(unit_x.norm(dim=dim), torch.ones_like(unit_x.norm(dim=dim)))


def test_norm_of_zero_is_zero_with_a_finite_gradient() -> None:
    x = torch.zeros(2, 4, requires_grad=True)
    sphere.norm(x).sum().backward()
    assert torch.equal(sphere.norm(x), torch.zeros(2, 4))
    assert x.grad is not None
    assert x.grad.isfinite().all()


def test_gradients_of_norm_and_steps() -> None:
    h, target = draw(1, 2, 5).requires_grad_(), draw(2, 2, 5).requires_grad_()
    alpha = draw(3, 5).abs().requires_grad_()
    assert torch.autograd.gradcheck(sphere.norm, (h,))
    assert torch.autograd.gradcheck(sphere.step, (h, target, alpha))
    assert torch.autograd.gradcheck(sphere.riemannian_step, (h, target, alpha))


@given(seeds, widths, st.floats(0, 1.5))
def test_every_step_ends_on_the_sphere(seed: int, width: int, alpha: float) -> None:
    h, target = unit(seed, 4, width), unit(seed + 1, 4, width)
    rates = alpha * draw(seed + 2, width).abs().clamp(max=1)
    for ours, theirs in ((sphere.step, paper.step), (sphere.riemannian_step, paper.riemannian_step)):
        moved = ours(h, target, rates)
        close(moved, theirs(h, target, rates), 1e-12)
        close(moved.norm(dim=-1), torch.ones(4, dtype=torch.float64))


@given(seeds, widths, st.floats(0, 0.99))
def test_a_zero_branch_leaves_h(seed: int, width: int, alpha: float) -> None:
    h = unit(seed, 4, width)
    zero = sphere.norm(torch.zeros_like(h))
    close(sphere.step(h, zero, torch.tensor(alpha, dtype=torch.float64)), h)
    close(sphere.riemannian_step(h, zero, torch.tensor(alpha, dtype=torch.float64)), h)


@given(seeds, widths)
def test_alpha_zero_stays_and_alpha_one_arrives(seed: int, width: int) -> None:
    h, target = unit(seed, 4, width), unit(seed + 1, 4, width)
    close(sphere.step(h, target, torch.zeros(width, dtype=torch.float64)), h)
    close(sphere.step(h, target, torch.ones(width, dtype=torch.float64)), target)


@given(seeds, widths, parts)
def test_both_steps_agree_with_slerp_for_small_moves(seed: int, width: int, part: float) -> None:
    h = unit(seed, 4, width)
    target = turned(h, seed + 1, 1e-3)
    alpha = torch.tensor(part, dtype=torch.float64)
    along_the_circle = sphere.slerp(h, target, part)
    close(sphere.step(h, target, alpha), along_the_circle, 1e-9)
    close(sphere.riemannian_step(h, target, alpha), along_the_circle, 1e-9)


@given(seeds, widths, st.floats(0.01, 3.0), parts)
def test_slerp_turns_in_proportion(seed: int, width: int, between: float, part: float) -> None:
    a = unit(seed, 4, width)
    b = turned(a, seed + 1, between)
    point = sphere.slerp(a, b, part)
    close(point, paper.slerp(a, b, part), 1e-9)
    close(point.norm(dim=-1), torch.ones(4, dtype=torch.float64), 1e-12)
    close(sphere.angle(a, point), torch.full((4,), part * between, dtype=torch.float64), 1e-11)
    close(sphere.slerp(a, b, 0.0), a, 1e-12)
    close(sphere.slerp(a, b, 1.0), b, 1e-12)
    close(sphere.slerp(a, b, 0.5), paper.norm(a + b), 1e-12)


@given(seeds, parts, st.sampled_from([0.0, 1e-12, 1e-9, 1e-7, 1e-5]))
def test_slerp_between_points_that_nearly_coincide(seed: int, part: float, between: float) -> None:
    a = unit(seed, 3, 8)
    b = turned(a, seed + 1, between)
    point = sphere.slerp(a, b, torch.tensor(part, dtype=torch.float64))
    close(point, paper.norm(a + part * (b - a)), 1e-13)


@given(seeds, widths, st.sampled_from([0, 1, -1]))
def test_tangent_is_orthogonal_and_a_projection(seed: int, width: int, dim: int) -> None:
    w = paper.norm(draw(seed, 5, width), dim)
    g = draw(seed + 1, 5, width)
    across = sphere.tangent(w, g, dim)
    along = (w * across).sum(dim)
    close(along, torch.zeros_like(along), 1e-13)
    close(sphere.tangent(w, across, dim), across, 1e-13)
    close(across + (w * g).sum(dim, keepdim=True) * w, g, 1e-13)


@pytest.mark.parametrize("size", [1e-12, 1e-9, 1e-6, 1e-3, 0.5, 1.5])
@pytest.mark.parametrize("end", [0.0, math.pi])
def test_angle_is_accurate_near_zero_and_pi(size: float, end: float) -> None:
    a = unit(1, 50, 16)
    b = turned(a, 2, abs(end - size))
    error = (sphere.angle(a, b) - abs(end - size)).abs().max()
    assert error < 1e-15 * (1 + 3 * end)  # acos(a . b) is off by up to 1e-8 here
    close(sphere.angle(b, a), sphere.angle(a, b), 0)


def test_angle_of_equal_and_opposite_points() -> None:
    a = unit(1, 5, 7)
    assert torch.equal(sphere.angle(a, a), torch.zeros(5, dtype=torch.float64))
    close(sphere.angle(a, -a), torch.full((5,), math.pi, dtype=torch.float64), 0)
    assert sphere.angle(draw(1, 3, 4, 5), draw(2, 3, 4, 5), dim=1).shape == (3, 5)


@given(seeds, widths, angles, st.floats(-4, 1), st.sampled_from([0, 1]))
def test_a_capped_move_never_exceeds_the_cap(seed: int, width: int, cap: float, size: float, dim: int) -> None:
    old = paper.norm(draw(seed, 6, width), dim)
    new = old + 10**size * draw(seed + 1, 6, width)
    moved = sphere.capped_move(old, new, cap, dim)
    close(moved, paper.capped_move(old, new, cap, dim), 1e-12)
    turn = sphere.angle(old, paper.norm(moved, dim), dim)
    assert (turn <= cap * (1 + 1e-12) + 1e-15).all()
    within = (sphere.angle(old, paper.norm(new, dim), dim) < cap * (1 - 1e-9)).unsqueeze(dim).expand_as(new)
    assert torch.equal(moved[within], new[within]), "a smaller move is left bitwise as it is"


def test_a_capped_move_to_the_opposite_point_is_finite() -> None:
    old = unit(1, 3, 5)
    for cap in (0.1, 2.0):
        moved = sphere.capped_move(old, -old, cap)
        assert moved.isfinite().all()
        assert (sphere.angle(old, paper.norm(moved)) <= cap).all()
        half = old.bfloat16()
        turned = sphere.angle(paper.norm(half.double()), paper.norm(sphere.capped_move(half, -half, cap).double()))
        assert (turned <= cap + 0.01).all(), "a unit vector rounded to eight bits is none"
    axis = torch.eye(4)[:1]
    assert sphere.capped_move(axis, -axis, 2.0).equal(axis), "there is no direction to turn in"


def test_a_cap_holds_for_candidates_that_are_far_longer_in_float32() -> None:
    for seed in range(50):
        old = paper.norm(draw(seed, 20, 8)).float()
        new = (old.double() * 1e6 * (seed % 2 * 2 - 1) + draw(seed + 1, 20, 8)).float()
        turn = sphere.angle(old.double(), paper.norm(sphere.capped_move(old, new, 0.3).double()))
        assert turn.max() <= 0.3 + 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_reduced_in_float32(dtype: torch.dtype) -> None:
    a, b = unit(1, 3, 300).to(dtype), unit(2, 3, 300).to(dtype)
    wide_a, wide_b = a.float(), b.float()
    alpha = draw(3, 300).abs().float()
    pairs = [
        (sphere.norm(a * 7), sphere.norm((a * 7).float())),
        (sphere.step(a, b, alpha), sphere.step(wide_a, wide_b, alpha)),
        (sphere.riemannian_step(a, b, alpha), sphere.riemannian_step(wide_a, wide_b, alpha)),
        (sphere.slerp(a, b, 0.3), sphere.slerp(wide_a, wide_b, 0.3)),
        (sphere.tangent(a, b), sphere.tangent(wide_a, wide_b)),
        (sphere.capped_move(a, b, 0.1), sphere.capped_move(wide_a, wide_b, 0.1)),
    ]
    for narrow, wide in pairs:
        assert narrow.dtype == dtype
        assert torch.equal(narrow, wide.to(dtype))
    assert torch.equal(sphere.angle(a, b), sphere.angle(wide_a, wide_b))


def test_lengths_that_half_precision_cannot_add_up() -> None:
    ones = torch.ones(1, 4096, dtype=torch.bfloat16)  # a bfloat16 sum of ones stops growing at 256
    assert torch.equal(sphere.norm(ones), ones / 64)
    large = torch.full((1, 4), 1000.0, dtype=torch.float16)  # squares beyond the range of float16
    assert torch.equal(sphere.norm(large), torch.full((1, 4), 0.5, dtype=torch.float16))


def kept(out: Tensor) -> list[Tensor]:
    """The tensors that the last operation of `out` saves for the backward pass."""
    assert out.grad_fn is not None
    return list(out.grad_fn.saved_tensors)  # type: ignore[attr-defined]


def test_nothing_is_kept_widened() -> None:
    """Of bfloat16 vectors the backward pass keeps bfloat16 vectors, and one float32 length each."""
    h, target = (sphere.norm(torch.randn(5, 64)).bfloat16().requires_grad_() for _ in range(2))
    alpha = torch.full((64,), 0.1, requires_grad=True)
    for out in (sphere.norm(h), sphere.step(h, target, alpha)):
        assert out.dtype == torch.bfloat16
        assert {(t.shape, t.dtype) for t in kept(out)} <= {
            (h.shape, torch.bfloat16),
            ((5, 1), torch.float32),
            (alpha.shape, torch.float32),
        }
        assert any(t.data_ptr() == out.data_ptr() for t in kept(out)), "the result, which the next layer keeps as well"
