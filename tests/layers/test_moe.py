"""Mixtures of experts against the oracle, against every expert on every token, and what routers count."""

from __future__ import annotations

from typing import Any

import paper
import paper_moe
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spherelm.layers.feedforward import FeedForward, UnitFeedForward
from spherelm.layers.linear import Scale, departure, retract, unit_modules
from spherelm.layers.moe import (
    MixtureOfExperts,
    Router,
    UnitMixtureOfExperts,
    balance_loss,
    clear_loads,
    grouped,
    idle_weights,
    pending_losses,
    routers,
    uncounted,
)

D, D_FF, E = 12, 20, 5
SHAPE = paper.Shape(1, D, 2, 2)
Mixture = MixtureOfExperts | UnitMixtureOfExperts


def baseline(top_k: int = 2, n_shared: int = 0, **router: Any) -> MixtureOfExperts:
    module = MixtureOfExperts(
        D, D_FF, Router(D, E, top_k, **router), [FeedForward(D, D_FF + 4) for _ in range(n_shared)]
    )
    return settled(module)


def on_sphere(top_k: int = 2, n_shared: int = 0, **router: Any) -> UnitMixtureOfExperts:
    shared = [UnitFeedForward(D, D_FF, Scale(D_FF, 1.0, 1.0), Scale(D_FF, 1.0, 1.0)) for _ in range(n_shared)]
    scales = Scale(1, 1.0, 1.0), Scale((E, D_FF), 1.0, 1.0), Scale((E, D_FF), 1.0, 1.0)
    return settled(UnitMixtureOfExperts(D, D_FF, Router(D, E, top_k, **router), *scales, shared=shared))


def settled(module: Any) -> Any:
    """In float64 and on the sphere, all scales different, a bias that changes what is picked."""
    module.double()
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name.endswith("value"):
                parameter.mul_(1 + 0.5 * torch.randn_like(parameter))
        module.router.score_bias.copy_(torch.randn(E))
        module.router.weight.mul_(3)
    retract(module)
    return module


def weights(module: nn.Module) -> paper.Params:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def unit(*shape: int) -> Tensor:
    return paper.norm(torch.randn(*shape, D, dtype=torch.float64)).requires_grad_()


def dense(module: Any, h: Tensor) -> Tensor:
    """Every expert computes every token; what was not picked has weight 0."""
    x = h.flatten(0, 1)
    experts, picked = module.router(x, *([module.s_moe() * D**0.5] if hasattr(module, "s_moe") else []))
    weights = torch.zeros(len(x), E, dtype=h.dtype).scatter(1, experts, picked)
    u, v = (torch.einsum("td,efd->tef", x, bank.weight) for bank in (module.u, module.v))
    if hasattr(module, "s_u"):
        u, v = u * module.s_u(), v * module.s_v() * D**0.5
    made = torch.einsum("tef,edf->ted", u * F.silu(v), module.o.weight)
    out = (weights[..., None] * made).sum(1).view_as(h)
    return out + sum(expert(h) for expert in module.shared)


VARIANTS = [
    {"score": "sigmoid"},
    {"score": "softmax"},
    {"score": "sigmoid", "normalize": False, "top_k": 1},
    {"score": "softmax", "normalize": False, "n_shared": 2, "top_k": 3},
    {"score": "sigmoid", "n_shared": 1, "top_k": E},
]
variants = pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: " ".join(map(str, v.values())))
both = pytest.mark.parametrize("make", [baseline, on_sphere])


def how(variant: dict[str, Any]) -> paper_moe.Experts:
    return paper_moe.Experts(
        variant.get("top_k", 2), variant["score"], variant.get("normalize", True), variant.get("n_shared", 0)
    )


@variants
@both
def test_the_mixture_and_its_gradients_are_the_papers(make: Any, variant: dict[str, Any], agree: Any) -> None:
    module, h = make(**variant), unit(2, 7)
    p = weights(module)
    oracle = paper_moe.moe if make is on_sphere else paper_moe.gpt_moe
    leaves = [h, *module.parameters()]
    agree(module(h), oracle(p, "", SHAPE, how(variant), h), leaves)


@variants
@both
def test_it_is_every_expert_on_every_token_masked(make: Any, variant: dict[str, Any], agree: Any) -> None:
    module, h = make(**variant), unit(3, 11)
    agree(module(h), dense(module, h), [h, *module.parameters()])


@both
def test_an_expert_without_tokens_is_left_alone(make: Any) -> None:
    module, h = make(), unit(2, 7)
    module.router.score_bias[3] = -99.0
    module(h).sum().backward()
    for bank in (module.u, module.v, module.o):
        assert bank.weight.grad[3].abs().max() == 0
        assert bank.weight.grad[:3].abs().max() > 0
    assert module.router.load[3] == 0


@both
def test_one_token_alone_is_computed_as_among_others(make: Any) -> None:
    module, h = make(), unit(2, 7)
    together = module(h)
    for row in range(2):
        for place in range(7):
            torch.testing.assert_close(module(h[row : row + 1, place : place + 1])[0, 0], together[row, place])


@both
def test_it_computes_in_the_dtype_of_its_input_and_routes_in_float32(make: Any) -> None:
    module = make().float()
    h = unit(2, 7).float()
    out = module(h.bfloat16())
    assert out.dtype == torch.bfloat16
    _, picked = module.router(h.flatten(0, 1).bfloat16())
    assert picked.dtype == torch.float32
    torch.testing.assert_close(picked.sum(-1), torch.ones(14))
    torch.testing.assert_close(out.float(), module(h.bfloat16().float()), rtol=0.05, atol=0.05)


