"""The baseline encoder-decoder: the GPT of `gpt.py` with a source. Read beside `nencdec.py`.

Encoder blocks are GPT's, without the causal mask; decoder blocks have cross-attention between attention and MLP.

| weight | starts as |
|---|---|
| every matrix, all embeddings | N(0, 0.02) |
| output matrices of the encoder (attention `o`, MLP `o`) | N(0, 0.02 / sqrt(2 n_encoder_layers)) |
| output matrices of the decoder (attention `o`, cross-attention `o`, MLP `o`) | N(0, 0.02 / sqrt(3 n_layers)) |
| RMSNorm gains | 1 |
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor, nn

from spherelm.layers.attention import Attention
from spherelm.layers.cache import LayerCache
from spherelm.layers.cross_attention import CrossAttention, Memory
from spherelm.layers.feedforward import FeedForward
from spherelm.layers.linear import Embedding, Linear
from spherelm.layers.readout import Readout
from spherelm.layers.rope import ROPES, RotaryTable
from spherelm.models.encoder_decoder import EncoderDecoder, SourceEncoder, check_encoder
from spherelm.models.gpt import GPTBlock, GPTConfig, RMSNorm


@dataclass(frozen=True)
class EncDecConfig(GPTConfig):
    """The shape of an `EncDec`: that of its decoder, as in `GPTConfig`, and its encoder's.

    n_encoder_layers: `None` means n_layers. share_embeddings: source and target have one input embedding; with tie_embeddings
    it is the output embedding too. max_seq_len: of a source and of a target, each.
    """

    n_encoder_layers: int | None = None
    share_embeddings: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_encoder(self)


class EncDecBlock(nn.Module):
    """`h <- h + ATTN(RMSNorm(h))`, then cross-attention to the source and the MLP in the same way."""

    def __init__(self, config: EncDecConfig) -> None:
        super().__init__()
        d, n_kv_heads = config.d_model, config.n_kv_heads or config.n_heads
        self.norm_a, self.norm_c, self.norm_m = (RMSNorm(d, eps=1e-6) for _ in range(3))
        self.attention = Attention(d, config.n_heads, n_kv_heads, ROPES[config.rope].rotation)
        self.cross = CrossAttention(d, config.n_heads, n_kv_heads)
        self.mlp = FeedForward(d, config.d_ff or 4 * d)

    def forward(
        self, h: Tensor, table: RotaryTable, mask: Tensor | None, cache: LayerCache | None, memory: Memory
    ) -> Tensor:
        """[batch, target, d_model] -> the same."""
        h = h + self.attention(self.norm_a(h), table, mask, cache)
        h = h + self.cross(self.norm_c(h), memory, cache)
        h = h + self.mlp(self.norm_m(h))
        return h


class EncDec(EncoderDecoder):
    """The baseline: pre-norm encoder and decoder, the source's states normalized once more, logits as GPT's."""

    def __init__(self, config: EncDecConfig) -> None:
        super().__init__()
        self._remember_shape(config)
        d, vocab_size, depth = config.d_model, config.vocab_size, config.n_encoder_layers or config.n_layers
        self.embed = Embedding(vocab_size, d)
        source = self.embed if config.share_embeddings else Embedding(vocab_size, d)
        self.encoder = SourceEncoder(config, source, (GPTBlock(config) for _ in range(depth)), RMSNorm(d, eps=1e-6))
        self.blocks = nn.ModuleList(EncDecBlock(config) for _ in range(config.n_layers))
        self.norm = RMSNorm(d, eps=1e-6)
        self.head = Linear(d, vocab_size, role="output_embedding")
        if config.tie_embeddings:
            self.head.weight = self.embed.weight
        self.init_std = config.init_std
        self.init_weights()

    def init_weights(self) -> None:
        """Draw every weight anew from the distributions in this module's docstring."""
        for name, parameter in self.named_parameters():
            if parameter.ndim == 1:
                nn.init.ones_(parameter)
                continue
            added = 2 * len(self.encoder.blocks) if name.startswith("encoder.") else 3 * len(self.blocks)
            shrink = math.sqrt(added) if name.endswith(".o.weight") else 1
            nn.init.normal_(parameter, std=self.init_std / shrink)

    def readout(self, h: Tensor) -> Readout:
        return Readout(self.norm(h), self.head.scaled_weight())
