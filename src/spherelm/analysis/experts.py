"""Mixtures of experts in numbers: who is picked how often on a text, and how different what they do is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from spherelm import sphere
from spherelm.analysis.parts import layers_with
from spherelm.layers.moe import AnyMixture
from spherelm.models.decoder import Decoder

Array = NDArray[np.float64]

POSITIONS = 256
"""At so many positions of the text, spread over it, every expert is asked what it would propose."""


@dataclass(frozen=True)
class Experts:
    """The mixtures of one model, M of them with E experts each, in the order of layers.

    `layers`: their layers' numbers, from 1, [M]. `load`: the part of all choices that fell on each expert, [M, E]; its
    mean is 1/E. `biases`: added to its score, [M, E]. `proposals`: mean angle in degrees between what two experts make
    of one position's state, [M, E, E]. `router`: angle between their rows of the router's matrix, [M, E, E].
    """

    layers: NDArray[np.int64]
    load: Array
    biases: Array
    proposals: Array
    router: Array


@dataclass
class _Watched:
    """Inputs [N, d_model] of one mixture, and the experts that its router picked."""

    mixture: AnyMixture
    inputs: list[Tensor] = field(default_factory=list)
    picked: list[Tensor] = field(default_factory=list)


@torch.no_grad()
def look_at_experts(model: Decoder, tokens: Tensor) -> Experts | None:
    """Run the model over int64 tokens [batch, seq] and see who is picked; `None` for a model without experts."""
    found: Mapping[int, Any] = layers_with(model, "experts")
    watched = {number: _Watched(sublayer.part) for number, sublayer in found.items()}
    if not watched:
        return None
    handles = [handle for seen in watched.values() for handle in _watch(seen)]
    try:
        reader = model.reader(tokens)
        reader.trunk(reader.embedded(tokens))
    finally:
        for handle in handles:
            handle.remove()
    return Experts(
        layers=np.array(list(watched)),
        load=np.stack([_load(seen) for seen in watched.values()]),
        biases=np.stack([_array(seen.mixture.router.score_bias) for seen in watched.values()]),
        proposals=np.stack([_array(between_proposals(s.mixture, torch.cat(s.inputs))) for s in watched.values()]),
        router=np.stack([_array(between_rows(seen.mixture)) for seen in watched.values()]),
    )


def _watch(seen: _Watched) -> list[torch.utils.hooks.RemovableHandle]:
    return [
        seen.mixture.register_forward_pre_hook(lambda _, inputs: seen.inputs.append(inputs[0].flatten(0, -2))),
        seen.mixture.router.register_forward_hook(lambda _, __, routing: seen.picked.append(routing.experts.flatten())),
    ]


def _load(seen: _Watched) -> Array:
    counts = torch.cat(seen.picked).bincount(minlength=seen.mixture.router.out_features)
    return _array(counts / counts.sum())


def between_proposals(mixture: AnyMixture, states: Tensor) -> Tensor:
    """Mean angle in degrees between what each two experts make of a state: [N, d_model] -> [E, E], 0 with itself.

    At most `POSITIONS` of the states are looked at. Directions count, which are what a step on the sphere heeds.
    """
    sample = states[torch.linspace(0, len(states) - 1, min(POSITIONS, len(states))).long()]
    count = mixture.router.out_features
    ends = torch.arange(1, count + 1, dtype=torch.int32, device=sample.device) * len(sample)
    made = sphere.norm(mixture.experts(sample.repeat(count, 1), ends).double()).unflatten(0, (count, -1))
    return torch.stack([sphere.angle(one, made).mean(-1) for one in made]).rad2deg()


def between_rows(mixture: AnyMixture) -> Tensor:
    """The angle in degrees between each two experts' rows of the router's matrix: [E, E]."""
    rows = sphere.norm(mixture.router.weight.detach().double())
    return sphere.angle(rows.unsqueeze(1), rows).rad2deg()


def _array(values: Tensor) -> Array:
    return np.asarray(values.to("cpu", torch.float64).numpy())