@pytest.mark.parametrize(("make", "balance"), [(baseline, "bias"), (on_sphere, "loss")])
# Of the compiler, at any autograd function that it meets.
@pytest.mark.filterwarnings("ignore:.*autograd.function.Function.*should not be instantiated:DeprecationWarning")
def test_traced_is_eager(make: Any, balance: str) -> None:
    """As one graph, without code made of it: what torch must know to compile it."""
    module, h = make(balance=balance), unit(2, 7)
    other = make(balance=balance)
    other.load_state_dict(module.state_dict())
    other.compile(backend="aot_eager", fullgraph=True)
    found = []
    for each in (module, other):
        loss = each(h).square().sum()
        for pending in pending_losses(each):
            loss = loss + pending
        gradients = torch.autograd.grad(loss, [h, *each.parameters()])
        found.append([loss, *gradients, each.router.load.double()])
    for eager, traced in zip(*found, strict=True):
        torch.testing.assert_close(traced, eager)


def test_banks_are_retracted_along_their_own_axes() -> None:
    module = on_sphere()
    axes = {name: axis for name, _, axis in unit_modules(module)}
    assert axes == {"u": 2, "v": 2, "o": 1}
    with torch.no_grad():
        for bank in (module.u, module.v, module.o):
            bank.weight.mul_(3 + torch.rand_like(bank.weight))
    wanted = {name: paper.norm(getattr(module, name).weight.detach().clone(), axis) for name, axis in axes.items()}
    router = module.router.weight.clone()
    retract(module)
    for name, weight in wanted.items():
        torch.testing.assert_close(getattr(module, name).weight.detach(), weight, rtol=1e-14, atol=1e-15)
    assert departure(module) < 1e-14
    assert torch.equal(module.router.weight, router), "a router is not on the sphere"


@pytest.mark.parametrize("score", ["sigmoid", "softmax"])
def test_the_auxiliary_loss_and_its_gradient_are_the_papers(score: str, agree: Any) -> None:
    module, h = baseline(score=score, balance="loss", coefficient=0.25), unit(2, 7)
    module(h)
    (pending,) = pending_losses(module)
    oracle = 0.25 * paper_moe.balance_loss(weights(module), "", how({"score": score}), h)
    agree(pending, oracle, [h, module.router.weight])
    assert pending_losses(module) == [], "each is given once"
    module.eval()(h)
    assert pending_losses(module) == []


def test_the_auxiliary_loss_of_even_experts_is_one_and_of_one_expert_their_number() -> None:
    even = torch.arange(E)[:, None]
    assert balance_loss(torch.full((E, E), 0.3), even) == pytest.approx(1.0)
    assert balance_loss(F.one_hot(torch.zeros(7, dtype=torch.int64), E).float(), torch.zeros(7, 1).long()) == E


def test_choices_are_grouped_by_expert_in_the_order_of_tokens() -> None:
    groups = grouped(torch.tensor([[2, 0], [2, 3], [0, 2]]), 5)
    assert groups.order.tolist() == [1, 4, 0, 2, 5, 3]
    assert groups.ends.tolist() == [2, 2, 5, 6, 6]
    assert groups.order[groups.place].tolist() == list(range(6))


def test_the_load_counts_choices_in_training_and_nothing_else() -> None:
    module, h = baseline(), unit(2, 7)
    experts = module.router(h.flatten(0, 1)).experts
    clear_loads(module)
    assert module.router.load.tolist() == [0] * E
    for _ in range(3):
        module(h)
    assert module.router.load.tolist() == (3 * experts.flatten().bincount(minlength=E)).tolist()
    with uncounted(module):
        module(h)
    module.eval()(h)
    assert module.router.load.sum() == 3 * 2 * 14
    assert [name for name, _ in routers(module)] == ["router"]
    assert sorted(set(module.state_dict()) - {name for name, _ in module.named_parameters()}) == ["router.score_bias"]


def test_a_router_forgets_its_balance() -> None:
    router = Router(D, E, 2, balance="loss")
    router.score_bias += 1
    router(torch.randn(4, D))
    router.seen += router.load
    router.reset_balance()
    assert [buffer.abs().sum() for buffer in router.buffers()] == [0, 0, 0]
    assert router.pending is None


@both
def test_idle_weights_are_those_of_experts_that_a_token_does_not_meet(make: Any) -> None:
    module = make(top_k=2, n_shared=1)
    per_expert = 3 * D * D_FF + (2 * D_FF if make is on_sphere else 0)
    assert idle_weights(nn.Sequential(module, make(top_k=4))) == (E - 2 + E - 4) * per_expert


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"top_k": 6}, "top_k=6 of n_experts=5 cannot be picked: choose 1 to 5"),
        ({"top_k": 0}, "top_k=0 of n_experts=5 cannot be picked: choose 1 to 5"),
        ({"score": "relu"}, "unknown router score 'relu': choose one of sigmoid, softmax"),
        ({"balance": "luck"}, "unknown balance 'luck': choose one of bias, loss, none"),
    ],
)
def test_what_cannot_be_is_said(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Router(D, E, **{"top_k": 2, **fields})
