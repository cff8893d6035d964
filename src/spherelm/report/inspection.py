"""`spherelm inspect`: run directories in, a directory of figures, tables and a page out."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
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
from spherelm.data.output import check_free, whole_directory
from spherelm.data.tokenizer import Tokenizer, load_tokenizer
from spherelm.errors import NotFoundError, UserError
from spherelm.fields import check
from spherelm.models import NAMES, EncoderArch
from spherelm.models.decoder import Decoder
from spherelm.report.drawing import require_matplotlib
from spherelm.report.expert_figures import expert_section
from spherelm.report.figures import Figure
from spherelm.report.inside_figures import lens_section, motion_section, training_section, weight_section
from spherelm.report.inside_tables import write_tables
from spherelm.report.inspect_page import figure_sections, plain_page, plain_table, write_figures
from spherelm.report.walk import Walk, check_sentence, most_tokens, trace_walk, walk_page
from spherelm.report.wording import si
from spherelm.runs.checkpoint import NAME, STATE, latest_checkpoint, load_model, named_checkpoint, no_checkpoint
from spherelm.runs.config import read_config
from spherelm.runs.record import command_line, git_commit, versions, write_json

SENTENCE = "The old man looked out over the sea and thought of home."

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
    """What to look at.

    Attributes:
        text: Text file that the models read; the shipped validation text if left out.
        sentence: Sentence of the walk, at most 40 tokens; if left out, a default, cut to what the models' context holds.
        tokens: Tokens of the text that are read, in sequences of the model's max_seq_len.
        layer: Layer, counted from 1, whose queries and keys are shown; the middle one if left out.
        images: Whether PNG files are written too.
    """

    text: Path | None = None
    sentence: str | None = None
    tokens: Annotated[int, Field(ge=2)] = 2048
    layer: int | None = None
    images: bool = True

    def __post_init__(self) -> None:
        check(self)


def inspect(runs: Sequence[Path], out: Path, request: Request) -> list[Figure]:
    """Look into every run and write `out`: index.html, walk.html, figures/, tables/, inspect.json; returns the figures.

    runs: run directories, single checkpoints, or directories of `spherelm compare`, which stand for their full runs. Runs of
    one arm are drawn as seeds of one model and must have one shape. `out` appears whole or not at all. Raises
    FileNotFoundError for a missing run, FileExistsError where `out` holds something, ValueError for a model that holds NaN or
    for no matplotlib.
    """
    if not runs:
        raise UserError("no run is named: give directories of spherelm train or compare")
    require_matplotlib()
    check_free(out)
    text = _text(request)
    paths = [path for run in runs for path in expand(run)]
    check_shapes(paths)
    sentence = fitting_sentence(paths) if request.sentence is None else request.sentence
    with whole_directory(out) as part:
        inspected = [_inspect(path, text, sentence, request) for path in paths]
        sections = _sections(inspected)
        _write(part, inspected, sections, sentence, request)
    _say_if_cut(sentence, request.sentence)
    return [figure for _, _, figures in sections for figure in figures]


def trace_walks(runs: Sequence[Path], sentence: str | None = None) -> tuple[list[Walk], str]:
    """The walk of each run, and the sentence that they are of; raises as `inspect` does."""
    walked = fitting_sentence(runs) if sentence is None else sentence
    walks = [trace_walk(load_model(run), load_tokenizer(run_directory(run)), walked, name_of(run)) for run in runs]
    _say_if_cut(walked, sentence)
    return walks, walked


def fitting_sentence(paths: Sequence[Path]) -> str:
    """`SENTENCE`, or as much of its beginning as every run's tokenizer and context allow."""
    runs = [run_directory(path) for path in paths]
    readers = [(load_tokenizer(run), most_tokens(read_config(run / "config.json").model)) for run in runs]
    words = SENTENCE.split()
    beginnings = [" ".join(words[:count]) for count in range(len(words), 0, -1)]
    beginnings += [words[0][:count] for count in range(len(words[0]) - 1, 0, -1)]
    for found in beginnings:
        if all(len(tokenizer.encode(found)) <= limit for tokenizer, limit in readers):
            break
    return found


