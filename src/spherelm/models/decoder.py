"""What all models share: tokens in, blocks in order, one read-out. GPT, NGPT and the others say what is different."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from spherelm.layers.cache import KVCache
from spherelm.layers.linear import Embedding
from spherelm.layers.loss import Score, linear_cross_entropy, score, with_gradients_of
from spherelm.layers.moe import pending_losses
from spherelm.layers.readout import Readout, read_logits
from spherelm.layers.rope import ROPES, RotaryTable


class DecoderConfig(Protocol):
    """The fields that every decoder's config shares."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def n_layers(self) -> int: ...
    @property
    def d_model(self) -> int: ...
    @property
    def n_heads(self) -> int: ...
    @property
    def n_kv_heads(self) -> int | None: ...
    @property
    def d_ff(self) -> int | None: ...
    @property
    def max_seq_len(self) -> int: ...
    @property
    def rope_base(self) -> float: ...
    @property
    def rope(self) -> str: ...


def check_shape(config: DecoderConfig) -> None:
    """Raise `ValueError`, naming the value and the fix, if the sizes cannot make a model."""
    for name in ("vocab_size", "n_layers", "d_model", "n_heads", "n_kv_heads", "d_ff", "max_seq_len"):
        value = getattr(config, name)
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise ValueError(f"{name} must be a positive whole number, got {value!r}")
    if config.d_model % config.n_heads:
        raise ValueError(
            f"n_heads={config.n_heads} does not divide d_model={config.d_model}: choose n_heads among the divisors of d_model"
        )
    if (config.d_model // config.n_heads) % 2:
        raise ValueError(
            f"d_model / n_heads = {config.d_model // config.n_heads} is odd, and rotary embedding pairs channels: "
            "choose sizes that give an even number of channels per head"
        )
    if config.n_kv_heads is not None and config.n_heads % config.n_kv_heads:
        raise ValueError(f"n_kv_heads={config.n_kv_heads} does not divide n_heads={config.n_heads}")
    if not config.rope_base > 1:
        raise ValueError(f"rope_base must be greater than 1, got {config.rope_base}")
    if config.rope not in ROPES:
        raise ValueError(f"unknown rope {config.rope!r}: choose one of {', '.join(ROPES)}")


Rows = Sequence[Sequence[int]]
"""Token ids, a row a text."""

RunBlock = Callable[..., Tensor]
"""(block, h, table, mask, cache, *context) -> h."""


def run_block(block: nn.Module, *inputs: object) -> Tensor:
    """Call `block` with `inputs`."""
    h: Tensor = block(*inputs)
    return h


class Decoder(nn.Module):
    """What writes tokens from left to right: `embed`, `blocks`, and a read-out given by the subclass.

    The hidden state is computed in `embed.compute_dtype`. What a model reads besides the tokens before is its own business:
    `loss` takes a batch of the data that it is for, `conditioned` the prompts of texts that are to be written.
    continues: whether the texts that it writes begin with their prompts.
    label_smoothing: of the loss in training mode, as for `linear_cross_entropy`; in eval mode there is none.
    score: what a chunk of logits costs, and their gradients: of `layers.loss`, compiled where blocks are.
    """

    continues: ClassVar[bool]
    config: DecoderConfig
    embed: Embedding
    blocks: nn.ModuleList
    run: RunBlock
    label_smoothing: float
    score: Score

    @classmethod
    def single_layers(cls, config: Any) -> dict[Any, int]:
        """Configs of one layer each, and how many such layers the model of `config` has: what is counted once for all alike."""
        return {replace(config, n_layers=1): config.n_layers}

    @abstractmethod
    def init_weights(self) -> None:
        """Draw every weight anew, from the distributions that the model's module states."""

    @abstractmethod
    def readout(self, h: Tensor) -> Readout:
        """What turns the last hidden state [..., d_model] into logits."""

    def trunk(
        self,
        h: Tensor,
        cache: KVCache | None = None,
        mask: Tensor | None = None,
        positions: Tensor | None = None,
        run: RunBlock | None = None,
        context: tuple[object, ...] = (),
    ) -> Tensor:
        """All blocks: [batch, seq, d_model] -> the same. With a cache, `h` continues the positions that it holds.

        mask: bool [batch, 1, seq, past + seq], True where a query may look; by default everything up to itself.
        positions: [seq], or [batch, seq] where sequences start at different ones; by default they go on from the cache.
        run: calls a block with its arguments, `self.run` by default; whoever must record what blocks do passes another.
        context: what every block is given besides.
        """
        past, seq = 0 if cache is None else cache.length, h.shape[1]
        if mask is None and past and seq > 1:
            mask = torch.ones(seq, past + seq, dtype=torch.bool, device=h.device).tril(past)
        if positions is None:
            positions = torch.arange(past, past + seq, device=h.device)
        elif positions.ndim == 2:
            positions = positions.unsqueeze(1)
        wide = torch.promote_types(h.dtype, torch.float32)
        table = self.rotary_table(positions.to(wide), self.d_k, self.rope_base)
        run = run or self.run
        for i, block in enumerate(self.blocks):
            h = run(block, h, table, mask, None if cache is None else cache.layers[i], *context)
        return h

    @abstractmethod
    def loss(
        self, tokens: Tensor, targets: Tensor, mask: Tensor | None = None, positions: Tensor | None = None
    ) -> Tensor:
        """Mean cross-entropy in nats of int64 `targets` [batch, seq], where -100 is ignored; logits are never held whole."""

    @abstractmethod
    def conditioned(self, prompts: Rows, end_token: int | None) -> tuple[LanguageModel, Rows]:
        """What writes the texts that `prompts` (token ids, one row a text) ask for, and the rows that it goes on from.

        end_token: ends every text, `None` where the model needs to know of none.
        """

    def layer(self, h: Tensor, table: RotaryTable) -> Tensor:
        """The first layer alone, which stands for all where their cost is counted: [batch, seq, d_model] -> the same."""
        return run_block(self.blocks[0], h, table)

    @abstractmethod
    def reader(self, tokens: Tensor) -> Decoder:
        """What reads int64 `tokens` [batch, seq] for someone to look on: a model of one sequence with this model's blocks."""

    @abstractmethod
    def places(self, prompt: Sequence[int]) -> int:
        """How many of the max_seq_len positions of a text its prompt takes; `ValueError` for a prompt that cannot be read."""

    def read_loss(self, h: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy in nats of `targets` [batch, seq] read from `h` [batch, seq, d_model].

        What routers of experts have pending is in its gradient and not in its value.
        """
        smoothing = self.label_smoothing if self.training else 0.0
        features, weight, pullback = self.readout(h)
        features = features.flatten(0, 1)
        loss = linear_cross_entropy(features, weight, targets.flatten(), pullback, smoothing, self.score)
        return with_gradients_of(loss, pending_losses(self))

    def new_cache(self) -> KVCache:
        """An empty cache of keys and values, to be passed to `forward` with the prompt and then with each new token."""
        return KVCache(len(self.blocks))

    def set_compute_dtype(self, dtype: torch.dtype | None) -> None:
        """Compute in `dtype` from the embedding on; the weights keep theirs. None: in the dtype of the weights."""
        self.embed.compute_dtype = dtype

    def _remember_shape(self, config: DecoderConfig) -> None:
        self.config, self.run, self.label_smoothing, self.score = config, run_block, 0.0, score
        self.d_k, self.rope_base = config.d_model // config.n_heads, config.rope_base
        self.rotary_table = ROPES[config.rope].table


class LanguageModel(Decoder):
    """A causal language model: int64 tokens [batch, seq] -> logits [batch, seq, vocab] of every next token."""

    continues = True

    def forward(self, tokens: Tensor, cache: KVCache | None = None) -> Tensor:
        """Logits [batch, seq, vocab] of every position's next token, for int64 tokens [batch, seq]."""
        return read_logits(self.readout(self.trunk(self.embed(tokens), cache)))

    def loss(
        self, tokens: Tensor, targets: Tensor, mask: Tensor | None = None, positions: Tensor | None = None
    ) -> Tensor:
        """Mean cross-entropy in nats of `targets` int64 [batch, seq], where -100 is ignored; logits are never held whole.

        mask, positions: as for `trunk`.
        """
        return self.read_loss(self.trunk(self.embed(tokens), mask=mask, positions=positions), targets)

    def conditioned(self, prompts: Rows, end_token: int | None) -> tuple[LanguageModel, Rows]:
        """This model: it goes on from the prompts themselves."""
        return self, prompts

    def reader(self, tokens: Tensor) -> LanguageModel:
        """This model."""
        return self

    def places(self, prompt: Sequence[int]) -> int:
        """All of its tokens."""
        return len(prompt)

    def repeated(self, count: int) -> LanguageModel:
        """The model of a batch in which every row stands `count` times, one copy beside the other: the same for all rows."""
        return self
