"""The initial distributions that both arms share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from spherelm.layers.linear import retract, role_of, unit_modules, weight_of
from spherelm.sphere import norm


def starting(model: nn.Module) -> Iterator[Any]:
    """Every module that says how it starts: `start(std)`, std of what weights are drawn from."""
    return (module for module in model.modules() if hasattr(module, "start"))


def depths_of(model: Any) -> dict[int, int]:
    """For each module that writes to a hidden state, by its id: how many sublayers write to that state."""
    return {
        id(module): sum(len(block.sublayers) for block in stack)
        for stack in model.stacks()
        for module in stack.modules()
        if getattr(module, "writes", False)
    }


@torch.no_grad()
def share_direction(model: nn.Module, weight: float) -> None:
    """Give the rows of each embedding of `model` one direction in common:
    Norm(row + weight c), with a random unit vector c.

    Logits then start nearly equal, as a GPT's with small weights do, however large s_z is, and tokens that have not
    been seen stay beside each other. Ours. A weight of 0 changes nothing.
    """
    if weight:
        for rows in embedding_weights(model):
            rows.add_(norm(torch.randn(rows.shape[1], device=rows.device)), alpha=weight)
        retract(model)


def embedding_weights(model: nn.Module) -> list[Tensor]:
    """The matrices [vocab, d_model] that read tokens and read out logits; one that does both once."""
    return [weight_of(module) for _, module, _ in unit_modules(model) if role_of(module) != "matrix"]
