"""What both hybrids share: a pattern of letters, each of them one layer, and what such a layer reads besides the hidden state.

| letter | layer | it reads | it remembers |
|---|---|---|---|
| M | Mamba-2 mixer | positions before | a state |
| A | attention | positions before, their distances unless `rope` is "none" | keys and values |
| - | MLP | nothing else | nothing |
| O | mixture of experts | nothing else | nothing |

`Hybrid` and `NHybrid` say what is different.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

from torch import Tensor

from spherelm.layers.cache import KVCache, LayerCache, StateCache
from spherelm.layers.mamba2 import MambaShape
from spherelm.layers.moe import Router
from spherelm.layers.rope import RotaryTable
from spherelm.models.decoder import DecoderConfig, LanguageModel, RunBlock


@dataclass(frozen=True, kw_only=True)
class PatternFields:
    """The fields that configs of hybrids have besides those of `GPTConfig` or `NGPTConfig`.

    pattern: a letter for each of the n_layers layers, such as "MAM-MAMO"; a layer of GPT is two here, "A-". mamba_expand:
    channels inside of a mixer over d_model, in heads of mamba_d_head with states of mamba_d_state; mamba_groups: heads in one
    group share B and C; mamba_conv: positions that its convolution sees; mamba_chunk: positions computed as one product.
    n_experts: of a mixture, of which a token meets experts_per_token, and beside them n_shared_experts; d_expert: the width of
    each, by default such that those it meets are as wide as an MLP together; router_score, balance: as for `Router`.
    """

    pattern: str
    mamba_expand: int = 2
    mamba_d_head: int = 64
    mamba_d_state: int = 64
    mamba_groups: int = 1
    mamba_conv: int = 4
    mamba_chunk: int = 64
    n_experts: int = 8
    experts_per_token: int = 2
    n_shared_experts: int = 0
    d_expert: int | None = None
    router_score: str = "sigmoid"
    balance: str = "bias"


class PatternConfig(DecoderConfig, Protocol):
    """What the functions below need to know of a hybrid's config."""

    @property
    def pattern(self) -> str: ...
    @property
    def mamba_expand(self) -> int: ...
    @property
    def mamba_d_head(self) -> int: ...
    @property
    def mamba_d_state(self) -> int: ...
    @property
    def mamba_groups(self) -> int: ...
    @property
    def mamba_conv(self) -> int: ...
    @property
    def mamba_chunk(self) -> int: ...
    @property
    def n_experts(self) -> int: ...
    @property
    def experts_per_token(self) -> int: ...
    @property
    def n_shared_experts(self) -> int: ...
    @property
    def d_expert(self) -> int | None: ...
    @property
    def router_score(self) -> str: ...
    @property
    def balance(self) -> str: ...


def check_pattern(config: PatternConfig) -> None:
    """Raise `ValueError`, naming the value and the fix, if the pattern cannot make a model."""
    if not isinstance(config.pattern, str):
        raise ValueError(f"pattern must be a text with a letter for each layer, such as 'MAM-', got {config.pattern!r}")
    strange = sorted(set(config.pattern) - set(READS))
    if strange:
        raise ValueError(
            f"pattern {config.pattern!r} has {', '.join(map(repr, strange))}: a layer is one of {', '.join(READS)}"
        )
    if len(config.pattern) != config.n_layers:
        raise ValueError(
            f"pattern {config.pattern!r} has {len(config.pattern)} letters for n_layers={config.n_layers}: one for each layer"
        )
    if "M" in config.pattern:
        check_mixers(config)
    if "O" in config.pattern:
        check_experts(config)


def check_mixers(config: PatternConfig) -> None:
    """Raise `ValueError`, naming the value and the fix, if the sizes make no Mamba-2 mixer."""
    for name in ("expand", "d_head", "d_state", "groups", "conv", "chunk"):
        value, least = getattr(config, f"mamba_{name}"), 2 if name == "conv" else 1
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ValueError(f"mamba_{name} must be a whole number of at least {least}, got {value!r}")
    width = config.mamba_expand * config.d_model
    if width % config.mamba_d_head:
        raise ValueError(
            f"mamba_d_head={config.mamba_d_head} does not divide mamba_expand * d_model = {width}: choose a divisor"
        )
    if width // config.mamba_d_head % config.mamba_groups:
        raise ValueError(
            f"mamba_groups={config.mamba_groups} does not divide the {width // config.mamba_d_head} heads of a mixer"
        )


