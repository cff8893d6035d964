"""Loss on fixed windows of held-out text."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from spherelm.layers.attention import separate_documents
from spherelm.layers.loss import IGNORED, chunk_rows
from spherelm.models import Decoder


def mean_loss(model: Decoder, tokens: Tensor, targets: Tensor, batch_size: int, end_token: int | None = None) -> float:
    """The mean cross-entropy of a language model over all windows, in nats per token; see `summed_loss`."""
    total, count = summed_loss(model, (tokens, targets), batch_size, end_token)
    return total / count


@torch.no_grad()
def summed_loss(
    model: Decoder,
    batch: tuple[Tensor, ...],
    batch_size: int,
    end_token: int | None = None,
    before_each: Callable[[], object] = lambda: None,
) -> tuple[float, int]:
    """The summed cross-entropy of `model` over all windows in nats, and of how many targets.

    batch: all windows, as the loss of the model takes them, the targets last; read `batch_size` at a time. -100 among
    the targets counts for nothing.
    end_token: where given, documents, each ended by it, do not see one another. before_each: called before each batch;
    what it raises breaks off.
    """
    model_was_training = model.training
    model.eval()
    total, count, loss = 0.0, 0, cast(Callable[..., Tensor], model.loss)
    device = next(model.parameters()).device
    try:
        for parts in zip(*(part.split(batch_size) for part in batch), strict=True):
            before_each()
            counted = int((parts[-1] != IGNORED).sum())
            own = [part.to(device) for part in parts]
            total += loss(*own, *separate_documents(own[0], end_token)).item() * counted
            count += counted
    finally:
        model.train(model_was_training)
    return total, count


@torch.no_grad()
def token_losses(model: Decoder, tokens: Tensor, targets: Tensor) -> Tensor:
    """The cross-entropy of every single target, in nats: int64 tokens, targets [batch, seq] -> float32 [batch, seq].

    Logits exist for a piece of the tokens at a time. The sequence may be longer than the model's max_seq_len.
    """
    readout = model.readout(model.trunk(model.embedded(tokens)))
    features, wanted = readout.features.flatten(0, 1), targets.flatten()
    weight, size = readout.weight.to(features.dtype), chunk_rows(len(features), len(readout.weight))
    losses = [
        F.cross_entropy(F.linear(part, weight).float(), target, reduction="none")
        for part, target in zip(features.split(size), wanted.split(size), strict=True)
    ]
    return torch.cat(losses).view_as(targets)


def bits_per_byte(loss: float, tokens_per_byte: float) -> float:
    """A loss in nats per token as bits per UTF-8 byte of text, which compares across tokenizers."""
    return loss / math.log(2) * tokens_per_byte
