"""Which parameter learns how fast: groups by role, every per-role multiplier in one place, Adam for both arms."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import torch
from pydantic import NonNegativeFloat, PositiveFloat
from torch import Tensor, nn
from torch.optim import Optimizer

from spherelm.errors import UserError
from spherelm.fields import check
from spherelm.layers.linear import unit_modules
from spherelm.layers.moe import routers
from spherelm.optim.balancing import Summed, attach_balancing
from spherelm.optim.retraction import AngleCap, attach_retraction
from spherelm.optim.rules import AdamW, Rule
from spherelm.sharding import gathered

DECAYED_ROLES = ("input_embedding", "output_embedding", "matrix", "router")
"""Weight decay acts on these; never on gains and learned scales (nGPT paper, A.5)."""


@dataclass(frozen=True)
class RateMultipliers:
    """Factors of the peak learning rate, by role."""

    input_embedding: NonNegativeFloat = 1.0
    output_embedding: NonNegativeFloat = 1.0
    matrix: NonNegativeFloat = 1.0
    scale: NonNegativeFloat = 1.0
    gain: NonNegativeFloat = 1.0
    router: NonNegativeFloat = 1.0

    def __post_init__(self) -> None:
        check(self)


ROLES = tuple(f.name for f in fields(RateMultipliers))
"""The roles a parameter can have."""


EMBEDDING_CLASSES = (nn.Embedding, nn.EmbeddingBag)


@dataclass(frozen=True)
class OptimConfig:
    """How the weights are updated. The defaults are the paper's (Tables 2 and 3).

    Attributes:
        lr: Peak learning rate.
        optimizer: Optimizer, with its own fields: adamw, gated_adamw or muon.
        weight_decay: Fraction of a decayed weight that an update removes, times lr; the multipliers of roles do not
            count. null: the paper's, 0.1 for GPT and 0 for nGPT.
        grad_clip: Largest global gradient norm; null: no limit.
        multipliers: Factors of the peak rate, by role.
        max_angle: Radians by which one update may turn a unit vector of a block matrix; null: no limit.
        angle_follows_lr: Lower max_angle with the learning rate.
        balance_rate: Change of an expert's bias in one update, with balance=bias.
    """

    lr: PositiveFloat
    optimizer: Rule = AdamW()
    weight_decay: NonNegativeFloat | None = None
    grad_clip: PositiveFloat | None = 1.0
    multipliers: RateMultipliers = RateMultipliers()
    max_angle: PositiveFloat | None = None
    angle_follows_lr: bool = False
    balance_rate: NonNegativeFloat = 1e-3

    def __post_init__(self) -> None:
        check(self)


def parameter_roles(model: nn.Module) -> dict[str, str]:
    """The role of every trainable parameter, by its first name.

    Declared by the module that owns it (`role`); where nothing is declared, the weight of one of torch's embeddings is
    an "input_embedding", any other parameter of two or more dimensions a "matrix", and the rest are "gain"s. A weight
    shared by both embeddings is an "output_embedding" if it is declared as one.
    """
    roles: dict[str, str] = {}
    first_name: dict[int, str] = {}
    for prefix, module in model.named_modules():
        for suffix, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad:
                continue
            name = first_name.setdefault(id(parameter), f"{prefix}.{suffix}".lstrip("."))
            known = getattr(module, "role", None) or (
                "input_embedding" if isinstance(module, EMBEDDING_CLASSES) else None
            )
            role = known or ("matrix" if parameter.ndim >= 2 else "gain")
            if role not in ROLES:
                raise UserError(
                    f"{type(module).__name__} at {prefix!r} declares role {role!r}; roles are {', '.join(ROLES)}"
                )
            if roles.get(name) != "output_embedding" and (known or name not in roles):
                roles[name] = role
    return roles


def parameter_groups(model: nn.Module, config: OptimConfig) -> list[dict[str, Any]]:
    """One optimizer group for each role that occurs, with its `role`, `lr`, `lr_multiplier` and `weight_decay`."""
    roles, parameters = parameter_roles(model), dict(model.named_parameters())
    on_sphere = next(unit_modules(model), None) is not None
    decay = config.weight_decay if config.weight_decay is not None else (0.0 if on_sphere else 0.1)
    groups: list[dict[str, Any]] = []
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
                    "weight_decay": decay / multiplier if role in DECAYED_ROLES and multiplier else 0.0,
                }
            )
    return groups


def build_optimizer(model: nn.Module, config: OptimConfig, summed: Summed = torch.positive) -> Optimizer:
    """Build the optimizer of `config` for the parameters of `model`, with a parameter group per role.

        optimizer = build_optimizer(model, OptimConfig(lr=1e-2))

    It keeps unit weights on the sphere after each step and balances experts, where the model has them. The learning
    rate of a group is `lr * group["lr_multiplier"]`; `torch.optim.lr_scheduler` may change it.

    Args:
        model: The model to train, GPT, nGPT or any module with `UnitLinear` layers.
        config: The optimizer, its rates and limits.
        summed: Sums counts of experts over processes, as for `attach_balancing`.

    Returns:
        A torch optimizer.
    """
    optimizer = config.optimizer.build(model, parameter_groups(model, config), config.lr)
    if next(unit_modules(model), None) is not None:
        if config.max_angle is not None:
            AngleCap(optimizer, model, angle_limit(optimizer, config, config.max_angle))
        attach_retraction(optimizer, model, allow_decay=True)  # a config names it, or has none
    if next(routers(model), None) is not None:
        attach_balancing(optimizer, model, config.balance_rate, summed)
    return optimizer


def angle_limit(optimizer: Optimizer, config: OptimConfig, max_angle: float) -> float | Callable[[], float]:
    """`max_angle`, or a function that gives the same part of it as the present rate is of the peak."""
    moving = next((k for k, group in enumerate(optimizer.param_groups) if group["lr_multiplier"]), None)
    if not config.angle_follows_lr or moving is None:
        return max_angle

    return partial(_limit, optimizer, moving, config.lr, max_angle)


def _limit(optimizer: Optimizer, moving: int, lr: float, max_angle: float) -> float:
    group = optimizer.param_groups[moving]  # looked up anew: `load_state_dict` puts other groups in their places
    return float(max_angle * group["lr"] / (lr * group["lr_multiplier"]))


def clip_gradients(model: nn.Module, limit: float | None) -> Tensor:
    """Scale all gradients so that their global norm is at most `limit`;
    returns the norm before, without waiting for it.
    """
    norm = nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    length = gathered(norm)
    # Below the limit torch multiplies all of them by 1, which a processor, where nobody waits, is spared.
    is_below = limit is not None and length.device.type == "cpu" and length.item() + 1e-6 <= limit
    if limit is not None and not is_below:
        nn.utils.clip_grads_with_norm_(model.parameters(), limit, norm)
    return length


def set_rate(optimizer: Optimizer, lr: float) -> None:
    """Give every group the learning rate `lr` times its own multiplier."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_multiplier"]


def count_devices(optimizer: Optimizer) -> dict[Tensor, torch.device]:
    """Where the optimizer keeps its count of a parameter's updates, a tensor without dimensions.

    torch's fused and capturable ones do beside the parameter, any other on the CPU.
    """
    cpu = torch.device("cpu")
    return {
        parameter: parameter.device if group.get("fused") or group.get("capturable") else cpu
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
