"""Runs that start from earlier work: `--init-from` another run's weights, or `--resume` with more `--steps`."""

from __future__ import annotations

from pathlib import Path

import torch

from spherelm.data.tokenizer import Tokenizer, holds_tokenizer, load_tokenizer
from spherelm.errors import UserError
from spherelm.interop.initial import read_model, read_model_config
from spherelm.models import Decoder, build
from spherelm.optim import factor
from spherelm.runs.checkpoint import latest_checkpoint, named_checkpoint
from spherelm.runs.config import RunConfig, read_config
from spherelm.runs.loading import run_directory


def load_initial_weights(model: Decoder, source: Path) -> None:
    """Copy the weights of `source`, which passed `check_initial_weights`, into `model`. Raises `UserError` where they
    cannot be read.
    """
    model.load_state_dict(read_model(source).state_dict())


def check_initial_weights(model: Decoder, source: Path, tokenizer: Tokenizer) -> None:
    """Raise `UserError` if `source` is no run, checkpoint or exported folder that `model` can begin with: it has
    another tokenizer than the text's, or weights of another shape. No weights are read; the model may be on the meta
    device.
    """
    with torch.device("meta"):
        there = build(read_model_config(source))
    directory = tokenizer_directory(source)  # without one, as some exports and imports are
    own = load_tokenizer(directory) if holds_tokenizer(directory) else tokenizer
    if own.fingerprint != tokenizer.fingerprint and meanings(own) != meanings(tokenizer):
        raise UserError(
            f"{source} was trained with the tokenizer {own.name}, but the text was prepared with {tokenizer.name}: prepare it "
            f"again with spherelm data prepare --tokenizer {tokenizer_directory(source)}"
        )
    shapes = [{name: tuple(value.shape) for name, value in one.state_dict().items()} for one in (model, there)]
    differing = sorted(name for name in {**shapes[0], **shapes[1]} if shapes[0].get(name) != shapes[1].get(name))
    if differing:
        name = differing[0]
        raise UserError(
            f"{source} holds a model of another shape: {name} is {shapes[1].get(name)} there and {shapes[0].get(name)} here"
        )


def meanings(tokenizer: Tokenizer) -> list[str]:
    """The text of every id, to tell whether two tokenizer files are the same tokenizer."""
    return [tokenizer.decode([i]) for i in range(tokenizer.vocab_size)]


def tokenizer_directory(source: Path) -> Path:
    """The directory with the tokenizer of a run, a checkpoint or an exported folder."""
    return run_directory(source) if named_checkpoint(source) else source


def check_length(out: Path, config: RunConfig, resume: bool) -> list[str]:
    """On resume with more updates than the run in `out` was started with, a line on what that does to its schedule.

    Raises `UserError` if the updates already made would have had other learning rates in the longer run.
    """
    if not resume or not (out / "config.json").is_file():
        return []
    before, after, checkpoint = read_config(out / "config.json").train.steps, config.train.steps, latest_checkpoint(out)
    if after <= before:
        return []
    done, schedule = int(checkpoint.name.removeprefix("step-")) if checkpoint else 0, config.schedule
    if any(factor(schedule, step, before) != factor(schedule, step, after) for step in range(done)):
        raise UserError(
            f"--steps {after} is more than the {before} of {out}, and with schedule={schedule.kind} the {done} updates already "
            f"made would have had other learning rates: start a new run from its weights with --init-from {out} "
            "(schedule=wsd can be extended before its decay, schedule=constant at any time)"
        )
    return [
        f"{out} now has {after:,} updates instead of {before:,}: schedule={schedule.kind} ends at update {after:,}; "
        f"the {done:,} updates already made had the same learning rates; all other settings stay those of {before:,} updates"
    ]
