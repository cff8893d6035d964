"""Loss on fixed windows of held-out text."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from spherelm.models import Decoder


@torch.no_grad()
def mean_loss(model: Decoder, tokens: Tensor, targets: Tensor, batch_size: int) -> float:
    """The mean cross-entropy of `model` over all windows, in nats per token.

    tokens, targets: int64 [windows, seq], read `batch_size` windows at a time; -100 among the targets counts for nothing.
    """
    model_was_training = model.training
    model.eval()
    total, count = 0.0, 0
    device = next(model.parameters()).device
    for part, wanted in zip(tokens.split(batch_size), targets.split(batch_size), strict=True):
        counted = int((wanted != -100).sum())
        total += model.loss(part.to(device), wanted.to(device)).item() * counted
        count += counted
    model.train(model_was_training)
    return total / count


def bits_per_byte(loss: float, tokens_per_byte: float) -> float:
    """A loss in nats per token as bits per UTF-8 byte of text, which compares across tokenizers."""
    return loss / math.log(2) * tokens_per_byte
