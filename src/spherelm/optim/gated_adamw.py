"""GatedAdamW: AdamW whose step fades out smoothly where gradients are small ("Training nGPT", arXiv 2608.01284)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from spherelm.errors import UserError
from spherelm.optim.schedule import float32_rate


def gate(d: Tensor, eps_gate: float, a: float) -> Tensor:
    """`sigmoid(a ln(d / eps_gate))`: 0 far below `eps_gate`, 1/2 at it, 1 far above;
    at a = 1 it is `d / (d + eps_gate)`.

    d: positive, any shape; eps_gate: in the units of a gradient; a: how sharply it opens.
    """
    return torch.sigmoid(a * (d.log() - math.log(eps_gate)))


def gated_direction(m_hat: Tensor, v_hat: Tensor, eps: float, eps_gate: float, a: float) -> Tensor:
    """`gamma m_hat / d` with `d = sqrt(v_hat) + eps` and `gamma` the gate of d; 0 where d is.

    With eps 0 that is so where no gradient has been, or only such as are too small for their square.
    """
    d = v_hat.sqrt() + eps
    return torch.where(d == 0, 0.0, gate(d, eps_gate, a) * m_hat / d)


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
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group)
        return loss

    def _update(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros(())
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        state["step"] += 1
        count, (beta_1, beta_2) = state["step"].item(), group["betas"]
        m = state["exp_avg"].lerp_(gradient, 1 - beta_1)
        v = state["exp_avg_sq"].mul_(beta_2).addcmul_(gradient, gradient, value=1 - beta_2)
        direction = gated_direction(
            m / (1 - beta_1**count), v / (1 - beta_2**count), group["eps"], group["eps_gate"], group["a"]
        )
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.add_(direction, alpha=-float32_rate(group["lr"] * group["alpha"]))
