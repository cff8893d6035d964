"""Encoders over a kit: a text is read in both directions, and tokens that are hidden in it are filled in.

Masked language modelling (Devlin et al., arXiv 1810.04805). The blocks are a language model's, whose queries look at
every position instead of at those before them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from spherelm.layers.cache import KVCache
from spherelm.layers.cross_attention import Memory
from spherelm.layers.readout import read_logits
from spherelm.layers.rope import RotaryTable
from spherelm.models.config import Config, EncoderArch
from spherelm.models.decoder import Decoder, RunBlock, run_block
from spherelm.models.kit import Surroundings


class MaskedModel(Decoder):
    """int64 tokens [batch, seq] -> logits [batch, seq, vocab] of the token at every position, seen or hidden.

    A hidden token is `mask_token`, the last row of the input embedding, which has vocab_size + 1 rows; it is never
    predicted. Training hides the part `hidden_part` of the tokens (`data.masking`) and predicts those.
    """

    def __init__(self, config: Config) -> None:
        super().__init__(config, ["A-"] * config.n_layers, config.vocab_size + 1)
        self.init_weights()

    @property
    def mask_token(self) -> int:
        """The id that stands for a hidden token: vocab_size."""
        return self.config.vocab_size

    @property
    def hidden_part(self) -> float:
        """The part of the tokens that training hides."""
        assert isinstance(self.config.architecture, EncoderArch)
        return self.config.architecture.hidden_part

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits [batch, seq, vocab] of what stands at each position, for int64 tokens [batch, seq]."""
        return read_logits(self.readout(self.trunk(self.embedded(tokens))))

    def trunk(
        self,
        h: Tensor,
        cache: KVCache | None = None,
        mask: Tensor | None = None,
        positions: Tensor | None = None,
        run: RunBlock | None = None,
        memory: Memory | None = None,
    ) -> Tensor:
        """As in `Decoder`; without a mask every position sees every other."""
        mask = everywhere(h) if mask is None else mask
        return super().trunk(h, cache, mask, positions, run, memory)

    def loss(
        self, tokens: Tensor, targets: Tensor, mask: Tensor | None = None, positions: Tensor | None = None
    ) -> Tensor:
        """Mean cross-entropy in nats of `targets` int64 [batch, seq], the tokens that were hidden, -100 elsewhere."""
        return self.read_loss(self.trunk(self.embedded(tokens), mask=mask, positions=positions), targets)

    def layer(self, h: Tensor, table: RotaryTable) -> Tensor:
        return run_block(self.blocks[0], h, Surroundings(table, everywhere(h)))

    def reader(self, tokens: Tensor) -> Decoder:
        """This model."""
        return self


def everywhere(h: Tensor) -> Tensor:
    """The mask that lets every position of `h` [batch, seq, d_model] be seen: bool [1, 1, 1, seq]."""
    return torch.ones(1, 1, 1, h.shape[1], dtype=torch.bool, device=h.device)
