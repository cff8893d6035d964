"""The one line that makes any training loop an nGPT loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from spherelm import sphere
from spherelm.layers.linear import retract, unit_modules


def attach_retraction(optimizer: Optimizer, model: nn.Module) -> RemovableHandle:
    """Put the declared weights of `model` on the sphere now and after every step of `optimizer` (nGPT, section 2.6).

    Works under any loop that calls `optimizer.step()`: Hugging Face Trainer, Accelerate, Lightning, your own. Adam's
    moments are left alone. Returns the hook's handle; `handle.remove()` undoes it.
    """
    retract(model)

    def after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        retract(model)

    return optimizer.register_step_post_hook(after_step)


class AngleCap:
    """Lets no unit vector of a block matrix turn by more than an angle in one optimizer step (arXiv 2608.01284).

    Attach it before the retraction, which then sees what it leaves: `AngleCap(optimizer, model, angle)`. The embeddings are
    not capped. angle: radians, or a function that gives them when a step ends, for a cap that follows a schedule. It holds
    a copy of the capped weights during a step.
    """

    def __init__(self, optimizer: Optimizer, model: nn.Module, angle: float | Callable[[], float]) -> None:
        self._angle = angle
        self._capped = [(module, axis) for _, module, axis in unit_modules(model) if _role(module) == "matrix"]
        self._before: list[Tensor] = []
        self._handles = (
            optimizer.register_step_pre_hook(self._remember),
            optimizer.register_step_post_hook(self._cap),
        )

    def remove(self) -> None:
        """Undo the attachment."""
        for handle in self._handles:
            handle.remove()

    def _remember(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._before = [_weight(module).detach().clone() for module, _ in self._capped]

    @torch.no_grad()
    def _cap(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        angle = self._angle() if callable(self._angle) else self._angle
        for (module, axis), before in zip(self._capped, self._before, strict=True):
            _weight(module).copy_(sphere.capped_move(before, _weight(module), angle, dim=axis))
        self._before = []


def _weight(module: nn.Module) -> Tensor:
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight


def _role(module: nn.Module) -> str:
    role = getattr(module, "role", "matrix")
    assert isinstance(role, str)
    return role
