"""Rotary position embedding: channel i is paired with channel i + d_k/2, as Llama does in Hugging Face transformers."""

from __future__ import annotations

import torch
from torch import Tensor

RotaryTable = tuple[Tensor, Tensor]
"""cos and sin, each [seq, d_k/2] (or [batch, 1, seq, d_k/2] where sequences start at different positions)."""


def rotary_table(positions: Tensor, d_k: int, base: float) -> RotaryTable:
    """The cosines and sines of every position's rotation angles, `position * base^(-2i/d_k)` (Su et al., arXiv 2104.09864).

    positions: floating point [..., seq], in the dtype the angles shall have (float32 or float64); d_k: even channels per
    head. Computed at each forward pass (a few thousand angles), so there is no table to outgrow or to load wrongly.
    """
    exponents = torch.arange(0, d_k, 2, device=positions.device, dtype=positions.dtype) / d_k
    angles = positions.unsqueeze(-1) * torch.pow(base, -exponents)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, table: RotaryTable) -> Tensor:
    """Rotate every pair of channels (i, i + d_k/2) of `x` by its position's angle; lengths do not change.

    x: [batch, heads, seq, d_k]; the result has the dtype of `x`, the rotation is computed in that of the table.
    """
    cos, sin = table
    first, second = x.to(cos.dtype).chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)
