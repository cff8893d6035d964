"""Small float64 encoder-decoders, the same weights for the oracle, and one batch of padded pairs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import paper
import torch
from configs import make_config, scales_of
from oracle_names import oracle_parameters
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
    def joined(self) -> Tensor:
        """The source and behind it the target's tokens, as the loss takes them."""
        return torch.cat((self.source, self.tokens), 1)

    def batches(self, count: int) -> Iterator[tuple[Tensor, Tensor]]:
        """``count`` different batches: the targets' positions rolled."""
        for i in range(count):
            yield torch.cat((self.source, self.tokens.roll(i, 1)), 1), self.targets.roll(i, 1)


def pair_config(arm: str, **fields: Any) -> Config:
    """A decoder of two layers behind an encoder of three, unless ``fields`` say otherwise."""
    return make_config(arm, "encdec", **{**TINY, "n_encoder_layers": 3, **fields})


def make_pair_case(arm: str, **fields: Any) -> PairCase:
    """The same case at every call. All gains and scales differ and some alphas are negative, so that nothing cancels."""
    config = pair_config(arm, **fields)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = build(config).double()
    assert isinstance(model, EncoderDecoder)
    noise = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in oracle_parameters(model):
            axis = paper.unit_axis(name)
            if axis is None:
                parameter.mul_(1 + 0.5 * torch.randn(parameter.shape, generator=noise, dtype=torch.float64))
            if "alpha" in name:
                parameter.mul_(4 * torch.randn(parameter.shape, generator=noise, dtype=torch.float64))
            if arm == "gpt" and parameter.ndim == 2:
                parameter.mul_(5)
            if arm == "ngpt" and axis is not None:
                parameter.copy_(paper.norm(parameter, axis))
    source = torch.randint(config.vocab_size, (3, max(LENGTHS)), generator=noise)
    for row, length in zip(source, LENGTHS, strict=True):
        row[length:] = -100
    tokens = torch.randint(config.vocab_size, (3, 9), generator=noise)
    targets = torch.randint(config.vocab_size, (3, 9), generator=noise)
    targets[0, :3] = targets[2, 5] = -100
    weights = {name: parameter.detach().clone() for name, parameter in oracle_parameters(model)}
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
