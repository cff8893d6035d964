"""A recorded pass in numbers: angles moved, where proposals point, how states lie, what each layer would predict."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from spherelm import sphere
from spherelm.analysis.geometry import anisotropy, rank_of_rows
from spherelm.analysis.recording import Recording
from spherelm.errors import UserError
from spherelm.layers.loss import IGNORED
from spherelm.layers.readout import read_logits
from spherelm.models.decoder import Decoder

Array = NDArray[np.float64]

CHUNK = 1024
"""Positions whose logits are held at once."""


@dataclass(frozen=True)
class Lens:
    """Predictions if the output matrix read each stop, each [stops]; the last stop is the model's own prediction.

    `loss`: mean cross-entropy of the next token, in nats. `entropy`: of the predicted distribution, mean, in nats.
    `agreement`: part of the positions whose most probable token is the last stop's. `divergence`: mean Kullback-Leibler
    divergence from the last stop's distribution to this one's, in nats.
    """

    loss: Array
    entropy: Array
    agreement: Array
    divergence: Array


@dataclass(frozen=True)
class Motion:
    """A recorded pass in numbers; "steps" are the parts of layers, "stops" what lies before, between and after them.

    `steps`: (number of the layer, from 1; its part) of each.
    `angles`: degrees that each step turned each position's state, [steps, N]. `chords`: degrees from the first to the
    last stop, [N]. `lengths`: mean length of the states, [stops]. `to_state`, `to_prediction`: mean cosine of each
    step's proposal with the last state, and with the output vector of the token that the model finds most
    probable, [steps].
    `rank`: effective rank of the unit states, not centred, [stops]. `anisotropy`: mean cosine between the states of
    different positions, [stops]. `entropies`: attention entropy in nats, mean over queries, [layers that have it,
    n_heads]; `spread`: the same as a part of the most that each query could have.
    """

    steps: list[tuple[int, str]]
    angles: Array
    chords: Array
    lengths: Array
    to_state: Array
    to_prediction: Array
    rank: Array
    anisotropy: Array
    entropies: Array
    spread: Array
    lens: Lens

    def of_part(self, part: str) -> tuple[Array, list[int]]:
        """The numbers of the layers that have such a part, and which steps are theirs."""
        found = [(number, i) for i, (number, name) in enumerate(self.steps) if name == part]
        return np.array([number for number, _ in found], dtype=np.float64), [i for _, i in found]

    @property
    def depths(self) -> Array:
        """How many layers lie behind each stop, [stops]: whole behind a layer's last part,
        fractions between its parts.
        """
        numbers = [number for number, _ in self.steps]
        inside = [numbers[: i + 1].count(number) / numbers.count(number) for i, number in enumerate(numbers)]
        return np.array([0.0, *(number - 1 + part for number, part in zip(numbers, inside, strict=True))])


@torch.no_grad()
def measure_motion(model: Decoder, recording: Recording) -> Motion:
    """Everything in `Motion` of a pass of `model`; `ValueError` if a state holds NaN or Inf."""
    stops = recording.stops
    for i, stop in enumerate(stops):
        if not torch.isfinite(stop).all():
            raise UserError(
                f"the hidden state at stop {i} holds NaN or Inf: this model diverged, take an earlier checkpoint"
            )
    unit = [sphere.norm(stop) for stop in stops]
    angles = torch.stack([sphere.angle(a, b) for a, b in pairwise(unit)]).rad2deg()
    proposals = [sphere.norm(proposal) for proposal in recording.proposals]
    wanted = output_directions(model)[predictions(model, stops[-1])]
    entropies, spread = attention_spread(recording)
    return Motion(
        steps=recording.steps,
        angles=_array(angles),
        chords=_array(sphere.angle(unit[0], unit[-1]).rad2deg()),
        lengths=np.array([stop.norm(dim=-1).mean().item() for stop in stops]),
        to_state=np.array([(p * unit[-1]).sum(-1).mean().item() for p in proposals]),
        to_prediction=np.array([(p * wanted).sum(-1).mean().item() for p in proposals]),
        rank=np.array([rank_of_rows(_array(stop)) for stop in unit]),
        anisotropy=np.array([anisotropy(_array(stop)) for stop in unit]),
        entropies=entropies,
        spread=spread,
        lens=logit_lens(model, recording),
    )


def attention_spread(recording: Recording) -> tuple[Array, Array]:
    """Mean entropy in nats, [layers, n_heads], and as a part of log(keys in sight).

    The first position of a sequence sees one key, has no choice, and is left out.
    """
    entropies = recording.entropies[..., 1:]
    most = torch.arange(2, recording.entropies.shape[-1] + 1).log()
    return _array(entropies.mean((-1, -2))), _array((entropies / most).mean((-1, -2)))


def output_directions(model: Any) -> Tensor:
    """Unit vectors [vocab_size, d_model] along which a state's logits grow:
    the output matrix, of a GPT with its last gain.
    """
    head = model.head
    rows: Tensor = head.linear.weight * head.norm.weight if hasattr(head, "norm") else head.linear.weight
    return sphere.norm(rows.detach())


def predictions(model: Decoder, states: Tensor) -> Tensor:
    """The most probable next token of each state [N, d_model]: int64 [N]."""
    return torch.cat([_logits(model, part).argmax(-1) for part in states.split(CHUNK)])


def logit_lens(model: Decoder, recording: Recording) -> Lens:
    """Read every stop with the model's own read-out: on the sphere the output matrix itself,
    of a GPT behind its last norm.
    """
    tokens = recording.tokens
    targets = F.pad(tokens[:, 1:], (0, 1), value=IGNORED).flatten()
    sums = np.zeros((4, len(recording.stops)))
    for start in range(0, len(targets), CHUNK):
        here = slice(start, start + CHUNK)
        final = _logits(model, recording.stops[-1][here]).log_softmax(-1)
        chances, chosen = final.exp(), final.argmax(-1)
        known = (chances * final).sum()
        for i, stop in enumerate(recording.stops):
            logs = _logits(model, stop[here]).log_softmax(-1)
            loss = F.nll_loss(logs, targets[here], ignore_index=IGNORED, reduction="sum")
            agreed = (logs.argmax(-1) == chosen).sum()
            sums[:, i] += [x.item() for x in (loss, -(logs.exp() * logs).sum(), agreed, known - (chances * logs).sum())]
    scored = int((targets >= 0).sum())
    return Lens(sums[0] / scored, *(total / len(targets) for total in sums[1:]))


def _logits(model: Decoder, states: Tensor) -> Tensor:
    return read_logits(model.readout(states)).to(torch.float32)


def _array(values: Tensor) -> Array:
    return values.to(torch.float64).numpy()
