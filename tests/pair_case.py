"""Small float64 encoder-decoders, the same weights for the oracle, and one batch of padded pairs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import paper
import torch
from against_paper import disturb
from configs import make_config, scales_of
from torch import Tensor

from spherelm.models import Config, EncDecArch, EncoderDecoder, build

TINY: dict[str, Any] = {"vocab_size": 37, "n_layers": 2, "d_model": 24, "n_heads": 3, "d_ff": 40, "max_seq_len": 16}
ARMS = ("gpt", "ngpt")
ORACLES = {"gpt": paper.encdec, "ngpt": paper.nencdec}
LENGTHS = (5, 8, 1)
"""Real tokens of each source of the batch, which is 8 wide."""


@dataclass
class PairCase:
    """A model, its weights for the oracle, and a batch in which sources are padded and some targets are ignored."""

    arm: str
    model: EncoderDecoder
    weights: paper.Params
    shape: paper.Shape
    source: Tensor
    tokens: Tensor
    targets: Tensor

    @property
    def forward(self) -> paper.Forward:
        return ORACLES[self.arm]

    @property
    def pair(self) -> tuple[Tensor, Tensor]:
        """The source and the target's tokens, as the model and the oracle take them."""
        return self.source, self.tokens

    @property
    def joined(self) -> Tensor:
        """The source and behind it the target's tokens, as the loss takes them."""
        return torch.cat((self.source, self.tokens), 1)

    def batches(self, count: int) -> Iterator[tuple[Tensor, Tensor]]:
        """``count`` different batches: the targets' positions rolled."""
        for i in range(count):
            yield torch.cat((self.source, self.tokens.roll(i, 1)), 1), self.targets.roll(i, 1)

    def oracle_batches(self, count: int) -> Iterator[tuple[tuple[Tensor, Tensor], Tensor]]:
        """The same, as the oracle takes them."""
        width = self.source.shape[1]
        return (((tokens[:, :width], tokens[:, width:]), targets) for tokens, targets in self.batches(count))


def pair_config(arm: str, **fields: Any) -> Config:
    """A decoder of two layers behind an encoder of three, unless ``fields`` say otherwise."""
    return make_config(arm, "encdec", **{**TINY, "n_encoder_layers": 3, **fields})


def make_pair_case(arm: str, **fields: Any) -> PairCase:
    """The same case at every call, its weights disturbed."""
    config = pair_config(arm, **fields)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = build(config).double()
    assert isinstance(model, EncoderDecoder)
    noise = torch.Generator().manual_seed(7)
    weights = disturb(model, arm, noise)
    source = torch.randint(config.vocab_size, (3, max(LENGTHS)), generator=noise)
    for row, length in zip(source, LENGTHS, strict=True):
        row[length:] = -100
    tokens = torch.randint(config.vocab_size, (3, 9), generator=noise)
    targets = torch.randint(config.vocab_size, (3, 9), generator=noise)
    targets[0, :3] = targets[2, 5] = -100
    return PairCase(arm, model, weights, pair_shape(config), source, tokens, targets)


def pair_shape(config: Config) -> paper.Shape:
    """What the oracle needs to know of ``config``."""
    assert isinstance(config.architecture, EncDecArch)
    return paper.Shape(
        config.n_layers,
        config.d_model,
        config.n_heads,
        config.kv_heads,
        config.rope_base,
        n_encoder_layers=config.architecture.n_encoder_layers or config.n_layers,
        **scales_of(config, "alpha", "s_qk", "s_u", "s_v", "s_z"),
    )
