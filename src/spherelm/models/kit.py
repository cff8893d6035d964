"""What a kit of parts is: `gpt.py` and `ngpt.py` each make one, and every architecture is written once, over a kit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor, nn

from spherelm.layers.attention import Attend, attend
from spherelm.layers.cache import LayerCache
from spherelm.layers.cross_attention import Memory
from spherelm.layers.rope import RotaryTable


class Surroundings(NamedTuple):
    """What a part may read besides the hidden state.

    table: of the rotary embedding. mask: as for `attend`. cache: the layer's own. since: int64 [batch, seq], see `StateSpace`.
    memory: what an encoder made of the source. attend: what computes attention.
    """

    table: RotaryTable
    mask: Tensor | None = None
    cache: LayerCache | None = None
    since: Tensor | None = None
    memory: Memory | None = None
    attend: Attend = attend

    def for_part(self, part: nn.Module) -> tuple[object, ...]:
        """The arguments of `part` behind the hidden state: what it says that it `reads`, by default nothing."""
        reads: tuple[str, ...] = getattr(part, "reads", ())
        return tuple(getattr(self, name) for name in reads)


MakePart = Callable[[Any], nn.Module]
"""config -> a part: [batch, seq, d_model], and what it `reads`, -> [batch, seq, d_model]."""


@dataclass(frozen=True)
class Kit:
    """One arm: the parts of its models, and how they start.

    embedding: (rows, d_model) -> an `Embedding`. sublayer: (config, part) -> a module (h, surroundings) -> h, which adds what
    the part makes to the hidden state. attention, cross_attention, mlp, mixer, experts: make the parts. source_norm: makes
    what the last state of an encoder goes through. head: (config) -> what turns the last hidden state into a `Readout`. draw:
    (model) draws every matrix and learned scale anew.
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
