"""Models to begin with: of a run, of one of its checkpoints, or of a folder that `spherelm export` wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from spherelm.errors import UserError
from spherelm.models import Config, Decoder
from spherelm.runs.config import read_config, read_record
from spherelm.runs.loading import is_exported, load_model, run_directory


def read_model_config(source: Path) -> Config:
    """The config of the model in `source`. Raises `UserError` where there is none."""
    if is_exported(source):
        return _wrapper(source)[0].from_pretrained(source).arm_config()
    return read_config(run_directory(source) / "config.json").model


def read_model(source: Path) -> Decoder:
    """The model in `source`, in float32. Raises `UserError` where there is none."""
    if is_exported(source):
        return _wrapper(source)[1].from_pretrained(source, dtype=torch.float32).model
    return load_model(source)


def _wrapper(source: Path) -> tuple[Any, Any]:
    """The classes of transformers for the folder `source`: of its config and of its model."""
    try:
        from spherelm.interop.huggingface import WRAPPERS
    except ImportError as error:
        raise UserError(f"cannot read {source}: {error}") from error
    kind = read_record(source / "config.json")["model_type"]
    for config, model in WRAPPERS:
        if config.model_type == kind:
            return config, model
    raise UserError(f"{source} holds a model of the type {kind}: only those of spherelm export can be trained")
