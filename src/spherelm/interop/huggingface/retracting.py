"""Models in transformers stay on the sphere by themselves, whoever trains them:
its Trainer makes an optimizer of its own.

After a step of any torch optimizer, the weights that it moves are retracted, as by `attach_retraction`, of models that
are `kept`. What moves weights in another way (in the backward pass, through copies) is found by `check_departure`.
"""

from __future__ import annotations

from functools import cache
from typing import Any
from weakref import WeakSet

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from spherelm import sphere
from spherelm.errors import UserError
from spherelm.layers.linear import retract_weights, unit_modules
from spherelm.sharding import is_sharded, own_vectors

FAR = 0.01
"""A departure from the sphere that rounding to bfloat16 does not reach."""

kept: WeakSet[nn.Module] = WeakSet()
"""The models that stay on the sphere."""


def keep(model: nn.Module) -> None:
    """Keep `model` on the sphere from now on."""
    kept.add(model)
    follow_optimizers()


@cache
def follow_optimizers() -> None:
    """Have `retract_moved` called after the steps of all optimizers, once in a process."""
    register_optimizer_step_post_hook(retract_moved)


def retract_moved(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    """Put the unit weights that `optimizer` moves back on the sphere, in every model that is `kept`."""
    moved = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for model in list(kept):
        found: list[tuple[Any, int]] = []
        for name, module, axis in unit_modules(model):
            weight: Any = module.weight
            if id(weight) in moved:
                if weight.ndim < 2:
                    raise UserError(f"{name} is cut within its vectors, which cannot be kept on the sphere: use FSDP 2")
                found.append((weight, axis))
        retract_weights(found)


@torch.no_grad()
def check_departure(model: nn.Module) -> None:
    """Raise `ValueError` if a weight of `model` that is trained has left the sphere."""
    for name, module, axis in unit_modules(model):
        weight: Any = module.weight
        own = own_vectors(weight, axis)
        # What is cut within vectors, or not in memory now, says nothing; what is off is so in other weights too.
        whole = own.ndim > 1 and not is_sharded(own) and own.untyped_storage().nbytes() > 0
        if weight.requires_grad and whole:
            far = (sphere.retraction_factor(sphere.squared_length(own, dim=axis)) - 1).abs().max().item()
            if far > FAR:
                raise UserError(
                    f"{name} is trained and {far:.2g} off the unit sphere: call spherelm.retract(model) now, and after "
                    "every update that is not a step of a torch optimizer; shard by FSDP 2, not 1"
                )
