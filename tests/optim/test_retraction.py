from __future__ import annotations

from typing import Any

import paper
import pytest
import torch
from cases import train
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


@pytest.mark.row("Optimizers")
@given(st.integers(0, 2**20), st.floats(-4, 1), st.sampled_from(["SGD", "Adam", "AdamW", "RMSprop"]))
def test_unit_after_every_step_of_any_optimizer(seed: int, rate: float, name: str) -> None:
    torch.manual_seed(seed)
    model = small_model()
    optimizer = getattr(torch.optim, name)(model.parameters(), lr=10**rate, weight_decay=0.0)
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


def test_float32_training_stays_on_the_sphere(case: Any) -> None:
    c = case("ngpt")
    model = c.model.float()
    train(model, OptimConfig(lr=3e-2), c.batches(10))
    assert departure(model) < 3e-7


def test_a_shared_weight_is_retracted(case: Any) -> None:
    c = case("ngpt", tie_embeddings=True)
    train(c.model, OptimConfig(lr=3e-2), c.batches(2))
    assert c.model.head.linear.weight is c.model.embed.weight
    assert departure(c.model) < 1e-14


def test_what_would_do_nothing_is_refused() -> None:
    model, other = small_model(), small_model()
    with pytest.raises(ValueError, match="this Linear has no unit weights to keep on the sphere"):
        attach_retraction(torch.optim.SGD((plain := nn.Linear(3, 3)).parameters()), plain)
    optimizer = torch.optim.SGD(other.parameters())
    with pytest.raises(ValueError, match="none of the parameters of this Sequential: make it from"):
        attach_retraction(optimizer, model)
    assert departure(model) > 0.01, "nothing was changed"
    push(other)
    optimizer.step()
    assert departure(other) > 0.01, "and nothing was attached"


def test_a_part_of_a_model_is_enough() -> None:
    """An optimizer of some of the model's weights, and one whose model is only a part;
    neither is refused, both retract.
    """
    model = small_model()
    some = torch.optim.SGD(model[2].parameters(), lr=0.5)
    attach_retraction(some, model)
    every = torch.optim.SGD(model.parameters(), lr=0.5)
    attach_retraction(every, model[1])
    for optimizer, retracted in ((every, model[1]), (some, model)):
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        assert departure(retracted) < 1e-6


def test_decay_of_unit_weights_must_be_meant() -> None:
    """It is what torch's AdamW does by default. Of other weights it is nobody's business."""
    model = small_model()
    with pytest.raises(
        ValueError, match=r"weight_decay=0\.01 would act on unit weights, 0 for one: .*weight_decay=0\.0"
    ):
        attach_retraction(torch.optim.AdamW(model.parameters()), model)
    apart = [{"params": model[2].parameters()}, {"params": [*model[:2].parameters()], "weight_decay": 0.0}]
    attach_retraction(torch.optim.AdamW(apart), model)
    decaying = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    attach_retraction(decaying, model, allow_decay=True)
    push(model)
    decaying.step()
    assert departure(model) < 3e-7
