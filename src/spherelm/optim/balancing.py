"""Even load of experts without a loss for it: a bias on each expert's score, moved after every update."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from spherelm.errors import UserError
from spherelm.layers.moe import Router, routers
from spherelm.optim.kept_hooks import keep_hooks

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
    """After every step of `optimizer`, move the bias of the routers of `model` that balance by it,
    and count from 0 again.

    What was counted is all forward passes in training mode since the last step, so that micro-batches add up; it stays
    as each router's `seen`. rate: what a bias moves by, in units of scores. summed: adds up counts over processes,
    where there are several, each with texts of its own. Returns the hook's handle; `handle.remove()` undoes it.
    """
    found = [router for _, router in routers(model)]
    if not found:
        raise UserError("there is nothing to balance: this model has no router, and needs no attach_balancing")
    handle = optimizer.register_step_post_hook(Balancing(found, rate, summed))
    keep_hooks(optimizer, handle)
    return handle


@dataclass(frozen=True)
class Balancing:
    """The hook that balances `found`, the routers, after a step; fields as for `attach_balancing`."""

    found: list[Router]
    rate: float
    summed: Summed

    @torch.no_grad()
    def __call__(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """Move the biases, and count from 0 again."""
        loads = self.summed(torch.cat([router.load for router in self.found]))
        for router, load in zip(self.found, loads.split([router.out_features for router in self.found]), strict=True):
            router.seen.copy_(load)
            router.load.zero_()
            if router.balance == "bias":
                router.score_bias.copy_(moved_bias(router.score_bias, load, self.rate))
