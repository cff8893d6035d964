"""One forward pass with everything written down: where the hidden state was, what each block proposed,
where heads looked.

Nothing of the model is changed: blocks are called through `Decoder.trunk(run=...)`, and watched by hooks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from spherelm.analysis.parts import parts_of
from spherelm.layers.attention import Attend
from spherelm.models.decoder import Decoder, run_block
from spherelm.models.kit import Surroundings


@dataclass(frozen=True)
class Recording:
    """A recorded pass over int64 tokens [batch, seq], in float32; N = batch * seq positions, row after row.

    `steps`: (number of the layer, from 1; its part), in turn: attention and MLP of each layer in a GPT, cross-attention
    between them in an encoder-decoder, one part a layer in a hybrid. `stops`: the hidden state after the embedding,
    then after every step, of [N, d_model]. `proposals`: what each step's part gave, [N, d_model], before it was
    scaled or normalized.
    `entropies`: of attention, in nats, [layers that have it, n_heads, batch, seq], the mean that a head's query spreads
    over keys.
    """

    tokens: Tensor
    stops: list[Tensor]
    proposals: list[Tensor]
    entropies: Tensor
    steps: list[tuple[int, str]]


class _Recorder:
    """Calls blocks and writes down what they do."""

    def __init__(self) -> None:
        self.steps: list[tuple[int, str]] = []
        self.stops: list[Tensor] = []
        self.proposals: list[Tensor] = []
        self.entropies: list[Tensor] = []

    def run(self, block: Any, h: Tensor, around: Surroundings) -> Tensor:
        """`run_block`, watched."""
        with self._watched(block):
            h = run_block(block, h, around)
        self.stops.append(_flat(h))
        return h

    @contextmanager
    def _watched(self, block: Any) -> Iterator[None]:
        parts, number = parts_of(block), self.steps[-1][0] + 1 if self.steps else 1
        self.steps += [(number, name) for name in parts]
        handles = [
            sublayer.part.register_forward_hook(lambda _, __, out: self.proposals.append(_flat(out)))
            for sublayer in parts.values()
        ]
        handles += [
            sublayer.register_forward_pre_hook(lambda _, inputs: self.stops.append(_flat(inputs[0])))
            for sublayer in list(parts.values())[1:]
        ]
        if "attention" in parts:
            handles.append(parts["attention"].part.register_forward_pre_hook(self._watch_attention))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _watch_attention(self, part: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return *inputs[:-1], self._watching(inputs[-1])

    def _watching(self, attend: Attend) -> Attend:
        def watching(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None) -> Tensor:
            self.entropies.append(attention_entropy(q, k, scale))
            return attend(q, k, v, scale, mask)

        return watching


def _flat(h: Tensor) -> Tensor:
    return h.detach().flatten(0, -2).to(torch.float32)


def attention_entropy(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """Entropy in nats of causal softmax attention: [batch, n_heads, seq, d_k] queries
    and keys -> [n_heads, batch, seq].

    Keys may have fewer heads (grouped-query attention). A sequence at a time: scores of one are
    n_heads * seq^2 numbers.
    """
    keys = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    future = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).triu(1)
    rows = []
    for queries, seen in zip(q, keys, strict=True):
        scores = (queries @ seen.transpose(-1, -2)).to(torch.float32) * scale
        logs = scores.masked_fill(future, -math.inf).log_softmax(-1)
        rows.append(-(logs.exp() * logs.masked_fill(future, 0.0)).sum(-1))
    return torch.stack(rows, dim=1)


@torch.no_grad()
def record(model: Decoder, tokens: Tensor) -> Recording:
    """Run the model over int64 tokens [batch, seq] and write down what happens.

    An encoder-decoder has read the same tokens as its source; entropies are those of its decoder's self-attention. The
    sequences must fit the model's max_seq_len. Kept are (2 steps + 1) batch * seq * d_model numbers of 4 bytes.
    """
    recorder, reader = _Recorder(), model.reader(tokens)
    h = reader.embedded(tokens)
    recorder.stops.append(_flat(h))
    reader.trunk(h, run=recorder.run)
    nothing = torch.zeros(0, model.config.n_heads, *tokens.shape)  # where no layer has attention
    entropies = torch.stack(recorder.entropies) if recorder.entropies else nothing
    return Recording(tokens, recorder.stops, recorder.proposals, entropies, recorder.steps)
