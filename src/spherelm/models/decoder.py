"""Models that write tokens from left to right, written once over a kit of parts: `gpt.py` or `ngpt.py`.

A model is an embedding, blocks, and a head. A block is the sublayers that its letters name:

| letter | part | it reads besides the hidden state | it remembers |
|---|---|---|---|
| A | attention | positions before, their distances unless `rope` is "none" | keys and values |
| C | cross-attention | what an encoder made of the source | the source's keys and values |
| - | MLP | nothing else | nothing |
| M | Mamba-2 mixer | positions before | a state |
| O | mixture of experts | nothing else | nothing |
"""

from __future__ import annotations

from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from spherelm.errors import UserError
from spherelm.layers.attention import Attend, attend
from spherelm.layers.cache import KVCache, LayerCache, StateCache
from spherelm.layers.cross_attention import Memory
from spherelm.layers.linear import Embedding
from spherelm.layers.loss import Score, linear_cross_entropy, score, with_gradients_of
from spherelm.layers.mamba2 import StateSpace
from spherelm.layers.moe import pending_losses
from spherelm.layers.readout import Readout, read_logits
from spherelm.layers.rope import ROPES, MakeTable, RotaryTable
from spherelm.models import gpt, ngpt
from spherelm.models.config import Config
from spherelm.models.kit import Kit, Surroundings

KITS: dict[str, Kit] = {"gpt": gpt.KIT, "ngpt": ngpt.KIT}
"""By the name of the arm."""

SUBLAYER_NAMES = {"A": "attention", "C": "cross_attention", "-": "mlp", "M": "mixer", "O": "experts"}
"""For each letter, the block's attribute with its sublayer, and the kit's constructor of its part."""

Rows = Sequence[Sequence[int]]
"""Token ids, a row a text."""

RunBlock = Callable[[nn.Module, Tensor, Surroundings], Tensor]
"""(block, h, surroundings) -> h."""


def run_block(block: nn.Module, h: Tensor, around: Surroundings) -> Tensor:
    """Call `block`."""
    after: Tensor = block(h, around)
    return after


@dataclass
class Runtime:
    """How a model is run: all that trainers, compilers and inspectors may change on a model after it was built.

    table, rope_base: make the table of the rotary embedding. compute_dtype: of the hidden state and of everything
    computed from it; `None` for that of the weights, which keep theirs. run: calls a block. attend: computes attention.
    score: what a chunk of logits costs, and their gradients. label_smoothing: of the loss in training mode, as for
    `linear_cross_entropy`; in eval mode there is none.
    """

    table: MakeTable
    rope_base: float
    compute_dtype: torch.dtype | None = None
    run: RunBlock = run_block
    attend: Attend = attend
    score: Score = score
    label_smoothing: float = 0.0


class Block(nn.Module):
    """Sublayers one after the other, by name; `letters` are those of their parts."""

    def __init__(self, letters: str, sublayers: dict[str, nn.Module]) -> None:
        super().__init__()
        self.letters = letters
        for name, sublayer in sublayers.items():
            self.add_module(name, sublayer)

    @classmethod
    def of(cls, config: Config, letters: str) -> Block:
        """The block of the arm's parts."""
        kit = KITS[config.arm]
        names = [SUBLAYER_NAMES[letter] for letter in letters]
        return cls(letters, {name: kit.sublayer(config, getattr(kit, name)(config)) for name in names})

    @property
    def sublayers(self) -> dict[str, Any]:
        """By name, in their order."""
        return dict(self.named_children())

    def forward(self, h: Tensor, around: Surroundings) -> Tensor:
        """[batch, seq, d_model] -> the same."""
        for sublayer in self.children():
            h = sublayer(h, around)
        return h


