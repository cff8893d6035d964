"""Which parameter learns how fast: groups by role, every per-role multiplier in one place, Adam for both arms."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields

import torch
from torch import nn
from torch.optim import AdamW

from spherelm.layers.linear import unit_modules
from spherelm.optim.retraction import attach_retraction

DECAYED_ROLES = ("input_embedding", "output_embedding", "matrix")
"""Weight decay acts on these; never on gains and learned scales (nGPT paper, A.5)."""


@dataclass(frozen=True)
class RateMultipliers:
    """What the peak learning rate is multiplied by, role by role."""

    input_embedding: float = 1.0
    output_embedding: float = 1.0
    matrix: float = 1.0
    scale: float = 1.0
    gain: float = 1.0


ROLES = tuple(f.name for f in fields(RateMultipliers))
"""The roles a parameter can have."""


@dataclass(frozen=True)
class OptimConfig:
    """How the weights are updated; the defaults are the paper's (Tables 2 and 3).

    lr: the peak learning rate. weight_decay: `None` means the paper's for the arm, 0.1 for a plain model and 0 on the
    sphere. grad_clip: the largest global gradient norm, `None` for no limit.
    """

    lr: float
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float | None = None
    grad_clip: float | None = 1.0
    multipliers: RateMultipliers = field(default_factory=RateMultipliers)

    def __post_init__(self) -> None:
        if not (self.lr > 0 and math.isfinite(self.lr)):
            raise ValueError(f"the learning rate must be a positive number, got {self.lr}")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas must lie in [0, 1), got {self.betas}")
        if self.grad_clip is not None and not self.grad_clip > 0:
            raise ValueError(f"grad_clip must be positive or None, got {self.grad_clip}")
        if self.weight_decay is not None and self.weight_decay < 0:
            raise ValueError(f"weight_decay must not be negative, got {self.weight_decay}")


def parameter_roles(model: nn.Module) -> dict[str, str]:
    """The role of every trainable parameter, by its first name.

    Declared by the module that owns it (`role`); where nothing is declared, a parameter of two or more dimensions is a
    "matrix" and any other a "gain". A weight shared by both embeddings is an "output_embedding".
    """
    roles: dict[str, str] = {}
    first_name: dict[int, str] = {}
    for prefix, module in model.named_modules():
        for suffix, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad:
                continue
            name = first_name.setdefault(id(parameter), f"{prefix}.{suffix}".lstrip("."))
            role = getattr(module, "role", None) or ("matrix" if parameter.ndim >= 2 else "gain")
            if role not in ROLES:
                raise ValueError(
                    f"{type(module).__name__} at {prefix!r} declares role {role!r}; roles are {', '.join(ROLES)}"
                )
            if roles.get(name) != "output_embedding":
                roles[name] = role
    return roles


def parameter_groups(model: nn.Module, config: OptimConfig) -> list[dict[str, object]]:
    """One optimizer group for each role that occurs, with its `role`, `lr`, `lr_multiplier` and `weight_decay`."""
    roles, parameters = parameter_roles(model), dict(model.named_parameters())
    on_sphere = next(unit_modules(model), None) is not None
    decay = config.weight_decay if config.weight_decay is not None else (0.0 if on_sphere else 0.1)
    groups: list[dict[str, object]] = []
    for role in ROLES:
        names = [name for name in roles if roles[name] == role]
        multiplier = getattr(config.multipliers, role)
        if names:
            groups.append(
                {
                    "params": [parameters[name] for name in names],
                    "role": role,
                    "lr": config.lr * multiplier,
                    "lr_multiplier": multiplier,
                    "weight_decay": decay if role in DECAYED_ROLES else 0.0,
                }
            )
    return groups


def build_optimizer(model: nn.Module, config: OptimConfig) -> AdamW:
    """AdamW over the groups of `model`, retraction attached if any of its weights live on the sphere.

    With weight decay 0, as on the sphere, AdamW is Adam. The learning rate of a group is `lr * lr_multiplier`; a schedule
    sets it to `factor * lr * lr_multiplier` before each step.
    """
    fused = all(p.device.type in ("cpu", "cuda", "mps") for p in model.parameters())
    optimizer = AdamW(parameter_groups(model, config), lr=config.lr, betas=config.betas, eps=config.eps, fused=fused)
    if next(unit_modules(model), None) is not None:
        attach_retraction(optimizer, model)
    return optimizer


def set_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every group the learning rate `lr` times its own multiplier."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_multiplier"]
