"""The kit of parts: `gpt.py` and `ngpt.py` each make one, and every architecture is written once, over a kit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor, nn

from spherelm.layers.attention import Attend, attend
from spherelm.layers.cache import LayerCache
from spherelm.layers.cross_attention import Memory
from spherelm.layers.moe import Router
from spherelm.layers.rope import RotaryTable
from spherelm.models.config import ModelConfig


class Surroundings(NamedTuple):
    """The inputs that a part may read besides the hidden state.

    table: of the rotary embedding. mask: as for `attend`. cache: the layer's own. since: int64 [batch, seq],
    see `StateSpace`.
    memory: what an encoder made of the source. attend: what computes attention.
    """

    table: RotaryTable
    mask: Tensor | None = None
    cache: LayerCache | None = None
    since: Tensor | None = None
    memory: Memory | None = None
    attend: Attend = attend

    def for_part(self, part: nn.Module) -> tuple[object, ...]:
        """The arguments of `part` after the hidden state: what it says that it `reads`."""
        return tuple(getattr(self, name) for name in part.reads)  # type: ignore[union-attr]


MakePart = Callable[[Any], nn.Module]
"""config -> a part: [batch, seq, d_model], and what it `reads`, -> [batch, seq, d_model]."""


@dataclass(frozen=True)
class Kit:
    """One arm: the parts of its models, and how they start.

    embedding: (rows, d_model) -> an `Embedding`. sublayer: (config, part) -> a module (h, surroundings) -> h, which
    adds what the part makes to the hidden state. attention, cross_attention, mlp, mixer, experts: make the parts.
    source_norm: makes what the last state of an encoder goes through. head: makes what turns the last hidden state into
    a `Readout`. draw: (model) initializes every matrix and learned scale again.
    """

    embedding: Callable[[int, int], Any]
    sublayer: Callable[[Any, nn.Module], nn.Module]
    attention: MakePart
    cross_attention: MakePart
    mlp: MakePart
    mixer: MakePart
    experts: MakePart
    source_norm: MakePart
    head: MakePart
    draw: Callable[[Any], None]


def router_of(config: ModelConfig) -> Router:
    """A router with the config's choices.

    The weights of several picked experts are their scores over their sum; of a single one that would be 1, whatever the
    router says, and its weight is its score.
    """
    sizes, count = config.experts, config.experts.experts_per_token
    return Router(config.d_model, sizes.n_experts, count, sizes.router_score, count > 1, sizes.balance)
