"""The steps on the sphere and the signs of alpha that an nGPT may have."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from spherelm.sphere import norm, riemannian_step, step


def nvidia_step(h: Tensor, target: Tensor, alpha: Tensor) -> Tensor:
    """`step` from `Norm(h)`, as NVIDIA/ngpt takes it:
    for a unit `h` the same point, whose gradient has no part along `h`.

    Only the input embeddings notice: every later `h` is the result of a `norm`, which lets no such part through.
    """
    return step(norm(h), target, alpha)


STEPS = {"lerp": step, "nvidia": nvidia_step, "riemannian": riemannian_step}
"""By the name that `Variant.step` has."""

SIGNS: dict[str, Callable[[Tensor], Tensor]] = {"positive": torch.abs, "free": torch.positive}
"""The function applied to a learned alpha, by `Variant.alpha_sign`; `torch.positive` is the identity."""
