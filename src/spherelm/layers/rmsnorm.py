"""The norm of the baseline."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class RMSNorm(nn.RMSNorm):
    """`x / rms(x) * gain` over the last axis, with a learned gain [width], reduced in float32."""

    role = "gain"

    def __init__(self, width: int) -> None:
        super().__init__(width, eps=1e-6)

    def start(self: nn.Module, std: float | None = None) -> None:
        """Gains of 1, whatever weights are drawn from."""
        nn.init.ones_(self.weight)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] -> the same."""
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)
