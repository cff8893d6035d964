"""The one line that makes any training loop an nGPT loop."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from spherelm import sphere
from spherelm.errors import UserError
from spherelm.layers.linear import retract, role_of, unit_modules, weight_of
from spherelm.optim.kept_hooks import keep_hooks


def attach_retraction(optimizer: Optimizer, model: nn.Module, allow_decay: bool = False) -> RemovableHandle:
    """Put the unit weights of `model` on the sphere now and after every step of `optimizer` (nGPT, section 2.6).

        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
        attach_retraction(optimizer, model)

    It works in any loop that calls `optimizer.step()`: Hugging Face Trainer, Accelerate, Lightning, your own. Adam's
    moments are not changed. A copy or pickle of `optimizer` keeps it, for the copy of `model`.

    Args:
        optimizer: Any torch optimizer of the model's parameters.
        model: A model with unit weights, such as `NGPT` or one with `UnitLinear` layers.
        allow_decay: Accept weight decay on unit weights.

    Returns:
        The hook's handle; `handle.remove()` detaches it.

    Raises:
        UserError: The model has no unit weights, the optimizer has none of the model's parameters, or it has weight
            decay on unit weights. nGPT has none (section 2.6), but torch's AdamW has it by default.
    """
    check_retraction(optimizer, model, allow_decay)
    retract(model)
    handle = optimizer.register_step_post_hook(Retraction(model))
    keep_hooks(optimizer, handle)
    return handle


@dataclass(frozen=True)
class Retraction:
    """The hook that puts the weights of `model` back on the sphere after a step."""

    model: nn.Module

    def __call__(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """Retract, whatever the step was."""
        retract(self.model)


def check_retraction(optimizer: Optimizer, model: nn.Module, allow_decay: bool) -> None:
    """Raise `ValueError`, with the fix, if `attach_retraction` would do nothing or not what is meant."""
    unit = {id(module.weight): name for name, module, _ in unit_modules(model)}
    if not unit:
        raise UserError(
            f"this {type(model).__name__} has no unit weights to keep on the sphere: leave attach_retraction out, "
            "or take its matrices from spherelm.layers.linear.UnitLinear"
        )
    groups = [(group, [id(parameter) for parameter in group["params"]]) for group in optimizer.param_groups]
    if not {id(parameter) for parameter in model.parameters()} & {each for _, ids in groups for each in ids}:
        raise UserError(
            f"the optimizer has none of the parameters of this {type(model).__name__}: make it from model.parameters(), "
            "after the model was moved or sharded"
        )
    for group, ids in groups:
        decayed = next((unit[each] for each in ids if each in unit), None)
        if group.get("weight_decay") and decayed is not None and not allow_decay:
            raise UserError(
                f"weight_decay={group['weight_decay']} would act on unit weights, {decayed} for one: give the optimizer "
                "weight_decay=0.0, or attach_retraction(..., allow_decay=True) if it is meant"
            )


class AngleCap:
    """Lets no unit vector of a block matrix turn by more than an angle in one optimizer step (arXiv 2608.01284).

    Attach it before the retraction, which then sees what it leaves: `AngleCap(optimizer, model, angle)`.
    The embeddings are not capped. angle: radians, or a function that gives them when a step ends, for a cap that
    follows a schedule. It holds a copy of the capped weights during a step. A copy or pickle of `optimizer` is capped
    too.
    """

    def __init__(self, optimizer: Optimizer, model: nn.Module, angle: float | Callable[[], float]) -> None:
        self._angle = angle
        self._capped = [(module, axis) for _, module, axis in unit_modules(model) if role_of(module) == "matrix"]
        self._before: list[Tensor] = []
        self._handles = (
            optimizer.register_step_pre_hook(self._remember),
            optimizer.register_step_post_hook(self._cap),
        )
        keep_hooks(optimizer, *self._handles)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_handles": ()}  # which belong to one optimizer, and are of no use to a copy

    def remove(self) -> None:
        """Undo the attachment."""
        for handle in self._handles:
            handle.remove()

    def _remember(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._before = [weight_of(module).detach().clone() for module, _ in self._capped]

    @torch.no_grad()
    def _cap(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        angle = self._angle() if callable(self._angle) else self._angle
        for (module, axis), before in zip(self._capped, self._before, strict=True):
            weight_of(module).copy_(sphere.capped_move(before, weight_of(module), angle, dim=axis))
        self._before = []
