"""What a run cannot start with, refused before anything is written: by the run itself, by a dry run, and by commands
that train many.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from spherelm.data.sources import RunData
from spherelm.errors import UserError
from spherelm.models import Decoder, build
from spherelm.optim import build_optimizer
from spherelm.runs.checkpoint import latest_checkpoint
from spherelm.runs.config import RunConfig, micro_batches
from spherelm.runs.group import Group
from spherelm.runs.record import check_directory, described
from spherelm.train.batches import open_data
from spherelm.train.evaluation import task_scorer
from spherelm.train.init_from import check_initial_weights, check_length
from spherelm.train.low_precision import check_precision
from spherelm.train.precision import check_device
from spherelm.train.sinks import check_names

Scorer = Callable[[Decoder], dict[str, Any]]


def prepare(config: RunConfig, group: Group) -> tuple[RunData, Scorer | None]:
    """The text of a run of the processes in `group`, and what scores its model on tasks, if any.

    Raises `UserError` where the batch cannot be shared, or a log, the text, a task or the weights to begin with cannot
    be had.
    """
    micro_batches(config.train, group.world_size)
    check_names(config.train.log_to)
    if config.train.eval_tasks and not group.is_alone:
        raise UserError("--eval-tasks is for runs of one process: score the checkpoints of this one by spherelm eval")
    data = open_data(config, group.rank, group.world_size)
    if config.init_from:
        with torch.device("meta"):
            check_initial_weights(build(config.model), Path(config.init_from), data.tokenizer)
    return data, task_scorer(config.train, data.tokenizer)


def started(config: RunConfig, out: Path, resume: bool) -> RunConfig:
    """The run as it starts: one that goes on from a checkpoint in `out` begins with no other weights."""
    return replace(config, init_from=None) if resume and latest_checkpoint(out) else config


def check_model(config: RunConfig) -> None:
    """Raise `UserError` for a number format or an optimizer that the model cannot have; it takes no memory."""
    with torch.device("meta"):
        check_precision(build(config.model), config.train.precision)
    build_optimizer(torch.nn.Linear(1, 1), config.optim)


def check_runs(configs: Sequence[RunConfig]) -> None:
    """Raise what the first run that cannot begin would raise; nothing is written, no model takes memory."""
    for device in {config.train.device for config in configs}:
        check_device(device)
    texts = {}
    for c in configs:
        texts[str((c.model.architecture, c.data, c.model.vocab_size, replace(c.train, seed=0, steps=1)))] = c
    for config in texts.values():
        prepare(config, Group())
    for config in {str((c.model, c.train.precision, c.optim)): c for c in configs}.values():
        check_model(config)


def check_start(config: RunConfig, out: Path, resume: bool, world_size: int) -> None:
    """Raise what `spherelm train` would raise before its first update, with so many processes on a machine that has
    the run's device; nothing is written.
    """
    check_model(config)
    data, _ = prepare(started(config, out, resume), Group(world_size=world_size))
    check_length(out, config, resume)
    check_directory(out, described(config, data.identity), resume, "train.steps")