def check_experts(config: PatternConfig) -> None:
    """Raise `ValueError`, naming the value and the fix, if the sizes make no mixture of experts."""
    for name, least in (("n_experts", 1), ("experts_per_token", 1), ("n_shared_experts", 0), ("d_expert", 1)):
        value = getattr(config, name)
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < least):
            raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}")
    if expert_width(config) < 1:
        raise ValueError(
            f"d_ff={config.d_ff} is too narrow for {config.experts_per_token} experts a token: give d_expert"
        )
    router_of(config)


def expert_width(config: PatternConfig) -> int:
    """d_ff of each expert."""
    return config.d_expert or (config.d_ff or 4 * config.d_model) // (
        config.experts_per_token + config.n_shared_experts
    )


def router_of(config: PatternConfig) -> Router:
    """A router with the config's choices. Raises `ValueError` for ones that are not known.

    The weights of several picked experts are their scores over their sum; of a single one that would be 1, whatever the router
    says, and its weight is its score.
    """
    count = config.experts_per_token
    return Router(config.d_model, config.n_experts, count, config.router_score, count > 1, config.balance)


def mamba_shape(config: PatternConfig) -> MambaShape:
    """The sizes of the config's Mamba-2 mixers."""
    return MambaShape(
        d_model=config.d_model,
        n_heads=config.mamba_expand * config.d_model // config.mamba_d_head,
        d_head=config.mamba_d_head,
        d_state=config.mamba_d_state,
        n_groups=config.mamba_groups,
        conv_width=config.mamba_conv,
        chunk_size=config.mamba_chunk,
    )


@dataclass(frozen=True)
class Surroundings:
    """What a layer may read besides the hidden state. since: int64 [batch, seq], see `StateSpace`."""

    table: RotaryTable
    mask: Tensor | None
    cache: LayerCache | None
    since: Tensor | None


NAMES = {"M": "mamba", "A": "attention", "-": "mlp", "O": "experts"}
"""What a block calls its layer, by letter; attention and MLP are called as GPT's are."""

Read = Callable[[Any, Tensor, Surroundings], Tensor]
"""(block, h, surroundings) -> what the block's layer proposes: [batch, seq, d_model] -> the same."""


def read_mamba(block: Any, h: Tensor, around: Surroundings) -> Tensor:
    """The layer M. These functions have names so that models which keep them can be pickled."""
    return block.mamba(h, around.cache, around.since)


def read_attention(block: Any, h: Tensor, around: Surroundings) -> Tensor:
    """The layer A."""
    return block.attention(h, around.table, around.mask, around.cache)


def read_mlp(block: Any, h: Tensor, around: Surroundings) -> Tensor:
    """The layer -."""
    return block.mlp(h)


def read_experts(block: Any, h: Tensor, around: Surroundings) -> Tensor:
    """The layer O."""
    return block.experts(h)


READS: dict[str, Read] = {"M": read_mamba, "A": read_attention, "-": read_mlp, "O": read_experts}
"""How the layer of each letter is called."""

CACHES: dict[str, type[LayerCache]] = {"M": StateCache}
"""What remembers for the layer of a letter, where it is not a `LayerCache`."""


class PatternModel(LanguageModel):
    """A causal language model of the layers that a pattern names: `blocks`, one a letter."""

    pattern: str

    @classmethod
    def single_layers(cls, config: Any) -> dict[Any, int]:
        """As in `Decoder`: one for each letter that occurs."""
        return {replace(config, n_layers=1, pattern=letter): n for letter, n in Counter(config.pattern).items()}

    def trunk(
        self,
        h: Tensor,
        cache: KVCache | None = None,
        mask: Tensor | None = None,
        positions: Tensor | None = None,
        run: RunBlock | None = None,
        context: tuple[object, ...] = (),
    ) -> Tensor:
        """As in `Decoder`. In positions [batch, seq] a text begins at 0, and no state comes over from the one before.

        Raises `ValueError` for a mask without such positions, which attention alone would heed.
        """
        since = None if positions is None or positions.ndim == 1 else positions.expand(h.shape[:2])
        if mask is not None and since is None and "M" in self.pattern:
            raise ValueError(
                "a Mamba-2 layer does not read the mask: give positions [batch, seq] that are 0 where a text begins"
            )
        return super().trunk(h, cache, mask, positions, run, (since, *context))

    def new_cache(self) -> KVCache:
        """An empty cache: keys and values of attention, states of mixers."""
        return KVCache(CACHES.get(letter, LayerCache)() for letter in self.pattern)
