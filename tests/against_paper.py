"""What every case of a model is held to by the oracle: logits, loss and gradients, training, retraction."""

from __future__ import annotations

from typing import Any

import paper
import pytest
import torch
from oracle_names import oracle_names, oracle_parameters
from torch import Tensor, nn

from spherelm.layers.linear import departure, retract, unit_modules
from spherelm.optim import OptimConfig, build_optimizer

LR = 3e-3


def disturb(model: nn.Module, arm: str, noise: torch.Generator) -> paper.Params:
    """Make all gains and scales differ and some alphas negative, so that nothing cancels; the weights for the oracle."""
    with torch.no_grad():
        for name, parameter in oracle_parameters(model):
            axis = paper.unit_axis(name)
            if axis is None:
                parameter.mul_(1 + 0.5 * torch.randn(parameter.shape, generator=noise, dtype=torch.float64))
            if name.endswith("conv_bias"):
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=noise, dtype=torch.float64))
            if "alpha" in name:
                parameter.mul_(4 * torch.randn(parameter.shape, generator=noise, dtype=torch.float64))
            if arm == "gpt" and axis is not None:
                parameter.mul_(5)
            # float32 initialization is unit to 1e-7 only: here the oracle and the model start at the same double
            if arm == "ngpt" and axis is not None:
                parameter.copy_(paper.norm(parameter, axis))
    return {name: parameter.detach().clone() for name, parameter in oracle_parameters(model)}


def assert_near(ours: Tensor, oracle: Tensor, tolerance: float, what: str = "") -> None:
    """Equal to so much of the oracle's largest number."""
    assert ours.shape == oracle.shape
    assert (ours - oracle).abs().max() <= tolerance * oracle.abs().max(), what


def assert_computes(c: Any, tolerance: float = 1e-12) -> None:
    """Logits, the loss and every gradient are the oracle's."""
    inputs = getattr(c, "pair", c.tokens)
    logits = c.model(*inputs) if isinstance(inputs, tuple) else c.model(inputs)
    assert_near(logits, c.forward(c.weights, c.shape, inputs), 1e-12)
    loss, gradients = paper.loss_and_gradients(c.forward, c.weights, c.shape, inputs, c.targets)
    ours = c.model.loss(getattr(c, "joined", c.tokens), c.targets)
    ours.backward()
    assert ours.item() == pytest.approx(loss.item(), rel=1e-13)
    parameters = dict(oracle_parameters(c.model))
    assert parameters.keys() == gradients.keys()
    for key, gradient in gradients.items():
        assert_near(parameters[key].grad, gradient, tolerance, key)


def assert_trains(c: Any, updates: int) -> None:
    """Losses and weights are the oracle's over so many updates, and every weight moves."""
    optimizer, losses = build_optimizer(c.model, OptimConfig(lr=LR)), []
    for batch in c.batches(updates):
        optimizer.zero_grad()
        loss = c.model.loss(*batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(c.model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    batches = c.oracle_batches(updates) if hasattr(c, "oracle_batches") else c.batches(updates)
    wanted, weights = paper.train(c.forward, c.weights, c.shape, batches, paper.paper_recipe(c.arm, LR))
    assert losses == pytest.approx(wanted, rel=1e-9)
    for name, p in oracle_parameters(c.model):
        assert (p.detach() - weights[name]).abs().max() <= 1e-9 * weights[name].abs().max(), name
        assert (p.detach() - c.weights[name]).abs().max() > 1e-6, f"{name} did not move"


def assert_retracts(c: Any) -> set[str]:
    """Every matrix is declared along the paper's axis and goes back to the sphere along it; their names."""
    names = oracle_names(c.model.state_dict())
    declared = {names[f"{name}.weight"]: axis for name, _, axis in unit_modules(c.model)}
    assert declared == {name: axis for name in c.weights if (axis := paper.unit_axis(name)) is not None}
    with torch.no_grad():
        for parameter in c.model.parameters():
            parameter.mul_(1.7)
    wanted = paper.retract({name: p.detach() for name, p in oracle_parameters(c.model)})
    retract(c.model)
    assert departure(c.model) < 1e-14
    for name, parameter in oracle_parameters(c.model):
        assert_near(parameter.detach(), wanted[name], 1e-14, name)
    return set(declared)
