"""The optimizers as settings: each names its own fields, builds itself, and knows how much state it keeps."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any, Literal

import torch
from torch import nn
from torch.optim import Optimizer

from spherelm.errors import UserError
from spherelm.layers.linear import unit_modules
from spherelm.optim.gated_adamw import GatedAdamW as GatedAdamWOptimizer
from spherelm.optim.muon import MuonAdamW, product_dtype


@dataclass(frozen=True)
class AdamW:
    """Adam with decoupled weight decay, torch's own; with weight decay 0, as on the sphere, it is Adam.

    betas, eps: the paper's (Tables 2 and 3).
    """

    kind: Literal["adamw"] = "adamw"
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8

    def __post_init__(self) -> None:
        check_adam(self)

    def build(self, model: nn.Module, groups: list[dict[str, Any]], lr: float) -> Optimizer:
        """The optimizer of `groups`, which are `parameter_groups` of `model`."""
        return torch.optim.AdamW(groups, lr=lr, betas=self.betas, eps=self.eps, fused=can_fuse(model))

    def state_size(self, counts: Mapping[str, int]) -> int:
        """How many numbers of state it keeps for so many parameters of each role: two moments each."""
        return 2 * sum(counts.values())


@dataclass(frozen=True)
class GatedAdamW:
    """AdamW whose steps are gated where gradients are small ("Training nGPT", arXiv 2608.01284).

    eps_gate: where the gate is half open. gate_sharpness: the paper's a. gated_step: the paper's alpha.
    """

    kind: Literal["gated_adamw"] = "gated_adamw"
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    eps_gate: float = 1e-8
    gate_sharpness: float = 0.5
    gated_step: float = 1.0

    def __post_init__(self) -> None:
        check_adam(self)
        for name in ("eps_gate", "gate_sharpness", "gated_step"):
            if not (is_finite(value := getattr(self, name)) and value > 0):
                raise UserError(f"{name} must be a positive number, got {value!r}")

    def build(self, model: nn.Module, groups: list[dict[str, Any]], lr: float) -> Optimizer:
        """As `AdamW.build`."""
        gate = {"eps_gate": self.eps_gate, "a": self.gate_sharpness, "alpha": self.gated_step}
        return GatedAdamWOptimizer(groups, lr, self.betas, self.eps, **gate)

    def state_size(self, counts: Mapping[str, int]) -> int:
        """As `AdamW.state_size`."""
        return 2 * sum(counts.values())


@dataclass(frozen=True)
class Muon:
    """Muon for block matrices, and Adam, with these betas and eps, for everything else.

    momentum: Muon's. tangent: project the gradients of unit vectors onto the tangent space first.
    """

    kind: Literal["muon"] = "muon"
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    momentum: float = 0.95
    tangent: bool = False

    def __post_init__(self) -> None:
        check_adam(self)
        if not (is_number(self.momentum) and 0 <= self.momentum < 1):
            raise UserError(f"momentum must lie in [0, 1), got {self.momentum!r}")

    def build(self, model: nn.Module, groups: list[dict[str, Any]], lr: float) -> Optimizer:
        """As `AdamW.build`. A bank of experts is as many matrices as it has experts; routers are left to Adam."""
        axes = {id(module.weight): axis for _, module, axis in unit_modules(model)}
        for group in groups:
            if group["role"] == "matrix":
                unit_axes = [axes.get(id(parameter)) for parameter in group["params"]]
                group |= {"muon": True, "momentum": self.momentum, "tangent": self.tangent, "unit_axes": unit_axes}
        return MuonAdamW(groups, lr, self.betas, self.eps, can_fuse(model), product_dtype(model))

    def state_size(self, counts: Mapping[str, int]) -> int:
        """As `AdamW.state_size`, one moment for each number of a block matrix."""
        return 2 * sum(counts.values()) - counts.get("matrix", 0)


Rule = AdamW | GatedAdamW | Muon

SMALLEST_EPS = 2.0**-126
"""The smallest normal number of float32. Adam divides by eps where a gradient is zero."""

RULES: dict[str, type[Rule]] = {"adamw": AdamW, "gated_adamw": GatedAdamW, "muon": Muon}
"""By the name that `kind` has."""


def check_adam(rule: AdamW | GatedAdamW | Muon) -> None:
    """Raise `ValueError` for betas or an eps that Adam cannot have."""
    if not (isinstance(rule.betas, list | tuple) and len(rule.betas) == 2 and all(map(is_number, rule.betas))):
        raise UserError(f"betas must be two numbers, such as [0.9, 0.95], got {rule.betas!r}")
    if not all(0 <= beta < 1 for beta in rule.betas):
        raise UserError(f"betas must lie in [0, 1), got {rule.betas}")
    object.__setattr__(rule, "betas", tuple(map(float, rule.betas)))  # torch refuses a 0 beside a 0.95
    if not (is_finite(rule.eps) and rule.eps >= SMALLEST_EPS):
        raise UserError(
            f"eps must be a number of at least {SMALLEST_EPS:.3g}, got {rule.eps!r}: "
            "Adam divides by it where a gradient is zero"
        )


def can_fuse(model: nn.Module) -> bool:
    """Whether torch has a fused Adam for all parameters of `model`."""
    return all(p.device.type in ("cpu", "cuda", "mps") for p in model.parameters())


def is_number(value: Any) -> bool:
    """Whether `value` is a number, which true and false are not."""
    return isinstance(value, Real) and not isinstance(value, bool)


def is_finite(value: Any) -> bool:
    """Whether `value` is a number and no infinity."""
    return is_number(value) and abs(value) <= sys.float_info.max
