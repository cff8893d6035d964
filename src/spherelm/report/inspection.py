"""`spherelm inspect`: run directories in, a directory of figures, tables and a page out."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from spherelm.analysis.geometry import off_sphere
from spherelm.analysis.inside import Inside, look_inside
from spherelm.analysis.weights import check_finite
from spherelm.counting import counted
from spherelm.data.corpus import shipped_documents
from spherelm.data.output import write_json
from spherelm.data.tokenizer import Tokenizer
from spherelm.errors import UserError, read_text
from spherelm.fields import check
from spherelm.models import ARM_NAMES, EncoderArch
from spherelm.models.decoder import Decoder
from spherelm.report.drawing import Figure, require_matplotlib
from spherelm.report.inside_tables import write_tables
from spherelm.report.pages import Sections, new_directory, render, write_figures
from spherelm.report.state_figures import expert_section, lens_section, motion_section, training_section
from spherelm.report.walk import (
    Walk,
    check_sentence,
    fitting_sentence,
    name_of,
    say_if_cut,
    trace_walk,
    walk_page,
)
from spherelm.report.weight_figures import weight_section
from spherelm.report.wording import si
from spherelm.runs.checkpoint import NAME, STATE, latest_checkpoint, named_checkpoint
from spherelm.runs.config import read_config
from spherelm.runs.loading import load_model, run_directory
from spherelm.runs.record import command_line, git_commit, versions

RECORD = "inspect.json"
"""The file by which a directory is known as one of `spherelm inspect`."""

SHAPE = ("n_layers", "d_model", "n_heads", "n_kv_heads", "d_ff", "vocab_size", "architecture")
"""The fields of a config that runs must agree in to be drawn as one model; not every config has all."""


@dataclass(frozen=True)
class Inspected:
    """One inspected run: where it is, its arm, what was found inside, and how far from the sphere its checkpoints are.

    `distances`: (update, {matrix: largest departure}) of each checkpoint, oldest first. `walk`: of the sentence.
    """

    name: str
    arm: str
    parameters: int
    update: int
    inside: Inside
    distances: Sequence[tuple[int, dict[str, float]]]
    walk: Walk


@dataclass(frozen=True)
class Request:
    """The text, sentence and layer to inspect.

    Attributes:
        text: Text file that the models read; the shipped validation text if left out.
        sentence: Sentence of the walk on the sphere, at most 40 tokens; if left out, a default that fits the model.
        tokens: Number of tokens to read from the text.
        layer: Show the queries and keys of this layer, counted from 1; the middle one if left out.
        images: Whether PNG files are written too.
    """

    text: Path | None = None
    sentence: str | None = None
    tokens: Annotated[int, Field(ge=2)] = 2048
    layer: int | None = None
    images: bool = True

    def __post_init__(self) -> None:
        check(self)


def inspect(runs: Sequence[Path], out: Path, request: Request, overwrite: bool = False) -> list[Figure]:
    """Look into every run and write `out`: index.html, walk.html, figures/, tables/, inspect.json; returns the figures.

    runs: run directories, single checkpoints, or directories of `spherelm compare`, which stand for their full runs.
    Runs of one arm are drawn as seeds of one model and must have one shape. `out` appears whole or not at all;
    overwrite: in the place of what an earlier call wrote there. Raises `NotFoundError` for a missing run,
    `OutputExistsError` where `out` holds something, `UserError` for a model that holds NaN or for no matplotlib.
    """
    if not runs:
        raise UserError("no run is named: give directories of spherelm train or compare")
    require_matplotlib()
    with new_directory(out, RECORD, overwrite) as part:
        text = _text(request)
        paths = [path for run in runs for path in expand(run)]
        check_shapes(paths)
        sentence = fitting_sentence(paths) if request.sentence is None else request.sentence
        inspected = [_inspect(path, text, sentence, request) for path in paths]
        sections = _sections(inspected)
        figures = write_figures(sections, part, request.images)
        (part / "tables").mkdir()
        tables = write_tables(
            [(item.name, item.arm, item.inside, item.distances) for item in inspected], part / "tables"
        )
        walk = walk_page([item.walk for item in inspected], sentence, "index.html")
        (part / "walk.html").write_text(walk, encoding="utf-8")
        write_json(part / RECORD, _record(inspected, sentence, request))
        (part / "index.html").write_text(_page(inspected, sections, tables, sentence, request), encoding="utf-8")
    say_if_cut(sentence, request.sentence)
    return figures


def expand(path: Path) -> list[Path]:
    """A run or a checkpoint as it is; of a comparison's directory the full runs of both arms."""
    summary = path / "summary.json"
    if not summary.is_file():
        return [named_checkpoint(path) or path]
    try:
        arms = json.loads(summary.read_text("utf-8"))["arms"]
        return [path / name for arm in arms.values() for name in arm["runs"]]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{summary} is damaged ({error!r}): pass the run directories in {path} instead") from None


def check_shapes(paths: Sequence[Path]) -> None:
    """`ValueError` if two runs of one arm have different shapes."""
    shapes: dict[str, tuple[Path, tuple[Any, ...]]] = {}
    for path in paths:
        config = read_config(run_directory(path) / "config.json")
        model = config.model
        if isinstance(model.architecture, EncoderArch):
            raise UserError(f"{path} is an encoder: inspect draws only models that predict the next token")
        shape = tuple(getattr(model, name) for name in SHAPE)
        first, known = shapes.setdefault(config.arm, (path, shape))
        if shape != known:
            raise UserError(
                f"{path} and {first} are runs of {config.arm} of different sizes, not seeds of one model: "
                "inspect them one after the other"
            )


