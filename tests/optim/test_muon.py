"""Muon against torch's own, against the singular value decomposition, and on the sphere."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from spherelm import sphere
from spherelm.layers.linear import departure, unit_modules
from spherelm.models import NGPT, GPTConfig, NGPTConfig, build
from spherelm.optim import RULES, Muon, OptimConfig, build_optimizer, muon
from spherelm.optim.groups import RateMultipliers, set_rate
from spherelm.optim.muon import MuonAdamW, orthogonalized, step_size

SHAPES = st.tuples(st.integers(1, 12), st.integers(1, 12))


@given(SHAPES, st.integers(0, 2**20))
def test_orthogonalization_keeps_the_singular_vectors_and_makes_the_values_near_1(
    shape: tuple[int, int], seed: int
) -> None:
    torch.manual_seed(seed)
    rank = min(shape)
    u, _, v = torch.linalg.svd(torch.randn(shape, dtype=torch.float64), full_matrices=False)
    values = torch.linspace(1.0, 0.2, rank, dtype=torch.float64)
    turned = orthogonalized(u @ values.diag() @ v, torch.float64)
    inside = u.T @ turned @ v.T
    assert (inside - inside.diagonal().diag()).abs().max() < 1e-6
    assert ((inside.diagonal() > 0.6) & (inside.diagonal() < 1.3)).all()


def test_zero_stays_zero() -> None:
    assert orthogonalized(torch.zeros(3, 4), torch.float32).equal(torch.zeros(3, 4))


@pytest.mark.parametrize("shape", [(5, 4, 7), (3, 7, 4)])
def test_each_matrix_of_a_bank_is_orthogonalized_by_itself(shape: tuple[int, int, int]) -> None:
    bank = torch.randn(shape, dtype=torch.float64) * torch.logspace(-3, 3, shape[0], dtype=torch.float64)[:, None, None]
    apart = torch.stack([orthogonalized(matrix, torch.float64) for matrix in bank])
    torch.testing.assert_close(orthogonalized(bank, torch.float64), apart)
    for bank_axis, axis in ((1, 0), (2, 1), (None, None)):
        assert step_size(torch.Size(shape), bank_axis) == step_size(torch.Size(shape[1:]), axis)


@pytest.mark.parametrize("shape", [(40, 40), (40, 100), (100, 40), (40, 60)])
def test_the_ways_of_orthogonalizing_agree(shape: tuple[int, int]) -> None:
    """By Gram matrices or not, as the definition says it; singular values over four decades, as gradients have them."""
    a, b, c = muon.COEFFICIENTS
    u, _, v = torch.linalg.svd(torch.randn(shape, dtype=torch.float64), full_matrices=False)
    values = torch.logspace(0, -4, 40, dtype=torch.float64)
    turned = values / values.norm()
    for _ in range(muon.ITERATIONS):
        turned = a * turned + b * turned**3 + c * turned**5
    expected, g = u @ turned.diag() @ v, u @ values.diag() @ v
    torch.testing.assert_close(orthogonalized(1e-3 * g, torch.float64), expected, rtol=0, atol=1e-9)
    torch.testing.assert_close(orthogonalized(g, torch.float32).double(), expected, rtol=0, atol=1e-3)
    assert (orthogonalized(g, torch.bfloat16) - expected).norm() < 0.3 * expected.norm()


@pytest.mark.parametrize("shape", [(6, 6), (12, 4), (4, 12)])
def test_a_plain_matrix_moves_as_with_torchs_muon(shape: tuple[int, int]) -> None:
    """Torch computes the iteration in bfloat16: that is what the tolerance is for."""
    torch.manual_seed(3)
    start, gradients = torch.randn(shape), [torch.randn(shape) for _ in range(4)]
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    group = {
        "params": [ours],
        "muon": True,
        "momentum": 0.95,
        "hyperball": False,
        "unit_axes": [None],
        "weight_decay": 0.1,
    }
    mine = MuonAdamW([group], 0.05, (0.9, 0.95), 1e-8, fused=False)
    other = torch.optim.Muon([theirs], lr=0.05, weight_decay=0.1, momentum=0.95, nesterov=True)
    for gradient in gradients:
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        mine.step()
        other.step()
    moved = (theirs - start).norm()
    assert (ours - theirs).norm() < 0.02 * moved
    assert moved > 0.1


@given(st.integers(0, 2**20), st.sampled_from([(10, 4, 1), (4, 10, 1), (10, 4, 0), (4, 10, 0), (6, 6, 0)]))
def test_on_the_sphere_the_rate_is_an_angle(seed: int, case: tuple[int, int, int]) -> None:
    """The root mean square angle by which the unit vectors turn, to the spread of the iteration's singular values."""
    torch.manual_seed(seed)
    rows, columns, axis = case
    u, _, v = torch.linalg.svd(torch.randn(rows, columns), full_matrices=False)
    update = (u @ v) * step_size(torch.Size((rows, columns)), axis)
    assert update.square().sum(axis).mean().sqrt().item() == pytest.approx(1.0, rel=1e-5)


