"""The normalized encoder-decoder: the NGPT of `ngpt.py` with a source. Read beside `encdec.py`.

The nGPT paper calls the extension straightforward; this is how it is done here. Encoder blocks are nGPT's, without the causal
mask. A decoder block takes three steps on the sphere, each with its own alpha: towards attention, towards cross-attention,
towards the MLP. The encoder's last states are unit vectors already and are read as they are.

| weight | shape | unit axis |
|---|---|---|
| `embed`, `encoder.embed`, `head` | [vocab, d_model] | 1, each row |
| attention `q`, `k`, `v`, encoder and decoder | [heads*d_k, d_model] | 1, each row |
| attention `o`, encoder and decoder | [d_model, heads*d_k] | 0, each column |
| cross-attention `q` (reads the target), `k`, `v` (read the source) | [heads*d_k, d_model] | 1, each row |
| cross-attention `o` | [d_model, heads*d_k] | 0, each column |
| MLP `u`, `v`, encoder and decoder | [d_ff, d_model] | 1, each row |
| MLP `o`, encoder and decoder | [d_model, d_ff] | 0, each column |

Not normalized: `alpha_a`, `alpha_c`, `alpha_m` [d_model], `s_qk` [n_heads, d_k] of each attention, `s_u`, `s_v` [d_ff], `s_z`
[vocab]. Every matrix starts as N(0, 1/sqrt(d_model)) and is normalized; learned scales start at their effective `init`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from spherelm.layers.cache import LayerCache
from spherelm.layers.cross_attention import Memory, UnitCrossAttention
from spherelm.layers.linear import UnitEmbedding, UnitLinear
from spherelm.layers.readout import Readout
from spherelm.layers.rope import RotaryTable
from spherelm.models.encoder_decoder import EncoderDecoder, SourceEncoder, check_encoder
from spherelm.models.ngpt import NGPTBlock, NGPTConfig, draw_on_sphere, learned_scale, reading_of
from spherelm.sphere import norm


@dataclass(frozen=True)
class NEncDecConfig(NGPTConfig):
    """The shape of an `NEncDec` and where its learned scales start: `NGPTConfig`, and the encoder's as in `EncDecConfig`.

    alpha_init, s_qk_init, ...: of every such scale, in the encoder and in the decoder.
    """

    n_encoder_layers: int | None = None
    share_embeddings: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_encoder(self)


class NEncDecBlock(NGPTBlock):
    """`NGPTBlock` with a step towards cross-attention in between: `h <- Norm(h + alpha_C (Norm(CROSS(h, source)) - h))`."""

    def __init__(self, config: NEncDecConfig) -> None:
        super().__init__(config)
        d, n_kv_heads = config.d_model, config.n_kv_heads or config.n_heads
        self.alpha_c = learned_scale(config, "alpha", d)
        s_qk = learned_scale(config, "s_qk", (config.n_heads, d // config.n_heads))
        self.cross = UnitCrossAttention(d, config.n_heads, n_kv_heads, s_qk)
        if not config.qk_norm:
            self.cross.unit = torch.positive

    def forward(  # type: ignore[override]
        self, h: Tensor, table: RotaryTable, mask: Tensor | None, cache: LayerCache | None, memory: Memory
    ) -> Tensor:
        """Unit vectors [batch, target, d_model] -> the same."""
        h = self.step(h, norm(self.attention(h, table, mask, cache)), self.sign(self.alpha_a()))
        h = self.step(h, norm(self.cross(h, memory, cache)), self.sign(self.alpha_c()))
        h = self.step(h, norm(self.mlp(h)), self.sign(self.alpha_m()))
        return h


class NEncDec(EncoderDecoder):
    """The normalized encoder-decoder: logits `z = s_z (h E_out^T)` (nGPT, eq. 3)."""

    def __init__(self, config: NEncDecConfig) -> None:
        super().__init__()
        self._remember_shape(config)
        d, vocab_size, depth = config.d_model, config.vocab_size, config.n_encoder_layers or config.n_layers
        self.embed = UnitEmbedding(vocab_size, d)
        source = self.embed if config.share_embeddings else UnitEmbedding(vocab_size, d)
        self.encoder = SourceEncoder(config, source, (NGPTBlock(config) for _ in range(depth)), nn.Identity())
        self.blocks = nn.ModuleList(NEncDecBlock(config) for _ in range(config.n_layers))
        self.head = UnitLinear(d, vocab_size, unit_axis=1, role="output_embedding")
        self.s_z = learned_scale(config, "s_z", vocab_size)
        self.reading, self.common_start = reading_of(config), config.common_start
        if config.tie_embeddings:
            self.head.weight = self.embed.weight
        self.init_weights()

    def init_weights(self) -> None:
        """Draw every matrix anew and put it on the sphere; set the learned scales to their start."""
        draw_on_sphere(self, self.config.d_model, self.common_start)

    def readout(self, h: Tensor) -> Readout:
        return self.reading(h, self.head, self.s_z())
