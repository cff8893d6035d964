"""Encoder-decoders over a kit: a source is read in both directions, a target written from left to right beside it.

The encoder's blocks have attention without the causal mask and an MLP, the decoder's have cross-attention between the
two, each part added to the hidden state as the kit does it. The nGPT paper calls this extension straightforward. An
encoder-decoder that has read its source is a language model of the target, p(y | x): `given` returns it as
one, so that whatever reads or writes with a language model does so with a translation model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from spherelm.errors import UserError
from spherelm.layers.cache import KVCache
from spherelm.layers.cross_attention import Memory, real_tokens
from spherelm.layers.linear import Embedding
from spherelm.layers.loss import IGNORED
from spherelm.layers.readout import read_logits
from spherelm.layers.rope import RotaryTable
from spherelm.models.config import Config, EncDecArch
from spherelm.models.decoder import (
    KITS,
    Block,
    Decoder,
    GenerativeModel,
    LanguageModel,
    Rows,
    RunBlock,
    Runtime,
    embedded,
    run_block,
    table_of,
)
from spherelm.models.kit import Surroundings


class SourceEncoder(nn.Module):
    """Reads a sequence in both directions: none of its positions is hidden from another.

    Padding is seen by nobody, so that a row is read as it would be alone. `norm` is what the last state goes through.
    """

    def __init__(self, config: Config, embed: Embedding, depth: int) -> None:
        super().__init__()
        self.d_k, self.embed = config.d_k, embed
        self.blocks = nn.ModuleList(Block.of(config, "A-") for _ in range(depth))
        self.norm = KITS[config.arm].source_norm(config)

    def forward(self, source: Tensor, runtime: Runtime, run: RunBlock | None = None) -> Memory:
        """int64 [batch, source], negative where padded -> the states of its positions; run: as for `Decoder.trunk`."""
        h, mask = embedded(self.embed, source.clamp_min(0), runtime), real_tokens(source)
        positions = torch.arange(source.shape[1], device=source.device)
        around = Surroundings(table_of(runtime, self.d_k, positions, h), mask, attend=runtime.attend)
        for block in self.blocks:
            h = (run or runtime.run)(block, h, around)
        return Memory(self.norm(h), mask)


class EncoderDecoder(GenerativeModel):
    """An `encoder`, and a decoder whose blocks attend to what it made of the source."""

    continues = False

    def __init__(self, config: Config) -> None:
        super().__init__(config, ["AC-"] * config.n_layers)
        arch = config.architecture
        assert isinstance(arch, EncDecArch)
        make = KITS[config.arm].embedding
        source = self.embed if arch.share_embeddings else make(config.vocab_size, config.d_model)
        self.encoder = SourceEncoder(config, source, arch.n_encoder_layers or config.n_layers)
        self.init_weights()

    def stacks(self) -> list[nn.ModuleList]:
        return [self.encoder.blocks, self.blocks]

    def encoded(self, source: Tensor) -> Memory:
        """The encoder's output for int64 `source` [batch, source], negative where padded."""
        memory: Memory = self.encoder(source, self.runtime)
        return memory

    def forward(self, source: Tensor, tokens: Tensor, cache: KVCache | None = None) -> Tensor:
        """Logits [batch, target, vocab] of every target position's next token.

        source: int64 [batch, source], negative where padded on the right; tokens: int64 [batch, target], from the token
        on that begins every target. With a cache the source is read again: to write a text, use `given`.
        """
        h = self.trunk(self.embedded(tokens), cache, memory=self.encoded(source))
        return read_logits(self.readout(h))

    def loss(  # type: ignore[override]
        self,
        source: Tensor,
        tokens: Tensor,
        targets: Tensor,
        mask: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        """Mean cross-entropy in nats of `targets` int64 [batch, target], where -100 is ignored;
        logits are never held whole.

        source, tokens: as for `forward`. mask, positions: of the target, as for `trunk`.
        """
        h = self.embedded(tokens)
        h = self.trunk(h, mask=mask, positions=positions, memory=self.encoded(source))
        return self.read_loss(h, targets)

    def given(self, source: Tensor) -> Conditioned:
        """The language model of the targets of `source` int64 [batch, source], row by row; it shares all weights."""
        return Conditioned(self, self.encoded(source))

    @torch.no_grad()
    def conditioned(self, prompts: Rows, end_token: int | None) -> tuple[LanguageModel, Rows]:
        """The prompts, each with its end, become sources; every target begins with the end token."""
        if end_token is None:
            raise UserError("an encoder-decoder begins and ends its targets with the end token: give eos_id")
        source = padded([[*prompt, end_token] for prompt in prompts], self.embed.weight.device)
        return self.given(source), [[end_token] for _ in prompts]

    @classmethod
    def single_layers(cls, config: Config) -> dict[Config, int]:
        """As in `Decoder`, of encoder and decoder together;
        raises `ValueError` where one has more layers than the other.
        """
        arch = config.architecture
        assert isinstance(arch, EncDecArch)
        if arch.n_encoder_layers not in (None, config.n_layers):
            raise UserError(
                "operations are counted only for encoder-decoders with n_encoder_layers=n_layers: leave it out"
            )
        return {replace(config, n_layers=1, architecture=replace(arch, n_encoder_layers=None)): config.n_layers}

    def layer(self, h: Tensor, table: RotaryTable) -> Tensor:
        """The first layer of the encoder and that of the decoder, for a source and a target of one length."""
        mask = torch.ones(h.shape[0], 1, 1, h.shape[1], dtype=torch.bool, device=h.device)
        memory = Memory(run_block(self.encoder.blocks[0], h, Surroundings(table, mask)), mask)
        return run_block(self.blocks[0], h, Surroundings(table, memory=memory))

    def reader(self, tokens: Tensor) -> LanguageModel:
        """The decoder, given the same tokens as their source."""
        return self.given(tokens)

    def places(self, prompt: Sequence[int]) -> int:
        """One, for the token that begins the target: the prompt is the source,
        which has max_seq_len positions of its own.
        """
        limit = self.config.max_seq_len
        if len(prompt) + 1 > limit:
            raise UserError(
                f"the source has {len(prompt)} tokens and an end token, more than the model's max_seq_len={limit}: shorten it"
            )
        return 1


class Conditioned(LanguageModel):
    """An encoder-decoder that has read its sources: a language model of their targets, a row of the batch for each."""

    def __init__(self, model: Decoder, memory: Memory) -> None:
        nn.Module.__init__(self)
        self.config, self.runtime = model.config, model.runtime
        self.embed, self.blocks, self.head, self.memory = model.embed, model.blocks, model.head, memory
        self.train(model.training)

    def repeated(self, count: int) -> Conditioned:
        """The same with every source `count` times, one copy beside the other: for several texts from each."""
        return Conditioned(self, Memory(*(part.repeat_interleave(count, dim=0) for part in self.memory)))

    def trunk(
        self,
        h: Tensor,
        cache: KVCache | None = None,
        mask: Tensor | None = None,
        positions: Tensor | None = None,
        run: RunBlock | None = None,
        memory: Memory | None = None,
    ) -> Tensor:
        """As in `Decoder`; every block is given the source."""
        return super().trunk(h, cache, mask, positions, run, memory or self.memory)


def padded(rows: Rows, device: torch.device | str = "cpu") -> Tensor:
    """Rows of token ids as int64 [rows, longest], filled with `IGNORED` on the right."""
    longest = max(len(row) for row in rows)
    return torch.tensor([[*row, *[IGNORED] * (longest - len(row))] for row in rows], device=device)