def pushed(optimizer: torch.optim.Optimizer, model: nn.Module, seed: int) -> None:
    torch.manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()


CONFIG: dict[str, Any] = {"vocab_size": 23, "n_layers": 2, "d_model": 16, "n_heads": 2, "d_ff": 24, "max_seq_len": 8}


def test_ngpt_stays_on_the_sphere_and_only_block_matrices_are_muons() -> None:
    model = build(NGPTConfig(**CONFIG))
    optimizer = build_optimizer(model, OptimConfig(lr=1e-2, optimizer=Muon(), multipliers=RateMultipliers(matrix=5.0)))
    for seed in range(3):
        pushed(optimizer, model, seed)
        assert departure(model) < 3e-7
    kinds = {group["role"]: set(optimizer.state[group["params"][0]]) for group in optimizer.param_groups}
    adam = {"step", "exp_avg", "exp_avg_sq"}
    assert kinds == {"input_embedding": adam, "output_embedding": adam, "matrix": {"momentum_buffer"}, "scale": adam}


def test_small_matrices_of_one_shape_are_orthogonalized_together_and_move_as_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One of them without a gradient, a bank and one shape that occurs once among them."""
    shapes, axes = [(6, 4), (4, 6), (6, 4), (2, 4, 6), (6, 4), (3, 3)], [1, 0, 1, 2, 1, None]

    def moved(small: int) -> tuple[list[Tensor], list[torch.Size]]:
        torch.manual_seed(0)
        parameters = [nn.Parameter(torch.randn(shape)) for shape in shapes]
        group = {
            "params": parameters,
            "muon": True,
            "momentum": 0.9,
            "hyperball": False,
            "unit_axes": axes,
            "weight_decay": 0.1,
        }
        optimizer, products = MuonAdamW([group], 0.05, (0.9, 0.95), 1e-8, fused=False), []

        def noted(g: Tensor, dtype: torch.dtype) -> Tensor:
            products.append(g.shape)
            return orthogonalized(g, dtype)

        monkeypatch.setattr(muon, "SMALL", small)
        with monkeypatch.context() as patch:
            patch.setattr(muon, "orthogonalized", noted)
            for parameter in (*parameters[:4], parameters[5]):
                parameter.grad = torch.randn_like(parameter)
            optimizer.step()
        return parameters, products

    (together, stacked), (alone, single) = moved(24), moved(0)
    assert sorted(stacked) == [(2, 4, 6), (2, 6, 4), (3, 3), (4, 6)]
    assert sorted(map(len, single)) == [2, 2, 2, 2, 3]
    for ours, theirs in zip(together, alone, strict=True):
        torch.testing.assert_close(ours, theirs)
    torch.manual_seed(0)
    start = [torch.randn(shape) for shape in shapes]
    assert [ours.equal(before) for ours, before in zip(together, start, strict=True)] == [False] * 4 + [True, False]


@pytest.mark.parametrize("arm", [GPTConfig, NGPTConfig])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_its_products_are_computed_as_the_model_is(
    arm: Any, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And in float32 where nothing is said, on a processor."""
    used: set[torch.dtype] = set()

    def noted(g: Tensor, dtype: torch.dtype) -> Tensor:
        used.add(dtype)
        return orthogonalized(g, dtype)

    monkeypatch.setattr(muon, "orthogonalized", noted)
    for asked, expected in ((dtype, dtype), (None, torch.float32)):
        model = build(arm(**CONFIG))
        model.runtime.compute_dtype = asked
        pushed(build_optimizer(model, OptimConfig(lr=1e-2, optimizer=Muon())), model, 0)
        assert used == {expected}
        used.clear()


