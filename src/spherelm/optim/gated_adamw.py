"""GatedAdamW: AdamW whose step fades out smoothly where gradients are small ("Training nGPT", arXiv 2608.01284)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from spherelm.errors import UserError
from spherelm.optim.schedule import float32_rate
from spherelm.sharding import own_part

Tensors = tuple[Tensor, ...]
"""Many at once: an operation on all of them is few on a GPU."""


def gates(d: Tensors, eps_gate: float, a: float) -> Tensors:
    """`sigmoid(a ln(d / eps_gate))`: 0 far below `eps_gate`, 1/2 at it, 1 far above;
    at a = 1 it is `d / (d + eps_gate)`.

    d: not negative, any shapes; eps_gate: in the units of a gradient; a: how sharply it opens.
    """
    opened = torch._foreach_log(d)
    torch._foreach_sub_(opened, math.log(eps_gate))
    torch._foreach_mul_(opened, a)
    torch._foreach_sigmoid_(opened)
    return opened


def gated_directions(m_hat: Tensors, d: Tensors, eps_gate: float, a: float) -> Tensors:
    """`gamma m_hat / d` with gamma the gate of d; 0 where d is, whose gate is 0. `d` is overwritten.

    With eps 0 that is so where no gradient has been, or only such as are too small for their square.
    """
    directions = gates(d, eps_gate, a)
    torch._foreach_mul_(directions, m_hat)
    torch._foreach_clamp_min_(d, torch.finfo(torch.float32).tiny)  # no root is smaller, but of 0
    torch._foreach_div_(directions, d)
    return directions


ENTRIES_AT_ONCE = 2**25
"""Entries that an accelerator updates at once, so that intermediate results take little memory."""


def in_parts(parameters: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """`parameters` in lists of at most `ENTRIES_AT_ONCE` entries, or one;
    on a processor, whose caches hold little, each by itself.
    """
    part: list[Tensor] = []
    for parameter in parameters:
        if part and (
            parameter.device.type == "cpu" or sum(own_part(p).numel() for p in (*part, parameter)) > ENTRIES_AT_ONCE
        ):
            yield part
            part = []
        part.append(parameter)
    if part:
        yield part


class GatedAdamW(Optimizer):
    """`theta <- theta - eta (alpha gamma m_hat / d + lambda theta)` with `gamma = sigmoid(a ln(d / eps_gate))`.

    lr: eta. betas: of the two moments. eps: added to the root of the second moment (eps_num in the paper). eps_gate:
    the size of gradient at which the gate is half open. a: 1 with eps 0 is AdamW with its eps at `eps_gate`;
    the paper takes 1/2.
    alpha: what the gated step is multiplied by. weight_decay: lambda. The paper's eps_gate and alpha are not known
    here; the defaults are ours. Plain tensors and DTensors alike: everything is elementwise.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-16,
        eps_gate: float = 1e-8,
        a: float = 0.5,
        alpha: float = 1.0,
        weight_decay: float = 0.0,
    ) -> None:
        for name, value in (("lr", lr), ("eps_gate", eps_gate), ("a", a), ("alpha", alpha)):
            if not value > 0:
                raise UserError(f"GatedAdamW: {name} must be positive, got {value}")
        if eps < 0 or weight_decay < 0 or not all(0 <= beta < 1 for beta in betas):
            raise UserError(
                f"GatedAdamW: eps={eps} and weight_decay={weight_decay} must not be negative, betas={betas} lie in [0, 1)"
            )
        defaults = {"lr": lr, "betas": betas, "eps": eps, "eps_gate": eps_gate, "a": a, "alpha": alpha}
        super().__init__(params, {**defaults, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient; returns what `closure`, if given, returns."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            for moved in in_parts([parameter for parameter in group["params"] if parameter.grad is not None]):
                self._update(moved, group)
        return loss

    def _update(self, moved: list[Tensor], group: dict[str, Any]) -> None:
        """Update parameters at once; everything is elementwise, so of sharded ones each process does its own part."""
        for parameter in moved:
            if not self.state[parameter]:
                moments = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
                self.state[parameter] = {"step": torch.zeros(()), **moments}
        states, (beta_1, beta_2) = [self.state[parameter] for parameter in moved], group["betas"]
        for state in states:
            state["step"] += 1
        counts = [state["step"].item() for state in states]  # of the CPU
        gradients = [own_part(parameter.grad) for parameter in moved]  # type: ignore[arg-type]
        m, v = ([own_part(state[name]) for state in states] for name in ("exp_avg", "exp_avg_sq"))
        torch._foreach_lerp_(m, gradients, 1 - beta_1)
        torch._foreach_mul_(v, beta_2)
        torch._foreach_addcmul_(v, gradients, gradients, 1 - beta_2)
        m_hat = torch._foreach_div(m, [1 - beta_1**count for count in counts])
        d = torch._foreach_div(v, [1 - beta_2**count for count in counts])
        torch._foreach_sqrt_(d)
        torch._foreach_add_(d, group["eps"])
        step = gated_directions(m_hat, d, group["eps_gate"], group["a"])
        theta = [own_part(parameter) for parameter in moved]
        torch._foreach_mul_(theta, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(theta, step, alpha=-float32_rate(group["lr"] * group["alpha"]))
