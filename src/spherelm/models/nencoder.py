"""The normalized encoder: the nGPT of `ngpt.py`, read in both directions. Read beside `encoder.py`.

Unit axes are nGPT's. The row of hidden tokens is a point on the sphere like every other: where a hidden position starts from.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from spherelm.layers.linear import UnitEmbedding, UnitLinear
from spherelm.layers.readout import Readout
from spherelm.models.masked import MaskedModel, check_masked
from spherelm.models.ngpt import NGPTBlock, NGPTConfig, draw_on_sphere, learned_scale, reading_of


@dataclass(frozen=True)
class NEncoderConfig(NGPTConfig):
    """The shape of an `NEncoder`, as in `NGPTConfig`. hidden_part: of the tokens, while it is trained."""

    hidden_part: float = 0.15

    def __post_init__(self) -> None:
        super().__post_init__()
        check_masked(self)


class NEncoder(MaskedModel):
    """The normalized encoder: logits `z = s_z (h E_out^T)` of the token at each position (nGPT, eq. 3)."""

    def __init__(self, config: NEncoderConfig) -> None:
        super().__init__()
        self._remember_shape(config)
        self.embed = UnitEmbedding(config.vocab_size + 1, config.d_model)
        self.blocks = nn.ModuleList(NGPTBlock(config) for _ in range(config.n_layers))
        self.head = UnitLinear(config.d_model, config.vocab_size, unit_axis=1, role="output_embedding")
        self.s_z = learned_scale(config, "s_z", config.vocab_size)
        self.reading, self.common_start = reading_of(config), config.common_start
        self.init_weights()

    def init_weights(self) -> None:
        """Draw every matrix anew and put it on the sphere; set the learned scales to their start."""
        draw_on_sphere(self, self.config.d_model, self.common_start)

    def readout(self, h: Tensor) -> Readout:
        return self.reading(h, self.head, self.s_z())
