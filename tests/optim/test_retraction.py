from __future__ import annotations

from typing import Any

import paper
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from spherelm.layers.linear import UnitEmbedding, UnitLinear, departure, unit_modules
from spherelm.optim.groups import OptimConfig, build_optimizer
from spherelm.optim.retraction import attach_retraction


def small_model() -> nn.Sequential:
    return nn.Sequential(UnitEmbedding(7, 6), UnitLinear(6, 5), nn.Linear(5, 4), UnitLinear(4, 6, writes=True))


def push(model: nn.Module, size: float = 1.0) -> None:
    for p in model.parameters():
        p.grad = size * torch.randn_like(p)


def test_attaching_puts_the_weights_on_the_sphere_at_once() -> None:
    model = small_model()
    assert departure(model) > 0.01
    attach_retraction(torch.optim.SGD(model.parameters(), lr=0.1), model)
    assert departure(model) < 3e-7


@given(st.integers(0, 2**20), st.floats(-4, 1), st.sampled_from(["SGD", "Adam", "AdamW", "RMSprop"]))
def test_unit_after_every_step_of_any_optimizer(seed: int, rate: float, name: str) -> None:
    torch.manual_seed(seed)
    model = small_model()
    optimizer = getattr(torch.optim, name)(model.parameters(), lr=10**rate)
    attach_retraction(optimizer, model)
    for _ in range(3):
        push(model)
        optimizer.step()
        assert departure(model) < 3e-7


def test_removing_the_hook_undoes_it() -> None:
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    handle = attach_retraction(optimizer, model)
    handle.remove()
    push(model)
    optimizer.step()
    assert departure(model) > 0.01


def test_a_step_is_the_plain_step_then_a_normalization() -> None:
    """And neither Adam's moments nor weights off the sphere notice."""
    torch.manual_seed(1)
    model = small_model().double()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    attach_retraction(optimizer, model)
    plain = small_model().double()
    plain.load_state_dict(model.state_dict())
    plain_optimizer = torch.optim.Adam(plain.parameters(), lr=0.1)
    push(model)
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        q.grad = p.grad
    optimizer.step()
    plain_optimizer.step()
    axes = {f"{name}.weight": axis for name, _, axis in unit_modules(model)}
    wanted = dict(plain.named_parameters())
    for name, p in model.named_parameters():
        value = wanted[name].detach()
        value = paper.norm(value, axes[name]) if name in axes else value
        torch.testing.assert_close(p.detach(), value, rtol=1e-14, atol=1e-15)
        for key, moment in optimizer.state[p].items():
            assert torch.equal(moment, plain_optimizer.state[wanted[name]][key])


@pytest.mark.parametrize(("arm", "on_sphere"), [("gpt", False), ("ngpt", True)])
def test_build_optimizer_retracts_sphere_models_only(arm: str, on_sphere: bool, case: Any) -> None:
    c = case(arm)
    optimizer = build_optimizer(c.model, OptimConfig(lr=0.1))
    push(c.model)
    optimizer.step()
    assert departure(c.model) < 1e-14
    rows: Tensor = c.model.embed.weight.detach().norm(dim=1)
    assert bool(((rows - 1).abs() < 1e-12).all()) == on_sphere


def test_float32_training_stays_on_the_sphere(case: Any, train: Any) -> None:
    c = case("ngpt")
    model = c.model.float()
    train(model, OptimConfig(lr=3e-2), c.batches(10))
    assert departure(model) < 3e-7


def test_a_shared_weight_is_retracted(case: Any, train: Any) -> None:
    c = case("ngpt", tie_embeddings=True)
    train(c.model, OptimConfig(lr=3e-2), c.batches(2))
    assert c.model.head.linear.weight is c.model.embed.weight
    assert departure(c.model) < 1e-14
