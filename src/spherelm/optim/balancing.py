"""Even load of experts without a loss for it: a bias on each expert's score, moved after every update."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from spherelm.layers.moe import routers

Summed = Callable[[Tensor], Tensor]
"""int64 counts of this process -> those of all processes together."""


def moved_bias(bias: Tensor, load: Tensor, rate: float) -> Tensor:
    """`bias + rate sign(mean load - load)`: the busy are picked less often, the idle more (DeepSeek-V3, section 2.1.2).

    bias: [n_experts]; load: int64 [n_experts], choices since the last update.
    """
    idle = torch.sign(load.sum() - len(load) * load)
    return bias + rate * idle.to(bias.dtype)


def attach_balancing(
    optimizer: Optimizer, model: nn.Module, rate: float = 1e-3, summed: Summed = torch.positive
) -> RemovableHandle:
    """After every step of `optimizer`, move the bias of the routers of `model` that balance by it, and count from 0 again.

    What was counted is all forward passes in training mode since the last step, so that micro-batches add up; it stays as each
    router's `seen`. rate: what a bias moves by, in units of scores. summed: adds up counts over processes, where there are
    several, each with texts of its own. Returns the hook's handle; `handle.remove()` undoes it.
    """
    found = [router for _, router in routers(model)]

    @torch.no_grad()
    def after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        loads = summed(torch.cat([router.load for router in found]))
        for router, load in zip(found, loads.split([router.out_features for router in found]), strict=True):
            router.seen.copy_(load)
            router.load.zero_()
            if router.balance == "bias":
                router.score_bias.copy_(moved_bias(router.score_bias, load, rate))

    if not found:
        raise ValueError("there is nothing to balance: this model has no router, and needs no attach_balancing")
    return optimizer.register_step_post_hook(after_step)
