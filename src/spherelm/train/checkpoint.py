"""Checkpoints: safetensors and JSON in a directory that appears whole or not at all, verified when read, never unpickled."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from spherelm.models import Decoder, build
from spherelm.train.config import read_config

WEIGHTS, MOMENTS, STATE = "model.safetensors", "optimizer.safetensors", "state.json"
REMEDY = "delete this checkpoint to go on from the one before"
NAME = re.compile(r"step-(\d{8})")


@dataclass(frozen=True)
class Progress:
    """How far a run has come: updates made, seconds spent training, and where a stream of text goes on (`Batches.state`)."""

    step: int
    seconds: float
    data: dict[str, Any] = field(default_factory=dict)


def _optimizer_tensors(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """The optimizer's state by parameter name: `blocks.0.mlp.u.weight/exp_avg`, and torch's random state."""
    tensors = {"random_state": torch.get_rng_state()}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            assert isinstance(value, Tensor), f"optimizer state {key} of {name} is not a tensor"
            tensors[f"{name}/{key}"] = value
    return tensors


def _digest(path: Path) -> str:
    """The sha256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _sync(path: Path) -> None:
    """Have the file or directory on the disk before going on."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def save_checkpoint(run: Path, model: nn.Module, optimizer: Optimizer, progress: Progress, keep: int) -> Path:
    """Write `run/checkpoints/step-XXXXXXXX` and drop all but the newest `keep`.

    The files are written under another name, flushed to the disk and renamed, so a crash or a full disk leaves the
    earlier checkpoints as they were. Raises `OSError` naming the directory if it cannot be written.
    """
    directory = run / "checkpoints"
    final = directory / f"step-{progress.step:08d}"
    part = directory / f".{final.name}.part"
    try:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        save_file({name: p.detach().contiguous() for name, p in model.named_parameters()}, part / WEIGHTS)
        save_file({k: v.contiguous() for k, v in _optimizer_tensors(model, optimizer).items()}, part / MOMENTS)
        hashes = {name: _digest(part / name) for name in (WEIGHTS, MOMENTS)}
        (part / STATE).write_text(json.dumps({**vars(progress), "sha256": hashes}))
        for path in (*part.iterdir(), part):
            _sync(path)
        if final.exists():
            shutil.rmtree(final)
        os.rename(part, final)
        _sync(directory)
    except (OSError, safetensors.SafetensorError) as error:
        shutil.rmtree(part, ignore_errors=True)
        last = latest_checkpoint(run)
        good = f"the last good checkpoint is {last}" if last else "there is no earlier checkpoint"
        raise OSError(
            f"could not save a checkpoint in {directory} ({error}); {good}: free some space and --resume"
        ) from error
    for old in sorted(c for c in directory.iterdir() if NAME.fullmatch(c.name))[:-keep]:
        shutil.rmtree(old)
    return final


def latest_checkpoint(run: Path) -> Path | None:
    """The newest complete checkpoint of a run, or `None`."""
    found = sorted(c for c in (run / "checkpoints").glob("step-*") if NAME.fullmatch(c.name) and (c / STATE).exists())
    return found[-1] if found else None


def _read_state(checkpoint: Path) -> dict[str, Any]:
    """`state.json` of a checkpoint whose files are what they were when written; else a `ValueError` that says what is not."""
    try:
        state: dict[str, Any] = json.loads((checkpoint / STATE).read_text(encoding="utf-8"))
        for name, expected in state["sha256"].items():
            if _digest(checkpoint / name) != expected:
                raise ValueError(f"{checkpoint / name} is damaged (its sha256 differs): {REMEDY}")
        return state
    except (KeyError, json.JSONDecodeError, UnicodeDecodeError, FileNotFoundError) as error:
        raise ValueError(f"{checkpoint} is not a complete checkpoint ({error}): {REMEDY}") from error


@torch.no_grad()
def load_weights(model: nn.Module, path: Path) -> None:
    """Copy the weights in the safetensors file `path` into `model`; names and shapes must agree exactly."""
    try:
        tensors = load_file(path)
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file: {error}") from error
    parameters = dict(model.named_parameters())
    for name in sorted(parameters.keys() ^ tensors.keys()):
        where = "the model" if name in parameters else "the checkpoint"
        raise ValueError(f"{path} belongs to another model: only {where} has {name}")
    for name, parameter in parameters.items():
        if parameter.shape != tensors[name].shape:
            raise ValueError(
                f"{path} belongs to another config: {name} is {tuple(tensors[name].shape)} there, "
                f"{tuple(parameter.shape)} in the model"
            )
        parameter.copy_(tensors[name])


def load_checkpoint(checkpoint: Path, model: nn.Module, optimizer: Optimizer) -> Progress:
    """Put `model`, `optimizer` and torch's random state back to where they were saved; returns how far the run had come.

    Raises `ValueError` for a checkpoint that is incomplete, damaged or of another config.
    """
    state = _read_state(checkpoint)
    load_weights(model, checkpoint / WEIGHTS)
    tensors = load_file(checkpoint / MOMENTS)
    torch.set_rng_state(tensors.pop("random_state"))
    parameters = dict(model.named_parameters())
    for path, value in tensors.items():
        name, key = path.split("/")
        # Optimizers keep their step count on the CPU, as a tensor without dimensions.
        optimizer.state[parameters[name]][key] = value if value.ndim == 0 else value.to(parameters[name].device)
    return Progress(state["step"], state["seconds"], state.get("data", {}))


def load_model(run: str | Path, dtype: torch.dtype = torch.float32) -> Decoder:
    """The model of a run directory (its newest checkpoint) or of one of its checkpoints, in eval mode.

    dtype: of its weights and of what it computes; lengths and angles of rotation are computed in float32 all the same. A
    rounded unit vector stays as it is: a correction of its length would be rounded again (`departure` says how far it is off).
    Raises `FileNotFoundError` if there is none, `ValueError` if it is damaged.
    """
    path = Path(run)
    if NAME.fullmatch(path.name) and path.parent.name == "checkpoints":
        checkpoint, run_directory = path, path.parent.parent
    else:
        latest, run_directory = latest_checkpoint(path), path
        if latest is None:
            raise FileNotFoundError(f"{path} holds no checkpoint: pass a run directory that spherelm train wrote")
        checkpoint = latest
    _read_state(checkpoint)
    model = build(read_config(run_directory / "config.json").model)
    load_weights(model, checkpoint / WEIGHTS)
    return model.to(dtype).eval()
