"""The one line that makes any training loop an nGPT loop."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from spherelm.layers.linear import retract


def attach_retraction(optimizer: Optimizer, model: nn.Module) -> RemovableHandle:
    """Put the declared weights of `model` on the sphere now and after every step of `optimizer` (nGPT, section 2.6).

    Works under any loop that calls `optimizer.step()`: Hugging Face Trainer, Accelerate, Lightning, your own. Adam's
    moments are left alone. Returns the hook's handle; `handle.remove()` undoes it.
    """
    retract(model)

    def after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        retract(model)

    return optimizer.register_step_post_hook(after_step)