class Decoder(nn.Module):
    """A model that is trained: `embed`, `blocks` and a `head`.

    Its parts are those of the config's arm. words: the letters of each block. rows: of the input embedding, the
    vocabulary by default. What a model reads besides the tokens before is its own business: `loss` takes a batch of the
    data that it is for.
    """

    config: Config
    runtime: Runtime
    embed: Embedding
    blocks: nn.ModuleList
    head: Any

    def __init__(self, config: Config, words: Iterable[str], rows: int | None = None) -> None:
        super().__init__()
        self.config, kit = config, KITS[config.arm]
        self.runtime = Runtime(ROPES[config.rope].table, config.rope_base)
        self.embed = kit.embedding(rows or config.vocab_size, config.d_model)
        self.blocks = nn.ModuleList(Block.of(config, word) for word in words)
        self.head = kit.head(config)
        if config.tie_embeddings:
            self.head.linear.weight = self.embed.weight

    @classmethod
    def single_layers(cls, config: Config) -> dict[Config, int]:
        """Configs of one layer each, and how many such layers the model of `config` has:
        what is counted once for all alike.
        """
        return {replace(config, n_layers=1): config.n_layers}

    def stacks(self) -> list[nn.ModuleList]:
        """The lists of blocks that each carry a hidden state of their own."""
        return [self.blocks]

    def init_weights(self) -> None:
        """Initialize every weight again, from the distributions that the kit's module states."""
        KITS[self.config.arm].draw(self)
        for module in self.modules():
            if isinstance(module, StateSpace):
                module.init_weights()

    def embedded(self, tokens: Tensor) -> Tensor:
        """The hidden state that int64 tokens [batch, seq] start from: [batch, seq, d_model], in the compute dtype."""
        return embedded(self.embed, tokens, self.runtime)

    def readout(self, h: Tensor) -> Readout:
        """The module that turns the last hidden state [..., d_model] into logits."""
        read: Readout = self.head(h)
        return read

    def trunk(
        self,
        h: Tensor,
        cache: KVCache | None = None,
        mask: Tensor | None = None,
        positions: Tensor | None = None,
        run: RunBlock | None = None,
        memory: Memory | None = None,
    ) -> Tensor:
        """All blocks: [batch, seq, d_model] -> the same. With a cache, `h` continues the positions that it holds.

        mask: bool [batch, 1, seq, past + seq], True where a query may look; by default everything up to itself.
        positions: [seq], or [batch, seq] where sequences start at different ones; by default they
        continue from the cache.
        run: calls a block, `runtime.run` by default; whoever must record what blocks do passes another.
        memory: what an encoder made of the source.
        """
        past, seq, since = 0 if cache is None else cache.length, h.shape[1], self._since(h, mask, positions)
        if mask is None and past and seq > 1:
            mask = torch.ones(seq, past + seq, dtype=torch.bool, device=h.device).tril(past)
        if positions is None:
            positions = torch.arange(past, past + seq, device=h.device)
        table = table_of(self.runtime, self.config.d_k, positions.unsqueeze(1) if positions.ndim == 2 else positions, h)
        around = Surroundings(table, mask, None, since, memory, self.runtime.attend)
        run = run or self.runtime.run
        for i, block in enumerate(self.blocks):
            h = run(block, h, around if cache is None else around._replace(cache=cache.layers[i]))
        return h

    def _since(self, h: Tensor, mask: Tensor | None, positions: Tensor | None) -> Tensor | None:
        """How many positions ahead of each belong to its text, for mixers, where texts begin in mid-row.

        Raises `ValueError` for a mask without such positions, which attention alone would heed.
        """
        if not any("M" in block.letters for block in self.blocks):  # type: ignore[operator]
            return None
        if positions is not None and positions.ndim == 2:
            return positions.expand(h.shape[:2])
        if mask is not None:
            raise UserError(
                "a Mamba-2 layer does not read the mask: give positions [batch, seq] that are 0 where a text begins"
            )
        return None

    @abstractmethod
    def loss(
        self, tokens: Tensor, targets: Tensor, mask: Tensor | None = None, positions: Tensor | None = None
    ) -> Tensor:
        """Mean cross-entropy in nats of int64 `targets` [batch, seq], where -100 is ignored;
        logits are never held whole.
        """

    def layer(self, h: Tensor, table: RotaryTable) -> Tensor:
        """The first layer alone, which stands for all where their cost is counted:
        [batch, seq, d_model] -> the same.
        """
        return run_block(self.blocks[0], h, Surroundings(table))

    @abstractmethod
    def reader(self, tokens: Tensor) -> Decoder:
        """A model of one sequence with this model's blocks, which reads int64 `tokens` [batch, seq] for inspection."""

    def read_loss(self, h: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy in nats of `targets` [batch, seq] read from `h` [batch, seq, d_model].

        What routers of experts have pending is in its gradient and not in its value.
        """
        smoothing = self.runtime.label_smoothing if self.training else 0.0
        features, weight, pullback = self.readout(h)
        features = features.flatten(0, 1)
        loss = linear_cross_entropy(features, weight, targets.flatten(), pullback, smoothing, self.runtime.score)
        return with_gradients_of(loss, pending_losses(self))


class GenerativeModel(Decoder):
    """A model that writes texts. continues: whether they begin with their prompts."""

    continues: ClassVar[bool]

    @abstractmethod
    def conditioned(self, prompts: Rows, end_token: int | None) -> tuple[LanguageModel, Rows]:
        """The generator of the texts for `prompts` (token ids, one row per text), and the rows that it continues.

        end_token: ends every text, `None` where the model needs to know of none.
        """

    @abstractmethod
    def places(self, prompt: Sequence[int]) -> int:
        """How many of the max_seq_len positions of a text its prompt takes;
        `ValueError` for a prompt that cannot be read.
        """

    def new_cache(self) -> KVCache:
        """An empty cache, to be passed to `forward` with the prompt and then with each new token."""
        return KVCache(StateCache() if block.letters == "M" else LayerCache() for block in self.blocks)


class LanguageModel(GenerativeModel):
    """A causal language model: int64 tokens [batch, seq] -> logits [batch, seq, vocab] of every next token.

    Its layers are attention and MLP, or those of the config's `pattern`, a letter each.
    """

    continues = True

    def __init__(self, config: Config) -> None:
        super().__init__(config, config.pattern or ["A-"] * config.n_layers)
        self.init_weights()

    @classmethod
    def single_layers(cls, config: Config) -> dict[Config, int]:
        """As in `Decoder`: of a pattern one for each letter that occurs."""
        if config.pattern is None:
            return super().single_layers(config)
        arch: Any = config.architecture
        return {
            replace(config, n_layers=1, architecture=replace(arch, pattern=letter)): count
            for letter, count in Counter(config.pattern).items()
        }

    def forward(self, tokens: Tensor, cache: KVCache | None = None) -> Tensor:
        """Logits [batch, seq, vocab] of every position's next token, for int64 tokens [batch, seq]."""
        return read_logits(self.readout(self.trunk(self.embedded(tokens), cache)))

    def loss(
        self, tokens: Tensor, targets: Tensor, mask: Tensor | None = None, positions: Tensor | None = None
    ) -> Tensor:
        """Mean cross-entropy in nats of `targets` int64 [batch, seq], where -100 is ignored;
        logits are never held whole.

        mask, positions: as for `trunk`.
        """
        return self.read_loss(self.trunk(self.embedded(tokens), mask=mask, positions=positions), targets)

    def conditioned(self, prompts: Rows, end_token: int | None) -> tuple[LanguageModel, Rows]:
        """This model: it continues the prompts themselves."""
        return self, prompts

    def reader(self, tokens: Tensor) -> LanguageModel:
        """This model."""
        return self

    def places(self, prompt: Sequence[int]) -> int:
        """All of its tokens."""
        return len(prompt)

    def repeated(self, count: int) -> LanguageModel:
        """The model of a batch in which every row stands `count` times, one copy beside the other:
        the same for all rows.
        """
        return self


def embedded(embedding: Embedding, tokens: Tensor, runtime: Runtime) -> Tensor:
    """The rows of `embedding` that int64 `tokens` name, in the compute dtype (eq. 1)."""
    rows: Tensor = embedding(tokens)
    return rows if runtime.compute_dtype is None else rows.to(runtime.compute_dtype)


def table_of(runtime: Runtime, d_k: int, positions: Tensor, h: Tensor) -> RotaryTable:
    """The rotary table of `positions` [..., seq], for a hidden state like `h`: float32, or wider where that is."""
    wide = torch.promote_types(h.dtype, torch.float32)
    return runtime.table(positions.to(wide), d_k, runtime.rope_base)
