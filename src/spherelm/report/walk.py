"""The walk on the sphere: a sentence's hidden states over the layers of a model, as one page to turn and to read."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from markupsafe import Markup
from numpy.typing import NDArray
from torch import Tensor

from spherelm import sphere
from spherelm.analysis.motion import output_directions
from spherelm.analysis.recording import record
from spherelm.counting import counted
from spherelm.data.tokenizer import Tokenizer, load_tokenizer
from spherelm.errors import UserError
from spherelm.layers.readout import read_logits
from spherelm.models.config import Config
from spherelm.models.decoder import Decoder
from spherelm.progress import say
from spherelm.report.pages import render
from spherelm.report.sphere_map import SphereMap, sphere_map
from spherelm.runs.checkpoint import named_checkpoint
from spherelm.runs.config import read_config
from spherelm.runs.loading import load_model

Array = NDArray[np.float64]

SENTENCE = "The old man looked out over the sea and thought of home."
"""The default sentence of the walk."""

MAX_TOKENS = 40
"""More paths than this cannot be distinguished in one picture."""

NEAREST = 5
"""Vocabulary entries that are named at each stop."""


@dataclass(frozen=True)
class Walk:
    """One model's walk over a sentence of T tokens, with S stops: at the embedding and after each step.

    `steps`: what each step is, (number of the layer, from 1; its part), [S - 1].
    `dimensions`: d_model. `tokens`: their texts. `map`: places of the stops, [S * T, 3], stop by stop. `moved`: degrees
    between a token's successive stops, [S - 1, T]. `lengths`: of the states, [S, T], 1 for nGPT.
    `entries`, `probabilities`,
    `angles`: the most probable next tokens at each stop, their probabilities, and the degrees between the state and
    their output vectors, [S, T, NEAREST]. `words`: text of each entry that occurs.
    """

    name: str
    arm: str
    dimensions: int
    tokens: list[str]
    map: SphereMap
    moved: Array
    lengths: Array
    entries: NDArray[np.int64]
    probabilities: Array
    angles: Array
    words: dict[int, str]
    steps: list[tuple[int, str]]


def directory_of(path: Path) -> Path:
    """The directory of the run that `path` is or of which it is a checkpoint,
    whether or not the run has checkpoints.
    """
    checkpoint = named_checkpoint(path)
    return path if checkpoint is None else checkpoint.parent.parent


def name_of(path: Path) -> str:
    """A short name of a run or a checkpoint: its last parts."""
    run = directory_of(path)
    return run.resolve().name if run == path else f"{run.name} {path.resolve().name}"


def trace_walks(runs: Sequence[Path], sentence: str | None = None) -> tuple[list[Walk], str]:
    """The walk of each run, and the sentence that they are of; raises as `trace_walk` does."""
    walked = fitting_sentence(runs) if sentence is None else sentence
    walks = [trace_walk(*load_model(run, with_tokenizer=True), walked, name_of(run)) for run in runs]
    say_if_cut(walked, sentence)
    return walks, walked


def fitting_sentence(paths: Sequence[Path]) -> str:
    """`SENTENCE`, or as much of its beginning as every run's tokenizer and context allow."""
    runs = [directory_of(path) for path in paths]
    readers = [(load_tokenizer(run), most_tokens(read_config(run / "config.json").model)) for run in runs]
    words = SENTENCE.split()
    beginnings = [" ".join(words[:count]) for count in range(len(words), 0, -1)]
    beginnings += [words[0][:count] for count in range(len(words[0]) - 1, 0, -1)]
    for found in beginnings:
        if all(len(tokenizer.encode(found)) <= limit for tokenizer, limit in readers):
            break
    return found


def say_if_cut(sentence: str, asked: str | None) -> None:
    """One line on stderr if the sentence is a part of `SENTENCE`, which nobody asked for."""
    if sentence not in (asked, SENTENCE):
        note = f"the walk shows {sentence!r} only: the whole default sentence has too many tokens"
        say(f"{note}; choose another with inspect --sentence")