def test_what_is_not_a_matrix_moves_as_with_adamw() -> None:
    models = [build(GPTConfig(**CONFIG)) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    mixed = build_optimizer(models[0], OptimConfig(lr=1e-2, optimizer=Muon(), multipliers=RateMultipliers(matrix=5.0)))
    adam = build_optimizer(models[1], OptimConfig(lr=1e-2))
    for seed in range(3):
        for optimizer in (mixed, adam):
            set_rate(optimizer, 1e-2 / (seed + 1))
        pushed(mixed, models[0], seed)
        pushed(adam, models[1], seed)
    for (name, ours), theirs in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        is_block_matrix = name.startswith("blocks") and ours.ndim == 2
        assert ours.equal(theirs) != is_block_matrix, name


def test_hyperball_turns_plain_matrices_and_keeps_their_norm() -> None:
    """`W <- R unit(W - eta R unit(u))` (arXiv 2606.16899, as the paper writes it),
    over a few updates; no weight decay.
    """
    model = build(GPTConfig(**CONFIG))
    config = OptimConfig(
        lr=1e-2, optimizer=Muon(hyperball=True), multipliers=RateMultipliers(matrix=5.0), weight_decay=0.1
    )
    optimizer = build_optimizer(model, config)
    matrices = {name: p for name, p in model.named_parameters() if name.startswith("blocks") and p.ndim == 2}
    at_first = {name: p.detach().double().norm() for name, p in matrices.items()}
    for seed in range(3):
        before = {name: p.detach().double() for name, p in matrices.items()}
        pushed(optimizer, model, seed)
        for name, p in matrices.items():
            momentum = optimizer.state[p]["momentum_buffer"]
            u = orthogonalized(p.grad.lerp(momentum, 0.95), torch.float32).double()  # type: ignore[union-attr]
            moved = before[name] - 0.05 * at_first[name] * u / u.norm()
            torch.testing.assert_close(p.double(), at_first[name] * moved / moved.norm(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("arm", [GPTConfig, NGPTConfig])
def test_half_of_it_saved_and_loaded_goes_on_to_the_bit(arm: Any) -> None:
    config = OptimConfig(lr=1e-2, optimizer=Muon(), multipliers=RateMultipliers(matrix=2.0))
    whole, half = build(arm(**CONFIG)), build(arm(**CONFIG))
    half.load_state_dict(whole.state_dict())
    optimizer, first = build_optimizer(whole, config), build_optimizer(half, config)
    for seed in range(4):
        pushed(optimizer, whole, seed)
    for seed in range(2):
        pushed(first, half, seed)
    second = build_optimizer(half, config)
    second.load_state_dict(first.state_dict())
    for seed in range(2, 4):
        set_rate(second, 1e-2)
        pushed(second, half, seed)
    for ours, theirs in zip(half.parameters(), whole.parameters(), strict=True):
        assert ours.equal(theirs)


def test_vectors_are_refused() -> None:
    group = {"params": [nn.Parameter(torch.zeros(3))], "muon": True}
    with pytest.raises(ValueError, match="Muon takes matrices only"):
        MuonAdamW([group], 0.1, (0.9, 0.95), 1e-8, fused=False)


def test_groups_that_are_added_later_are_trained_too() -> None:
    matrix, vector, late = (nn.Parameter(torch.zeros(shape)) for shape in ((3, 2), (2,), (4,)))
    muons = {"params": [matrix], "muon": True, "momentum": 0.9, "hyperball": False, "unit_axes": [None]}
    optimizer = MuonAdamW([muons], 0.1, (0.9, 0.95), 1e-8, fused=False)
    optimizer.add_param_group({"params": [vector]})
    optimizer.add_param_group({"params": [late], "lr": 0.2})
    for parameter in (matrix, vector, late):
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert matrix.abs().min() > 0
    torch.testing.assert_close(vector.detach(), torch.full((2,), -0.1))  # Adam's first step is the rate
    torch.testing.assert_close(late.detach(), torch.full((4,), -0.2))
    another = nn.Parameter(torch.zeros(2, 2))
    optimizer.add_param_group({"params": [another], "muon": True})
    another.grad = torch.eye(2)
    optimizer.step()
    assert another.abs().max() > 0
    with pytest.raises(ValueError, match="Muon takes matrices only"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(3))], "muon": True})
    assert len(optimizer.param_groups) == 4