def _say_if_cut(sentence: str, asked: str | None) -> None:
    """One line on stderr if the sentence is a part of `SENTENCE`, which nobody asked for."""
    if sentence not in (asked, SENTENCE):
        note = f"the walk shows {sentence!r} only: the whole default sentence has too many tokens"
        print(f"spherelm: {note}; choose another with inspect --sentence", file=sys.stderr)


def expand(path: Path) -> list[Path]:
    """A run or a checkpoint as it is; of a comparison's directory the full runs of both arms."""
    summary = path / "summary.json"
    if not summary.is_file():
        if not path.is_dir():
            raise NotFoundError(f"no run at {path}: pass run directories that spherelm train wrote")
        return [named_checkpoint(path) or path]
    try:
        arms = json.loads(summary.read_text("utf-8"))["arms"]
        return [path / name for arm in arms.values() for name in arm["runs"]]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{summary} is damaged ({error!r}): pass the run directories in {path} instead") from None


def run_directory(path: Path) -> Path:
    """The run that a run directory or one of its checkpoints belongs to."""
    checkpoint = named_checkpoint(path)
    return path if checkpoint is None else checkpoint.parent.parent


def check_shapes(paths: Sequence[Path]) -> None:
    """`ValueError` if two runs of one arm have different shapes."""
    shapes: dict[str, tuple[Path, tuple[Any, ...]]] = {}
    for path in paths:
        if latest_checkpoint(run_directory(path)) is None:
            raise no_checkpoint(path)
        config = read_config(run_directory(path) / "config.json")
        model = config.model
        if isinstance(model.architecture, EncoderArch):
            raise UserError(f"{path} is an encoder: what is drawn here is of models that predict the next token")
        shape = tuple(getattr(model, name) for name in SHAPE)
        first, known = shapes.setdefault(config.arm, (path, shape))
        if shape != known:
            raise UserError(
                f"{path} and {first} are both {config.arm} and of different sizes, and cannot stand for one model: "
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
    try:
        return request.text.read_text("utf-8")
    except UnicodeDecodeError:
        raise UserError(f"{request.text} is not UTF-8 text: convert it, or give another --text") from None


def windows(tokenizer: Tokenizer, text: str, model: Decoder, positions: int) -> Tensor:
    """The first `positions` tokens of the text as int64 [batch, seq], whole sequences of the model's max_seq_len at most."""
    ids = tokenizer.encode(text[: 16 * positions])[:positions]
    if len(ids) < 2:
        raise UserError(f"the text has {counted(len(ids), 'token')}: give at least two")
    check_ids(ids, model)
    seq = min(model.config.max_seq_len, len(ids))
    if seq < 2:
        raise UserError("the model reads one token at a time: there is no next token to look at")
    return torch.tensor(ids[: len(ids) // seq * seq]).reshape(-1, seq)


def check_ids(ids: Sequence[int], model: Decoder) -> None:
    """`ValueError` if a token is none of the model's."""
    if max(ids) >= model.config.vocab_size:
        raise UserError(
            f"the run's tokenizer gives token {max(ids)}, its model knows 0 to {model.config.vocab_size - 1}: they do not "
            "belong together"
        )


def _inspect(path: Path, text: str, sentence: str, request: Request) -> Inspected:
    run = run_directory(path)
    model = load_model(path)
    layer = None if request.layer is None else request.layer - 1
    if layer is not None and not 0 <= layer < len(model.blocks):
        raise UserError(f"layer must be 1 to {len(model.blocks)} for {path}, got {request.layer}")
    try:
        tokenizer = load_tokenizer(run)
        tokens = windows(tokenizer, text, model, request.tokens)
        check_sentence(tokenizer.encode(sentence), model.config)  # ahead of what takes long
        inside = look_inside(model, tokens, layer)
        walk = trace_walk(model, tokenizer, sentence, name_of(path))
    except ValueError as error:
        raise UserError(f"{path} cannot be inspected: {error}") from error
    config = read_config(run / "config.json")
    count = sum(parameter.numel() for parameter in model.parameters())
    distances = list(_distances(path, model))
    return Inspected(name_of(path), config.arm, count, distances[-1][0], inside, distances, walk)


def name_of(path: Path) -> str:
    """A short name of a run or a checkpoint: its last parts."""
    run = run_directory(path)
    return run.resolve().name if run == path else f"{run.name} {path.resolve().name}"


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


def _sections(inspected: Sequence[Inspected]) -> list[tuple[str, str, list[Figure]]]:
    arms = [arm for arm in NAMES if any(item.arm == arm for item in inspected)]
    found = {arm: [item.inside for item in inspected if item.arm == arm] for arm in arms}
    distances = {
        arm: [
            (np.array([update for update, _ in item.distances]), np.array([max(d.values()) for _, d in item.distances]))
            for item in inspected
            if item.arm == arm
        ]
        for arm in arms
    }
    return [
        ("In the weights", "", weight_section(found)),
        ("On the way through the model", "", motion_section(found)),
        ("Experts", "", expert_section(found)),
        ("What each layer would predict", "", lens_section(found)),
        ("Over training", "", training_section(distances)),
    ]


def _write(
    out: Path,
    inspected: Sequence[Inspected],
    sections: Sequence[tuple[str, str, list[Figure]]],
    sentence: str,
    request: Request,
) -> None:
    figures = [figure for _, _, group in sections for figure in group]
    write_figures(figures, out, request.images)
    (out / "tables").mkdir()
    tables = write_tables([(item.name, item.arm, item.inside, item.distances) for item in inspected], out / "tables")
    (out / "walk.html").write_text(walk_page([item.walk for item in inspected], sentence), encoding="utf-8")
    write_json(out / "inspect.json", _record(inspected, sentence, request))
    (out / "index.html").write_text(_index(inspected, sections, tables, sentence, request), encoding="utf-8")


def _record(inspected: Sequence[Inspected], sentence: str, request: Request) -> dict[str, Any]:
    """What was looked at, and by what."""
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


def _index(
    inspected: Sequence[Inspected],
    sections: Sequence[tuple[str, str, list[Figure]]],
    tables: Sequence[Path],
    sentence: str,
    request: Request,
) -> str:
    source = "the validation text that ships with spherelm" if request.text is None else request.text.name
    count = inspected[0].inside.motion.angles.shape[1]
    rows = [
        (i.name, NAMES[i.arm], f"{i.parameters:,}", f"{i.update:,}", f"{i.inside.motion.lens.loss[-1]:.3f}")
        for i in inspected
    ]
    caption = f"Inspected runs. The loss is that on the {count:,} tokens looked at, of {source}."
    links = ", ".join(f'<a href="tables/{escape(path.name)}">{escape(path.name)}</a>' for path in tables)
    body = "\n".join(
        (
            plain_table(caption, ["Run", "Arm", "Parameters", "Update", "Loss"], rows),
            f'<p class="note"><a href="walk.html">The walk on the sphere</a>: hidden states of “{escape(sentence)}”, layer by '
            "layer, on a sphere to turn.</p>",
            figure_sections(sections),
            f"<section><h2>Numbers</h2><p>Every number drawn here, as tables: {links}.</p>"
            f"<pre><code>{escape(command_line())}</code></pre></section>",
        )
    )
    subtitle = " · ".join(
        (f"{len(inspected)} runs" if len(inspected) > 1 else inspected[0].name, f"{si(count)} tokens of text")
    )
    return plain_page("spherelm inspect", "Inside the models", subtitle, body)
