"""Runs that begin with what is there: the weights of another run, or a run of their own that shall be longer."""

from __future__ import annotations

from pathlib import Path

from spherelm.data.tokenizer import Tokenizer, load_tokenizer
from spherelm.errors import UserError
from spherelm.interop.initial import read_model
from spherelm.models import Decoder
from spherelm.optim import factor
from spherelm.progress import say
from spherelm.runs.checkpoint import latest_checkpoint, named_checkpoint
from spherelm.runs.config import RunConfig, read_config
from spherelm.runs.loading import run_directory


def begin_with(model: Decoder, source: Path, tokenizer: Tokenizer) -> None:
    """Copy the weights of `source`, a run, a checkpoint or an exported folder, into `model`.

    tokenizer: that of the text. Raises `UserError` where the source has another, and for weights of another shape.
    """
    there = read_model(source)
    try:
        own = load_tokenizer(tokenizer_directory(source))
    except UserError:  # it has none, as some exports and imports have
        own = tokenizer
    if own.fingerprint != tokenizer.fingerprint and meanings(own) != meanings(tokenizer):
        raise UserError(
            f"{source} was trained with the tokenizer {own.name}, and the ids of the text's, {tokenizer.name}, mean something "
            f"else: prepare the text by spherelm data prepare --tokenizer {tokenizer_directory(source)}"
        )
    shapes = [{name: tuple(value.shape) for name, value in one.state_dict().items()} for one in (model, there)]
    differing = sorted(name for name in {**shapes[0], **shapes[1]} if shapes[0].get(name) != shapes[1].get(name))
    if differing:
        name = differing[0]
        raise UserError(
            f"{source} holds a model of another shape: {name} is {shapes[1].get(name)} there and {shapes[0].get(name)} here"
        )
    model.load_state_dict(there.state_dict())


def meanings(tokenizer: Tokenizer) -> list[str]:
    """The text of every id, by which one tokenizer in two files is known."""
    return [tokenizer.decode([i]) for i in range(tokenizer.vocab_size)]


def tokenizer_directory(source: Path) -> Path:
    """Where the tokenizer of a run, a checkpoint or an exported folder lies."""
    return run_directory(source) if named_checkpoint(source) else source


def check_length(out: Path, config: RunConfig, resume: bool) -> None:
    """Say on stderr what more updates than the run in `out` was begun with do to its schedule, where it is resumed.

    Raises `UserError` where updates that are made would have had other rates in the longer run.
    """
    if not resume or not (out / "config.json").is_file():
        return
    before, after, checkpoint = read_config(out / "config.json").train.steps, config.train.steps, latest_checkpoint(out)
    if after <= before:
        return
    done, schedule = int(checkpoint.name.removeprefix("step-")) if checkpoint else 0, config.schedule
    if any(factor(schedule, step, before) != factor(schedule, step, after) for step in range(done)):
        raise UserError(
            f"--steps {after} is more than the {before} of {out}, whose schedule={schedule.kind} would have given the {done} "
            f"updates that are made other rates: begin a new run with its weights by --init-from {out} (schedule=wsd can be "
            "longer before its decay, schedule=constant at any time)"
        )
    say(
        f"{out} has {after:,} updates now instead of {before:,}: schedule={schedule.kind} ends at update {after:,}, "
        f"and the {done:,} that are made had the same rates; all else stays what was chosen for {before:,} updates"
    )
