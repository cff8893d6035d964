"""Copies and pickles of models, and of optimizers with what hangs on them: nothing is lost without a word."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import make_hybrid_case, make_pair_case
from configs import make_config
from torch import nn

from spherelm.layers.linear import UnitLinear, departure
from spherelm.layers.moe import routers
from spherelm.layers.rope import interpolated, rotary_table, yarn
from spherelm.models import build
from spherelm.models.decoder import Decoder
from spherelm.optim import RULES
from spherelm.optim.groups import OptimConfig, build_optimizer
from spherelm.optim.retraction import attach_retraction

SIZES = {"vocab_size": 23, "n_layers": 2, "d_model": 16, "n_heads": 2, "d_ff": 24, "max_seq_len": 8}


def pickled(thing: Any) -> Any:
    return pickle.loads(pickle.dumps(thing))


ways = pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled])
MODELS: dict[str, Callable[[Any], Any]] = {
    "gpt": lambda case: case("gpt"),
    "ngpt": lambda case: case("ngpt", logit_preconditioning=0.5),
    "hybrid of gpt": lambda case: make_hybrid_case("gpt", "MA-O", router_score="softmax"),
    "hybrid of ngpt": lambda case: make_hybrid_case("ngpt", "MA-O", balance="loss"),
    "encdec of gpt": lambda case: make_pair_case("gpt"),
    "encdec of ngpt": lambda case: make_pair_case("ngpt"),
}


@ways
@pytest.mark.parametrize("name", MODELS)
def test_a_copied_model_is_the_model(name: str, duplicate: Callable[[Any], Any], case: Any) -> None:
    c = MODELS[name](case)
    twin = duplicate(c.model)
    assert torch.equal(twin.loss(*c.batch), c.model.loss(*c.batch))
    assert not {id(p) for p in twin.parameters()} & {id(p) for p in c.model.parameters()}


@ways
@pytest.mark.parametrize("table", [interpolated(rotary_table, 2.0), yarn(4.0, 8)])
def test_a_copied_model_keeps_its_positions(table: Any, duplicate: Callable[[Any], Any], case: Any) -> None:
    c = case("ngpt")
    before = c.model(c.tokens)
    c.model.runtime.table = table
    assert torch.equal(duplicate(c.model)(c.tokens), c.model(c.tokens))
    assert not torch.equal(c.model(c.tokens), before)


def trained(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, seed: int) -> None:
    """Steps along gradients that are drawn, the same for equal seeds."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()


@ways
@pytest.mark.parametrize("times", [1, 2])
def test_a_copied_optimizer_keeps_the_copied_model_on_the_sphere(duplicate: Callable[[Any], Any], times: int) -> None:
    model = nn.Sequential(UnitLinear(6, 5), UnitLinear(5, 4, writes=True))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.5, weight_decay=0.0)
    attach_retraction(optimizer, model)
    trained(model, optimizer, 2, seed=0)
    twin, twin_optimizer = model, optimizer
    for _ in range(times):
        twin, twin_optimizer = duplicate((twin, twin_optimizer))
    for each, own in ((model, optimizer), (twin, twin_optimizer)):
        trained(each, own, 2, seed=1)
        assert departure(each) < 3e-7
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@ways
@pytest.mark.parametrize("name", RULES)
def test_everything_that_build_optimizer_attaches_is_kept(duplicate: Callable[[Any], Any], name: str) -> None:
    """The cap on angles, which follows the rate, the retraction, and the balancing of experts."""
    config = make_config("ngpt", **SIZES, pattern="-O", n_experts=4)
    model = build(config)
    optimizer = build_optimizer(
        model, OptimConfig(lr=0.3, optimizer=RULES[name](), max_angle=0.01, angle_follows_lr=True)
    )
    tokens = torch.randint(23, (4, 8))
    learned(model, optimizer, tokens, 2)
    twin, twin_optimizer = duplicate((model, optimizer))
    for each, own in ((model, optimizer), (twin, twin_optimizer)):
        for group in own.param_groups:
            group["lr"] /= 2  # of the cap too, which looks at the groups of its own optimizer
        learned(each, own, tokens, 2)
    for (key, ours), theirs in zip(model.state_dict().items(), twin.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), key
    assert next(routers(twin))[1].score_bias.any()
    assert departure(twin) < 3e-7


def learned(model: Decoder, optimizer: torch.optim.Optimizer, tokens: torch.Tensor, steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        model.loss(tokens, tokens.roll(-1, 1)).backward()
        optimizer.step()


@ways
def test_what_was_removed_is_not_copied(duplicate: Callable[[Any], Any]) -> None:
    model = nn.Sequential(UnitLinear(6, 5))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    attach_retraction(optimizer, model).remove()
    twin, twin_optimizer = duplicate((model, optimizer))
    trained(twin, twin_optimizer, 1, seed=0)
    assert departure(twin) > 0.01


def test_a_dropped_optimizer_is_freed_at_once() -> None:
    """And its moments with it, without the garbage collector's help."""
    model = nn.Sequential(UnitLinear(6, 5))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    attach_retraction(optimizer, model)
    gone = weakref.ref(optimizer)
    gc.disable()
    try:
        del optimizer
        assert gone() is None
    finally:
        gc.enable()
