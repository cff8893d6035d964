"""The optimizers as settings: each names its own fields, builds itself, and knows how much state it keeps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args

import torch
from pydantic import Discriminator, Field, PositiveFloat, Strict
from torch import nn
from torch.optim import Optimizer

from spherelm.fields import BelowOne, check
from spherelm.layers.linear import unit_modules
from spherelm.optim.gated_adamw import GatedAdamW as GatedAdamWOptimizer
from spherelm.optim.muon import MuonAdamW, product_dtype

Betas = Annotated[tuple[BelowOne, BelowOne], Strict(False)]
"""Adam's, also as a list."""

Eps = Annotated[float, Field(ge=2.0**-126)]
"""Adam's, at least the smallest normal number of float32: Adam divides by it where a gradient is zero."""


@dataclass(frozen=True)
class AdamW:
    """Adam with decoupled weight decay, torch's own; with weight decay 0, as on the sphere, it is Adam.

    Attributes:
        betas: Adam's betas; the defaults are the paper's (Tables 2 and 3).
        eps: Adam's eps.
    """

    kind: Literal["adamw"] = "adamw"
    betas: Betas = (0.9, 0.95)
    eps: Eps = 1e-8

    def __post_init__(self) -> None:
        check(self)

    def build(self, model: nn.Module, groups: list[dict[str, Any]], lr: float) -> Optimizer:
        """The optimizer of `groups`, which are `parameter_groups` of `model`."""
        return torch.optim.AdamW(groups, lr=lr, betas=self.betas, eps=self.eps, fused=can_fuse(model))

    def state_size(self, counts: Mapping[str, int]) -> int:
        """How many numbers of state it keeps for so many parameters of each role: two moments each."""
        return 2 * sum(counts.values())


@dataclass(frozen=True)
class GatedAdamW:
    """AdamW whose steps are gated where gradients are small ("Training nGPT", arXiv 2608.01284).

    Attributes:
        betas: Adam's betas.
        eps: Adam's eps.
        eps_gate: Denominator of Adam at which the gate is half open.
        gate_sharpness: Sharpness of the gate, the paper's a.
        gated_step: Factor of the gated step, the paper's alpha.
    """

    kind: Literal["gated_adamw"] = "gated_adamw"
    betas: Betas = (0.9, 0.95)
    eps: Eps = 1e-8
    eps_gate: PositiveFloat = 1e-8
    gate_sharpness: PositiveFloat = 0.5
    gated_step: PositiveFloat = 1.0

    def __post_init__(self) -> None:
        check(self)

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

    Attributes:
        betas: Adam's betas.
        eps: Adam's eps.
        momentum: Momentum of Muon.
        hyperball: Matrices of GPT keep their initial norm, have no weight decay, and turn by the rate as an angle
            (Hyperball, arXiv 2606.16899, MuonH).
    """

    kind: Literal["muon"] = "muon"
    betas: Betas = (0.9, 0.95)
    eps: Eps = 1e-8
    momentum: BelowOne = 0.95
    hyperball: bool = False

    def __post_init__(self) -> None:
        check(self)

    def build(self, model: nn.Module, groups: list[dict[str, Any]], lr: float) -> Optimizer:
        """As `AdamW.build`. A bank of experts is as many matrices as it has experts; routers are left to Adam."""
        axes = {id(module.weight): axis for _, module, axis in unit_modules(model)}
        for group in groups:
            if group["role"] == "matrix":
                unit_axes = [axes.get(id(parameter)) for parameter in group["params"]]
                group |= {"muon": True, "momentum": self.momentum, "hyperball": self.hyperball, "unit_axes": unit_axes}
                group |= {"weight_decay": 0.0} if self.hyperball else {}
        return MuonAdamW(groups, lr, self.betas, self.eps, can_fuse(model), product_dtype(model))

    def state_size(self, counts: Mapping[str, int]) -> int:
        """As `AdamW.state_size`, one moment for each number of a block matrix."""
        return 2 * sum(counts.values()) - counts.get("matrix", 0)


Rule = Annotated[AdamW | GatedAdamW | Muon, Discriminator("kind")]

RULES: dict[str, type[Rule]] = {rule.kind: rule for rule in get_args(get_args(Rule)[0])}
"""By the name that `kind` has."""


def can_fuse(model: nn.Module) -> bool:
    """Whether torch has a fused Adam for all parameters of `model`."""
    return all(p.device.type in ("cpu", "cuda", "mps") for p in model.parameters())
