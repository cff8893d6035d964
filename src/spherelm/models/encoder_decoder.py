"""What both encoder-decoders share: a source is read in both directions, a target written from left to right beside it.

`EncDec` and `NEncDec` say what is different. An encoder-decoder that has read its source is a language model of the target,
p(y | x): `given` returns it as one, so that whatever reads or writes with a language model does so with a translation model.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from spherelm.layers.cache import KVCache
from spherelm.layers.cross_attention import Memory, real_tokens
from spherelm.layers.linear import Embedding
from spherelm.layers.readout import Readout, read_logits
from spherelm.layers.rope import ROPES, RotaryTable
from spherelm.models.decoder import Decoder, DecoderConfig, LanguageModel, Rows, RunBlock, run_block

PADDING = -100
"""What fills the rows of a source behind its end; any negative number does."""


class EncoderDecoderConfig(DecoderConfig, Protocol):
    """The fields that configs of encoder-decoders share."""

    @property
    def n_encoder_layers(self) -> int | None: ...


def check_encoder(config: EncoderDecoderConfig) -> None:
    """Raise `ValueError`, naming the value and the fix, if the encoder's depth makes no model."""
    layers = config.n_encoder_layers
    if layers is not None and (not isinstance(layers, int) or isinstance(layers, bool) or layers < 1):
        raise ValueError(f"n_encoder_layers must be a positive whole number or None, got {layers!r}")


class SourceEncoder(nn.Module):
    """Reads a sequence in both directions: the blocks of a language model, none of whose positions is hidden from another.

    Padding is seen by nobody, so that a row is read as it would be alone. `norm` is what the last state goes through.
    """

    def __init__(self, config: DecoderConfig, embed: Embedding, blocks: Iterable[nn.Module], norm: nn.Module) -> None:
        super().__init__()
        self.embed, self.blocks, self.norm = embed, nn.ModuleList(blocks), norm
        self.d_k, self.rope_base = config.d_model // config.n_heads, config.rope_base
        self.rotary_table = ROPES[config.rope].table

    def forward(self, source: Tensor, run: RunBlock = run_block) -> Memory:
        """int64 [batch, source], negative where padded -> the states of its positions; run: as for `Decoder.trunk`."""
        h, mask = self.embed(source.clamp_min(0)), real_tokens(source)
        positions = torch.arange(source.shape[1], device=source.device)
        table = self.rotary_table(positions.to(torch.promote_types(h.dtype, torch.float32)), self.d_k, self.rope_base)
        for block in self.blocks:
            h = run(block, h, table, mask, None)
        return Memory(self.norm(h), mask)


class EncoderDecoder(Decoder):
    """An `encoder`, and a decoder whose blocks attend to what it made of the source."""

    continues = False
    encoder: SourceEncoder

    def forward(self, source: Tensor, tokens: Tensor, cache: KVCache | None = None) -> Tensor:
        """Logits [batch, target, vocab] of every target position's next token.

        source: int64 [batch, source], negative where padded on the right; tokens: int64 [batch, target], from the token on that
        begins every target. With a cache the source is read again: to write a text, use `given`.
        """
        h = self.trunk(self.embed(tokens), cache, context=(self.encoder(source, self.run),))
        return read_logits(self.readout(h))

    def loss(
        self, tokens: Tensor, targets: Tensor, mask: Tensor | None = None, positions: Tensor | None = None
    ) -> Tensor:
        """Mean cross-entropy in nats of `targets` int64 [batch, target], where -100 is ignored; logits are never held whole.

        tokens: int64 [batch, source + target], the source as for `forward` and behind it the tokens of the target, so that a
        batch is two tensors as it is for a language model. mask, positions: of the target, as for `trunk`.
        """
        source, written = tokens.split((tokens.shape[1] - targets.shape[1], targets.shape[1]), dim=1)
        h = self.trunk(self.embed(written), mask=mask, positions=positions, context=(self.encoder(source, self.run),))
        return self.read_loss(h, targets)

    def given(self, source: Tensor) -> Conditioned:
        """The language model of the targets of `source` int64 [batch, source], row by row; it shares all weights."""
        return Conditioned(self, self.encoder(source, self.run))

    @torch.no_grad()
    def conditioned(self, prompts: Rows, end_token: int | None) -> tuple[LanguageModel, Rows]:
        """The prompts, each with its end, become sources; every target begins with the end token."""
        if end_token is None:
            raise ValueError("an encoder-decoder begins and ends its targets with the end token: give eos_id")
        source = padded([[*prompt, end_token] for prompt in prompts], self.embed.weight.device)
        return self.given(source), [[end_token] for _ in prompts]

    def layer(self, h: Tensor, table: RotaryTable) -> Tensor:
        """The first layer of the encoder and that of the decoder, for a source and a target of one length.

        Raises `ValueError` where there is not one of the encoder for each of the decoder.
        """
        if len(self.encoder.blocks) != len(self.blocks):
            raise ValueError("what an encoder-decoder costs is counted where n_encoder_layers is n_layers, or None")
        mask = torch.ones(h.shape[0], 1, 1, h.shape[1], dtype=torch.bool, device=h.device)
        memory = Memory(run_block(self.encoder.blocks[0], h, table, mask, None), mask)
        return run_block(self.blocks[0], h, table, None, None, memory)

    def reader(self, tokens: Tensor) -> LanguageModel:
        """The decoder, given the same tokens as their source."""
        return self.given(tokens)

    def places(self, prompt: Sequence[int]) -> int:
        """One, for the token that begins the target: the prompt is the source, which has max_seq_len positions of its own."""
        limit = self.config.max_seq_len
        if len(prompt) + 1 > limit:
            raise ValueError(
                f"a text to read has {len(prompt)} tokens and its end, the model's max_seq_len is {limit}: cut it up"
            )
        return 1

    def set_compute_dtype(self, dtype: torch.dtype | None) -> None:
        self.embed.compute_dtype = self.encoder.embed.compute_dtype = dtype


class Conditioned(LanguageModel):
    """An encoder-decoder that has read its sources: a language model of their targets, a row of the batch for each."""

    def __init__(self, model: EncoderDecoder, memory: Memory) -> None:
        super().__init__()
        self._remember_shape(model.config)
        self.embed, self.blocks, self.memory = model.embed, model.blocks, memory
        self._whole = (model,)  # in a tuple, so that its encoder is none of this module's parts
        self.train(model.training)

    def init_weights(self) -> None:
        """Draw every weight of the whole model anew."""
        self._whole[0].init_weights()

    def readout(self, h: Tensor) -> Readout:
        return self._whole[0].readout(h)

    def repeated(self, count: int) -> Conditioned:
        """The same with every source `count` times, one copy beside the other: for several texts from each."""
        return Conditioned(self._whole[0], Memory(*(part.repeat_interleave(count, dim=0) for part in self.memory)))

    def trunk(
        self,
        h: Tensor,
        cache: KVCache | None = None,
        mask: Tensor | None = None,
        positions: Tensor | None = None,
        run: RunBlock | None = None,
        context: tuple[object, ...] = (),
    ) -> Tensor:
        """As in `Decoder`; every block is given the source."""
        return super().trunk(h, cache, mask, positions, run, (self.memory, *context))


def padded(rows: Rows, device: torch.device | str = "cpu") -> Tensor:
    """Rows of token ids as int64 [rows, longest], filled with `PADDING` on the right."""
    longest = max(len(row) for row in rows)
    return torch.tensor([[*row, *[PADDING] * (longest - len(row))] for row in rows], device=device)
