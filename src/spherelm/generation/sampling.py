"""From the logits of one position to the token that is drawn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field, NonNegativeFloat, PositiveInt
from torch import Tensor

from spherelm.fields import check

COLDEST = 1e-20
"""The least temperature that logits are divided by:
below it float32 overflows, and long before it nothing else is drawn.
"""


@dataclass(frozen=True)
class Sampling:
    """How the next token is sampled: penalty, temperature, top_k, top_p, min_p, applied in this order.

    Attributes:
        temperature: How random the draw is. 0 always takes the most probable token; 1 draws as the model predicts.
        top_k: Draw among the k most probable tokens only.
        top_p: Draw among the most probable tokens only, as few as together have this probability.
        min_p: Draw among the tokens that have at least this fraction of the largest probability (arXiv 2407.01082).
        repetition_penalty: Above 1, tokens that occurred, prompt included, become less probable: a positive logit is
            divided by it, a negative one multiplied (Keskar et al., arXiv 1909.05858).
    """

    temperature: NonNegativeFloat = 1.0
    top_k: PositiveInt | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=1e-6, le=1e6)] = 1.0

    def __post_init__(self) -> None:
        check(self)


def penalized(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """`logits` [batch, vocab] with the repetition penalty on the tokens that are True in `seen` [batch, vocab]."""
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def candidates(logits: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor | None]:
    """The tokens that may be drawn: their probabilities [batch, n], and their ids [batch, n], `None` for all in order.

    logits: [batch, vocab], penalized already. Nothing is sorted that need not be.
    """
    if sampling.temperature < COLDEST:
        best = logits.argmax(-1, keepdim=True)
        return torch.ones_like(best, dtype=torch.float32), best
    scores, ids = logits.float() / sampling.temperature, None
    if sampling.top_k is not None:
        scores, ids = scores.topk(min(sampling.top_k, scores.shape[-1]))
    elif sampling.top_p is not None:
        scores, ids = scores.sort(-1, descending=True)
    probabilities = scores.softmax(-1)
    if sampling.top_p is not None:
        above = probabilities.cumsum(-1) - probabilities
        probabilities = probabilities * (above < sampling.top_p)
    if sampling.min_p is not None:
        probabilities = probabilities * (probabilities >= sampling.min_p * probabilities.amax(-1, keepdim=True))
    return probabilities / probabilities.sum(-1, keepdim=True), ids


def draw(logits: Tensor, sampling: Sampling, uniforms: Sequence[float]) -> Tensor:
    """One token for each row of `logits` [batch, vocab]: int64 [batch].

    uniforms: one number in [0, 1) for each row; the token is where the summed probabilities pass it.
    """
    probabilities, ids = candidates(logits, sampling)
    if ids is not None and ids.shape[-1] == 1:
        return ids.squeeze(-1)
    wide = torch.float32 if logits.device.type == "mps" else torch.float64  # what Apple's GPUs do not have
    reached = probabilities.to(wide).cumsum(-1)
    total = reached[:, -1:]
    wanted = torch.tensor(uniforms, dtype=wide, device=logits.device).unsqueeze(-1) * total
    # Rounded up to the total, it would point past the last token that has a probability.
    wanted = torch.minimum(wanted, torch.nextafter(total, torch.zeros_like(total)))
    place = torch.searchsorted(reached, wanted, right=True)
    return (place if ids is None else ids.gather(-1, place)).squeeze(-1)
