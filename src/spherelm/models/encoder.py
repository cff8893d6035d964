"""The baseline encoder: the GPT of `gpt.py`, read in both directions. Read beside `nencoder.py`.

Weights start as GPT's; the input embedding has a row more, that of hidden tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from spherelm.layers.linear import Embedding, Linear
from spherelm.layers.readout import Readout
from spherelm.models.gpt import GPTBlock, GPTConfig, RMSNorm, draw_plain
from spherelm.models.masked import MaskedModel, check_masked


@dataclass(frozen=True)
class EncoderConfig(GPTConfig):
    """The shape of an `Encoder`, as in `GPTConfig`. hidden_part: of the tokens, while it is trained."""

    hidden_part: float = 0.15

    def __post_init__(self) -> None:
        super().__post_init__()
        check_masked(self)


class Encoder(MaskedModel):
    """The baseline: logits `z = RMSNorm(h) E_out^T` of the token at each position."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self._remember_shape(config)
        self.embed = Embedding(config.vocab_size + 1, config.d_model)
        self.blocks = nn.ModuleList(GPTBlock(config) for _ in range(config.n_layers))
        self.norm = RMSNorm(config.d_model, eps=1e-6)
        self.head = Linear(config.d_model, config.vocab_size, role="output_embedding")
        self.init_std = config.init_std
        self.init_weights()

    def init_weights(self) -> None:
        """Draw every weight anew from GPT's distributions."""
        draw_plain(self, self.init_std, 2 * len(self.blocks))

    def readout(self, h: Tensor) -> Readout:
        return Readout(self.norm(h), self.head.scaled_weight())
