"""Find the run that a path names, and load its model."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, overload

import torch

from spherelm.counting import counted
from spherelm.data.tokenizer import Tokenizer, load_tokenizer
from spherelm.errors import NotFoundError, beside
from spherelm.models import Decoder, build
from spherelm.runs.checkpoint import WEIGHTS, latest_checkpoint, load_weights, named_checkpoint, read_state
from spherelm.runs.config import read_config, read_record

SHOWN = 8
"""Runs that an error names at most."""


def checkpoint_of(run: str | Path) -> Path:
    """The checkpoint that `run` is, or the newest one of the run directory `run`.

    Raises `NotFoundError` if there is none.
    """
    found = named_checkpoint(run) or latest_checkpoint(Path(run))
    if found is None:
        raise no_run(Path(run))
    return found


def run_directory(run: str | Path) -> Path:
    """The run directory that `run` is or that holds the checkpoint `run`. Raises as `checkpoint_of` does."""
    return checkpoint_of(run).parent.parent


def no_run(path: Path) -> NotFoundError:
    """The error for a path that is neither a run with a checkpoint nor a checkpoint:
    says what it is and what to give.
    """
    if not path.exists():
        return NotFoundError(f"there is no directory {path}{beside(path)}: give the path of a run")
    outer = next((parent for parent in path.parents if latest_checkpoint(parent)), None)
    if outer is not None:
        return NotFoundError(f"{path} is a part of the run {outer}: give {outer}")
    if is_exported(path):
        return NotFoundError(
            f"{path} is an exported model, not a run: make a run of it with spherelm import hub {path} OUT"
        )
    runs = [str(one) for pattern in ("*", "*/*") for one in sorted(path.glob(pattern)) if latest_checkpoint(one)]
    if not runs and (path / "config.json").is_file():
        return NotFoundError(f"the run {path} has no checkpoint yet: resume it with spherelm train --resume {path}")
    if not runs:
        return NotFoundError(f"{path} holds no run: give a directory that spherelm train wrote")
    which = "one of them, " if len(runs) > 1 else ""
    more = f", or one of {len(runs) - SHOWN} more" if len(runs) > SHOWN else ""
    return NotFoundError(
        f"{path} holds {counted(len(runs), 'run')} but is not a run: give {which}{', '.join(runs[:SHOWN])}{more}"
    )


def is_exported(path: Path) -> bool:
    """Whether `path` is a folder of Hugging Face transformers."""
    return (path / "config.json").is_file() and "model_type" in read_record(path / "config.json")


@overload
def load_model(run: str | Path, dtype: torch.dtype = ..., *, with_tokenizer: Literal[False] = False) -> Decoder: ...
@overload
def load_model(
    run: str | Path, dtype: torch.dtype = ..., *, with_tokenizer: Literal[True]
) -> tuple[Decoder, Tokenizer]: ...
def load_model(
    run: str | Path, dtype: torch.dtype = torch.float32, *, with_tokenizer: bool = False
) -> Decoder | tuple[Decoder, Tokenizer]:
    """Load the model of a run, in eval mode.

        model, tokenizer = load_model("runs/demo/ngpt-0", with_tokenizer=True)

    Args:
        run: A run directory, whose newest checkpoint is taken, or one of its checkpoints.
        dtype: Format of the weights and of the computation; norms and angles of rotation stay float32. Rounding leaves
            unit vectors slightly off the sphere, as `departure` shows.
        with_tokenizer: Return `(model, tokenizer)`; `generate` takes both to continue a text.

    Returns:
        The model, or the model and its tokenizer.

    Raises:
        NotFoundError: There is no such run.
        UserError: The run is damaged, or has no tokenizer although one is asked for.
    """
    checkpoint = checkpoint_of(run)
    read_state(checkpoint, of=Path(WEIGHTS).stem)  # moments may have been deleted, to save space
    directory = checkpoint.parent.parent
    model = build(read_config(directory / "config.json").model)
    load_weights(model, checkpoint)
    model = model.to(dtype).eval()
    return (model, load_tokenizer(directory)) if with_tokenizer else model