def _text(request: Request) -> str:
    """Enough text for the positions asked for."""
    if request.text is None:
        found: list[str] = []
        for document in shipped_documents("val"):
            found.append(document["text"])
            if sum(map(len, found)) > 16 * request.tokens:
                break
        return "\n\n".join(found)
    return read_text(request.text, "give a text file as --text")


def windows(tokenizer: Tokenizer, text: str, model: Decoder, positions: int) -> Tensor:
    """The first `positions` tokens of the text as int64 [batch, seq],
    whole sequences of the model's max_seq_len at most.
    """
    ids = tokenizer.encode(text[: 16 * positions])[:positions]
    if len(ids) < 2:
        raise UserError(f"the text has {counted(len(ids), 'token')}: give at least two")
    check_ids(ids, model)
    seq = min(model.config.max_seq_len, len(ids))
    if seq < 2:
        raise UserError("the model reads one token at a time: there is no next token to show")
    return torch.tensor(ids[: len(ids) // seq * seq]).reshape(-1, seq)


def check_ids(ids: Sequence[int], model: Decoder) -> None:
    """`ValueError` if a token is none of the model's."""
    if max(ids) >= model.config.vocab_size:
        raise UserError(
            f"the run's tokenizer gives token {max(ids)}, its model knows 0 to {model.config.vocab_size - 1}: they do not "
            "belong together"
        )


def _inspect(path: Path, text: str, sentence: str, request: Request) -> Inspected:
    model, tokenizer = load_model(path, with_tokenizer=True)
    layer = None if request.layer is None else request.layer - 1
    if layer is not None and not 0 <= layer < len(model.blocks):
        raise UserError(f"layer must be 1 to {len(model.blocks)} for {path}, got {request.layer}")
    try:
        tokens = windows(tokenizer, text, model, request.tokens)
        check_sentence(tokenizer.encode(sentence), model.config)  # ahead of what takes long
        inside = look_inside(model, tokens, layer)
        walk = trace_walk(model, tokenizer, sentence, name_of(path))
    except ValueError as error:
        raise UserError(f"{path} cannot be inspected: {error}") from error
    config = read_config(run_directory(path) / "config.json")
    count = sum(parameter.numel() for parameter in model.parameters())
    distances = list(_distances(path, model))
    return Inspected(name_of(path), config.arm, count, distances[-1][0], inside, distances, walk)


def _distances(path: Path, model: Decoder) -> Iterator[tuple[int, dict[str, float]]]:
    """(update, largest departures) of each checkpoint of a run up to the inspected one, whose model is given."""
    run = run_directory(path)
    inspected = path if path != run else latest_checkpoint(run)
    assert inspected is not None
    for checkpoint in sorted(
        c for c in (run / "checkpoints").iterdir() if NAME.fullmatch(c.name) and (c / STATE).exists()
    ):
        if checkpoint.name < inspected.name:
            earlier = load_model(checkpoint)
            check_finite(earlier)
            yield int(checkpoint.name[5:]), off_sphere(earlier)
    yield int(inspected.name[5:]), off_sphere(model)


def _sections(inspected: Sequence[Inspected]) -> Sections:
    by_arm = {arm: own for arm in ARM_NAMES if (own := [item for item in inspected if item.arm == arm])}
    found = {arm: [item.inside for item in own] for arm, own in by_arm.items()}
    distances = {
        arm: [tuple(np.array([(update, max(d.values())) for update, d in item.distances]).T) for item in own]
        for arm, own in by_arm.items()
    }
    return [
        ("In the weights", weight_section(found)),
        ("On the way through the model", motion_section(found)),
        ("Experts", expert_section(found)),
        ("What each layer would predict", lens_section(found)),
        ("Over training", training_section(distances)),
    ]


def _record(inspected: Sequence[Inspected], sentence: str, request: Request) -> dict[str, Any]:
    """The content of `inspect.json`: which runs, which text, and made by what."""
    return {
        "runs": [{"name": i.name, "arm": i.arm, "parameters": i.parameters, "update": i.update} for i in inspected],
        "text": "shipped validation text" if request.text is None else str(request.text),
        "tokens": inspected[0].inside.motion.angles.shape[1],
        "sentence": sentence,
        "pair_rows": inspected[0].inside.pair_rows,
        "command": command_line(),
        "git_commit": git_commit(),
        "versions": versions(),
    }


def _page(
    inspected: Sequence[Inspected], sections: Sections, tables: Sequence[Path], sentence: str, request: Request
) -> str:
    source = "the validation text that ships with spherelm" if request.text is None else request.text.name
    count = inspected[0].inside.motion.angles.shape[1]
    rows = [
        (i.name, ARM_NAMES[i.arm], f"{i.parameters:,}", f"{i.update:,}", f"{i.inside.motion.lens.loss[-1]:.3f}")
        for i in inspected
    ]
    return render(
        "inspect.html",
        kicker="spherelm inspect",
        title="Inside the models",
        subtitle=f"{counted(len(inspected), 'run')} · {si(count)} tokens of text",
        caption=f"Inspected runs. The loss is that on the {count:,} tokens read, of {source}.",
        rows=rows,
        sentence=sentence,
        sections=sections,
        tables=[path.name for path in tables],
        command=command_line(),
    )
