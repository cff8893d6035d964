"""Balancing the load of experts: the bias on their scores, moved after each update, and the auxiliary loss."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import model_with_experts
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from spherelm.layers.moe import Router, clear_loads, routers
from spherelm.models import Decoder
from spherelm.optim import RULES, OptimConfig, attach_balancing, build_optimizer, parameter_roles
from spherelm.optim.balancing import moved_bias
from spherelm.runs.group import Group
from spherelm.train.parallel import distributed, recompute_block

TOKENS = torch.randint(23, (4, 8), generator=torch.Generator().manual_seed(5))


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    """An optimizer that leaves the weights as they are."""
    return torch.optim.SGD(model.parameters(), lr=0.0)


def biases(model: nn.Module) -> list[Tensor]:
    return [router.score_bias.clone() for _, router in routers(model)]


def loads(model: nn.Module) -> list[list[int]]:
    return [router.load.tolist() for _, router in routers(model)]


@given(st.lists(st.integers(0, 50), min_size=2, max_size=9))
def test_the_busy_are_picked_less_often_and_the_idle_more(load: list[int]) -> None:
    mean = sum(load) / len(load)
    bias = torch.randn(len(load), dtype=torch.float64)
    moved = moved_bias(bias, torch.tensor(load), 0.125)
    wanted = [
        b + (0.125 if n < mean else -0.125 if n > mean else 0.0) for b, n in zip(bias.tolist(), load, strict=True)
    ]
    assert moved.tolist() == wanted


@pytest.mark.parametrize("arm", ["gpt", "ngpt"])
def test_micro_batches_add_up_to_the_batch(arm: str) -> None:
    """And what is counted is forgotten after each step, but kept as seen."""
    model = model_with_experts(arm)
    found = []
    for parts in (TOKENS.split(4), TOKENS.split(1)):
        for _, router in routers(model):
            router.reset_balance()
        optimizer = sgd(model)
        handle = attach_balancing(optimizer, model, rate=0.01)
        for _ in range(2):
            for part in parts:
                model.loss(part, part).backward()
            counted = loads(model)
            optimizer.step()
        assert [router.seen.tolist() for _, router in routers(model)] == counted
        assert all(sum(load) == 2 * TOKENS.numel() for load in counted)
        assert torch.stack(loads_of(model)).abs().max() == 0
        handle.remove()
        found.append(biases(model))
    for whole, in_parts in zip(*found, strict=True):
        assert torch.equal(whole, in_parts)
        assert whole.abs().max() > 0


def loads_of(model: nn.Module) -> list[Tensor]:
    return [router.load for _, router in routers(model)]


def test_only_routers_that_balance_by_a_bias_have_it_moved() -> None:
    for balance in ("loss", "none"):
        model = model_with_experts(balance=balance)
        optimizer = build_optimizer(model, OptimConfig(lr=1e-2))
        model.loss(TOKENS, TOKENS).backward()
        optimizer.step()
        assert torch.stack(biases(model)).abs().max() == 0
        assert all(router.seen.sum() == 2 * TOKENS.numel() for _, router in routers(model))


def test_the_bias_makes_an_uneven_load_even() -> None:
    """A router that would give nearly everything to two of its experts, whatever it is asked."""
    torch.manual_seed(1)
    router = Router(8, 6, 2)
    inputs = torch.nn.functional.normalize(torch.randn(400, 8), dim=-1) + torch.eye(8)[0]
    with torch.no_grad():
        router.weight[:2, 0] += 1.5
    optimizer = sgd(router)
    attach_balancing(optimizer, router, rate=0.003)
    worst = []
    for _ in range(200):
        router(inputs)
        optimizer.step()
        worst.append((router.seen.max() / router.seen.double().mean()).item())
    assert worst[0] > 2.5
    assert max(worst[-10:]) < 1.3


def test_what_is_recomputed_is_counted_once() -> None:
    model = model_with_experts(balance="loss")
    plain = gradients(model)
    once = loads(model)
    clear_loads(model)
    distributed(model, Group(), recompute=True)
    assert model.runtime.run is recompute_block
    recomputed = gradients(model)
    assert loads(model) == once
    assert all(router.pending is None for _, router in routers(model))
    for one, other in zip(plain, recomputed, strict=True):
        assert torch.equal(one, other)


def gradients(model: Decoder, factor: float = 1.0) -> list[Tensor]:
    return list(torch.autograd.grad(factor * model.loss(TOKENS, TOKENS), list(model.parameters())))


@pytest.mark.parametrize("arm", ["gpt", "ngpt"])
def test_the_auxiliary_loss_is_in_the_gradient_and_not_in_the_loss(arm: str) -> None:
    """It comes with whatever the loss is multiplied by, as the part of a micro-batch in its batch."""
    models = [model_with_experts(arm, balance=b, coefficient=0.5) for b in ("none", "loss")]
    models[1].load_state_dict(models[0].state_dict())
    plain, penalized = (model.loss(TOKENS, TOKENS) for model in models)
    assert torch.equal(plain, penalized)
    none, full, half = gradients(models[0]), gradients(models[1]), gradients(models[1], 0.5)
    assert any((a - b).abs().max() > 1e-4 for a, b in zip(none, full, strict=True))
    for a, b in zip(full, half, strict=True):
        torch.testing.assert_close(0.5 * a, b)
    models[1].eval()
    for a, b in zip(none, gradients(models[1]), strict=True):
        assert torch.equal(a, b)


def test_the_auxiliary_loss_makes_the_load_more_even() -> None:
    worst = {}
    for coefficient in (0.0, 1.0):
        torch.manual_seed(0)
        model = model_with_experts(balance="loss", coefficient=coefficient)
        with torch.no_grad():
            for _, router in routers(model):
                router.weight[:2] *= 4
        optimizer = build_optimizer(model, OptimConfig(lr=3e-2))
        for _ in range(40):
            model.loss(TOKENS, TOKENS).backward()
            optimizer.step()
            optimizer.zero_grad()
        worst[coefficient] = max(router.seen.max().item() for _, router in routers(model)) / (2 * TOKENS.numel() / 6)
    assert worst[1.0] < 1.3
    assert worst[0.0] > 1.5


def test_roles_of_a_model_with_experts() -> None:
    roles = parameter_roles(model_with_experts())
    start = "blocks.0.experts.part."
    assert {name.removeprefix(start): role for name, role in roles.items() if name.startswith(start)} == {
        "router.weight": "router",
        **dict.fromkeys(("u.weight", "v.weight", "o.weight"), "matrix"),
        **dict.fromkeys(("s_moe.value", "s_u.value", "s_v.value"), "scale"),
    }


@pytest.mark.parametrize("optimizer", ["adamw", "gated_adamw", "muon"])
def test_every_optimizer_moves_banks_and_keeps_them_on_the_sphere(optimizer: str) -> None:
    from spherelm import departure

    model = model_with_experts()
    before = [p.detach().clone() for p in model.parameters()]
    made = build_optimizer(model, OptimConfig(lr=1e-2, optimizer=RULES[optimizer](), max_angle=0.1))
    losses = []
    for _ in range(5):
        loss = model.loss(TOKENS, TOKENS)
        loss.backward()
        made.step()
        made.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert departure(model) < 1e-6
    assert all(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_a_model_without_routers_is_refused() -> None:
    plain: Any = nn.Linear(3, 3)
    with pytest.raises(ValueError, match="nothing to balance: this model has no router"):
        attach_balancing(sgd(plain), plain)


def test_a_negative_rate_is_refused() -> None:
    with pytest.raises(ValueError, match="balance_rate must be at least 0, got -1"):
        OptimConfig(lr=1.0, balance_rate=-1)