def rows_turned(model: NGPT, before: dict[str, Tensor]) -> float:
    """The largest angle between a block matrix's vectors now and then."""
    found = [(name, module.weight, axis) for name, module, axis in unit_modules(model) if name.startswith("blocks")]
    return max(sphere.angle(before[name], weight.detach(), axis).max().item() for name, weight, axis in found)  # type: ignore[arg-type]


@pytest.mark.row("Optimizers")
@pytest.mark.parametrize("reloaded", [False, True])
@pytest.mark.parametrize("optimizer_name", ["adamw", "gated_adamw", "muon"])
def test_no_vector_turns_beyond_the_cap(optimizer_name: str, reloaded: bool) -> None:
    model = build(NGPTConfig(**CONFIG))
    assert isinstance(model, NGPT)
    capped = OptimConfig(lr=0.3, optimizer=RULES[optimizer_name](), max_angle=0.1, angle_follows_lr=True)
    optimizer = build_optimizer(model, capped)
    if reloaded:  # as accelerate does before the first step, which puts other group objects into the optimizer
        optimizer.load_state_dict(optimizer.state_dict())
    for rate, limit in ((0.3, 0.1), (0.15, 0.05), (1e-5, 0.1 * 1e-5 / 0.3)):
        set_rate(optimizer, rate)
        before = {name: module.weight.detach().clone() for name, module, _ in unit_modules(model)}  # type: ignore[operator]
        pushed(optimizer, model, 1)
        assert rows_turned(model, before) <= limit + 1e-6
        assert rows_turned(model, before) > 0.0
        assert sphere.angle(before["embed"], model.embed.weight.detach()).max() > limit, "embeddings are not capped"
        assert departure(model) < 3e-7


def test_below_the_cap_nothing_changes() -> None:
    models = [build(NGPTConfig(**CONFIG)) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    for model, cap in zip(models, (None, math.pi), strict=True):
        pushed(build_optimizer(model, OptimConfig(lr=0.1, max_angle=cap)), model, 0)
    for ours, theirs in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-7)


def test_a_cap_follows_the_rate_where_a_role_is_frozen() -> None:
    """The first group is the input embedding's: with a rate of 0 it cannot say where the schedule stands."""
    model = build(NGPTConfig(**CONFIG))
    assert isinstance(model, NGPT)
    frozen = RateMultipliers(input_embedding=0.0)
    optimizer = build_optimizer(model, OptimConfig(lr=0.3, max_angle=0.1, angle_follows_lr=True, multipliers=frozen))
    set_rate(optimizer, 0.15)
    before = {name: module.weight.detach().clone() for name, module, _ in unit_modules(model)}  # type: ignore[operator]
    pushed(optimizer, model, 1)
    assert 0.0 < rows_turned(model, before) <= 0.05 + 1e-6
    torch.testing.assert_close(before["embed"], model.embed.weight.detach(), rtol=0, atol=1e-6)