@torch.no_grad()
def trace_walk(model: Decoder, tokenizer: Tokenizer, sentence: str, name: str) -> Walk:
    """Run the model over the sentence; `ValueError` for an empty one, one beyond `MAX_TOKENS`,
    or a state with NaN or Inf.
    """
    ids = tokenizer.encode(sentence)
    check_sentence(ids, model.config)
    recording = record(model, torch.tensor([ids]))
    states = torch.stack(recording.stops)
    if not torch.isfinite(states).all():
        raise UserError("a hidden state holds NaN or Inf: this model diverged, take an earlier checkpoint")
    unit = sphere.norm(states.double())
    entries, probabilities, angles = nearest_entries(model, states)
    with torch.enable_grad():
        places = sphere_map(unit.flatten(0, 1).numpy(), _steps(len(states), len(ids)))
    return Walk(
        name=name,
        arm=model.config.arm,
        dimensions=states.shape[-1],
        tokens=[readable(tokenizer.decode([i])) for i in ids],
        map=places,
        moved=sphere.angle(unit[:-1], unit[1:]).rad2deg().numpy(),
        lengths=states.norm(dim=-1).double().numpy(),
        entries=entries.numpy(),
        probabilities=probabilities.double().numpy(),
        angles=angles.double().numpy(),
        words={i: readable(tokenizer.decode([i])) for i in entries.unique().tolist()},
        steps=recording.steps,
    )


def check_sentence(ids: Sequence[int], config: Config) -> None:
    """`ValueError` if a model of this config cannot walk with the sentence's tokens."""
    limit, known = most_tokens(config), config.vocab_size
    if not 1 <= len(ids) <= limit:
        raise UserError(f"the sentence has {counted(len(ids), 'token')}: give one of 1 to {limit}")
    if max(ids) >= known:
        raise UserError(
            f"the sentence has token {max(ids)}, the model knows 0 to {known - 1}: this is not its tokenizer"
        )


def most_tokens(config: Config) -> int:
    """How many tokens a sentence may have for a model of this config."""
    return min(MAX_TOKENS, config.max_seq_len)


def nearest_entries(model: Decoder, states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of each state [S, T, d_model] the `NEAREST` most probable next tokens,
    their probabilities and angles in degrees.
    """
    directions, found = output_directions(model), []
    count = min(NEAREST, len(directions))
    for stop in states:
        top = read_logits(model.readout(stop)).to(torch.float32).softmax(-1).topk(count)
        turns = sphere.angle(sphere.norm(stop).unsqueeze(-2), directions[top.indices]).rad2deg()
        found.append((top.indices, top.values, turns))
    entries, probabilities, angles = (torch.stack(part) for part in zip(*found, strict=True))
    return entries, probabilities, angles


def _steps(stops: int, tokens: int) -> NDArray[np.int64]:
    """Pairs of places, stop by stop, that a path joins: [(S - 1) * T, 2]."""
    places = np.arange(stops * tokens).reshape(stops, tokens)
    return np.stack((places[:-1].ravel(), places[1:].ravel()), axis=1)


def readable(piece: str) -> str:
    """A token as one can read it: without the space before it, a line's end and what cannot be printed as signs."""
    shown = piece.replace("\n", "↵").replace("\t", "⇥").strip()
    return "".join(letter if letter.isprintable() else "·" for letter in shown) or ("␣" if piece else "∅")


def walk_page(walks: Sequence[Walk], sentence: str, back: str) -> str:
    """One self-contained page: no network, no library; it runs from a disk in any browser of today.

    back: the file beside it that links to it, and to which it leads back.
    """
    runs = [_plain(walk) for walk in walks]
    data = json.dumps({"sentence": sentence, "runs": runs}, ensure_ascii=False, allow_nan=False)
    kicker = "back to the comparison" if back == "report.html" else "back to the figures"
    return render("walk.html", back=back, kicker=kicker, data=Markup(data.replace("<", "\\u003c")))


def _plain(walk: Walk) -> dict[str, Any]:
    """A walk as JSON, numbers rounded to what can be seen."""
    stops, tokens = walk.lengths.shape
    order = {entry: i for i, entry in enumerate(walk.words)}
    return {
        "name": walk.name,
        "arm": walk.arm,
        "dimensions": walk.dimensions,
        "tokens": walk.tokens,
        "points": walk.map.points.reshape(stops, tokens, 3).round(4).tolist(),
        "steps": walk.steps,
        "moved": walk.moved.round(2).tolist(),
        "lengths": walk.lengths.round(3).tolist(),
        "words": list(walk.words.values()),
        "nearest": np.vectorize(order.__getitem__)(walk.entries).tolist(),
        "probabilities": walk.probabilities.round(4).tolist(),
        "angles": walk.angles.round(1).tolist(),
        "lost": {
            "error": round(walk.map.error, 2),
            "step": round(walk.map.step_error, 2),
            "correlation": round(walk.map.correlation, 3),
        },
    }
