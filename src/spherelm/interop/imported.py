"""Checkpoints of other programs as run directories of ours."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import torch
from torch.optim import Optimizer

from spherelm.data.output import check_free
from spherelm.data.tokenizer import Tokenizer, load_tokenizer
from spherelm.errors import UserError
from spherelm.interop.nvidia import NvidiaCheckpoint, load_optimizer, read_checkpoint, to_model
from spherelm.models import Decoder
from spherelm.optim import AdamW, OptimConfig, ScheduleConfig, build_optimizer
from spherelm.optim.groups import parameter_groups
from spherelm.runs.checkpoint import Progress, save_checkpoint
from spherelm.runs.config import RunConfig, TrainConfig, from_dict, read_record, to_dict
from spherelm.runs.record import claim_directory

PLACE = "directory for the imported run"
"""What a message asks for where the one that was given is taken."""

THEIR_RATE = 15e-4
"""The peak learning rate in NVIDIA/ngpt's train.py, for a file that was written when the rate had come down to 0."""


def import_nvidia(
    checkpoint: Path, out: Path, rope: str = "nvidia", tokenizer: str | None = None, moments: bool = False
) -> Decoder:
    """Make `out` the run directory of the model that NVIDIA/ngpt's train.py saved in `checkpoint`,
    and return the model.

    rope: as in `interop.nvidia.load_checkpoint`. tokenizer: what `load_tokenizer` takes, to be stored
    with the run; their file does not hold one. moments: keep Adam's state as well. Raises `FileExistsError` if `out`
    holds something, and `ValueError` for a file that cannot be read or a tokenizer with more ids than the model.
    """
    check_free(out, PLACE)
    read = read_checkpoint(checkpoint)
    model, chosen = to_model(read, rope), None if tokenizer is None else load_tokenizer(tokenizer)
    if chosen is not None and chosen.vocab_size > read.model_args.vocab_size:
        raise UserError(
            f"the tokenizer {tokenizer} has {chosen.vocab_size} token ids, the model in {checkpoint} only "
            f"{read.model_args.vocab_size}: choose the one that it was trained with"
        )
    config = run_config(read, rope)
    source = {"format": "NVIDIA/ngpt", "path": str(checkpoint.resolve()), "iteration": read.iteration}
    source["model_args"] = dataclasses.asdict(read.model_args)
    # Not `build_optimizer`: that would put the weights on the sphere, and they shall be stored as they are.
    optimizer = torch.optim.AdamW(parameter_groups(model, config.optim), lr=config.optim.lr)
    if moments:
        load_optimizer(read, model, optimizer)
    write_run(out, {**to_dict(config), "imported": source}, model, optimizer, chosen, read.iteration)
    return model


def import_hub(source: str, out: Path) -> Decoder:
    """Make `out` the run directory of the model that `spherelm export` wrote, and return the model.

    source: the folder, or where `spherelm push` put it on the hub: "user/name" or "user/name@revision". Its run's
    config comes along; the optimizer starts fresh. Raises `OutputExistsError` if `out` holds something, and `UserError`
    for what is no such folder, cannot be read, or is folded.
    """
    check_free(out, PLACE)
    try:
        from spherelm.interop.huggingface.folder import RUN_FILE, read_folder
        from spherelm.interop.huggingface.hub import downloaded
    except ImportError as error:
        raise UserError(f"cannot import: {error}") from error
    folder = Path(source) if Path(source).is_dir() else downloaded(source)
    model = read_folder(folder)
    record = read_record(folder / RUN_FILE)
    step, config = int(record.pop("step")), from_dict(record)
    tokenizer = load_tokenizer(folder) if (folder / "tokenizer.json").exists() else None
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = build_optimizer(model, config.optim)
    model.load_state_dict(weights)  # as they are stored, where `build_optimizer` has put them on the sphere
    described = {"format": "spherelm", "path": source, "iteration": step}
    write_run(out, {**to_dict(config), "imported": described}, model, optimizer, tokenizer, step)
    return model


def write_run(
    out: Path, described: dict[str, Any], model: Decoder, optimizer: Optimizer, tokenizer: Tokenizer | None, step: int
) -> None:
    """Make `out` a run directory with one checkpoint, or leave nothing there."""
    claim_directory(out, described, resume=False)
    try:
        if tokenizer is not None:
            tokenizer.save(out)
        save_checkpoint(out, model, optimizer, Progress(step, 0.0), keep=1)
    except BaseException:
        shutil.rmtree(out)
        raise


def run_config(read: NvidiaCheckpoint, rope: str) -> RunConfig:
    """The config of the run that wrote the file; settings it does not hold (batch size, schedule, text)
    have their defaults.
    """
    model, settings = read.model_args.config(rope), dict(read.optimizer)
    settings["lr"] = settings.get("lr") or THEIR_RATE
    return RunConfig(
        recipe="imported",
        preset="imported",
        model=model,
        optim=OptimConfig(
            settings.pop("lr"), weight_decay=settings.pop("weight_decay", None), optimizer=AdamW(**settings)
        ),
        schedule=ScheduleConfig("constant"),
        train=TrainConfig(steps=max(1, read.iteration), seq_len=read.model_args.block_size, batch_size=1),
    )
