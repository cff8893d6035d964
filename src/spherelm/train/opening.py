"""The lines printed before the first update: model, device, data, length, memory, log files."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

from spherelm.counting import counted, rounded
from spherelm.runs.config import RunConfig, TrainConfig
from spherelm.runs.group import Group
from spherelm.train.batches import epochs, repetition
from spherelm.train.estimate import (
    NO_ROOM,
    active_parameters,
    memory_of,
    memory_per_device,
    parameters_by_role,
)
from spherelm.train.low_precision import emulation
from spherelm.train.precision import device_name
from spherelm.train.sinks import check_names

FEWER = "use fewer --workers, or smaller models"
"""Advice where several runs at once need more memory than there is."""


def opening(config: RunConfig, out: Path, group: Group, choice: str, tokens: int, step: int, peak: str) -> list[str]:
    """The lines that tell of the run of `config` in the directory `out`, warnings last.

    choice: how the number format was chosen. tokens: an update sees. step: where the run resumes. peak: what
    MFU is a part of.
    """
    train, read = config.train, epochs(config, config.train.steps)
    parameters, active = sum(parameters_by_role(config.model).values()), active_parameters(config.model)
    met = "" if active == parameters else f" ({active:,} active per token)"
    processes = "" if group.is_alone else f"{group.world_size} processes ({train.strategy}) on "
    weights = f", starting from the weights of {origin}" if (origin := config.init_from) else ""
    start = f", resuming from step {step:,}" if step else weights
    logs = ", ".join([str(out / "metrics.jsonl"), *check_names(train.log_to)])
    # The processes of torchrun share the memory of a processor, and each has a GPU of its own.
    sharing = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if group.device.type == "cpu" else 1
    threads = f" on {counted(torch.get_num_threads(), 'thread')}" if group.device.type == "cpu" else ""
    told, warnings = room(config, group.world_size, group.device, sharing)
    return [
        f"{config.arm} {config.preset}, recipe {config.recipe}: {counted(parameters, 'parameter')}{met}",
        f"{processes}{device_name(group.device)}, {train.dtype} ({choice}){threads}{', torch.compile' * train.compile}; {told}",
        *emulation(train.precision, train.dtype),
        f"{counted(train.steps, 'update')} of {counted(tokens, 'token')}, {epochs_in_words(read)}{start}",
        f"logged to {logs}; {saving(train)}",
        f"MFU is relative to a peak of {peak}",
        *repetition(read),
        *warnings,
    ]


def epochs_in_words(read: Mapping[str, float]) -> str:
    """ "0.05 epochs of data/mine", of each text by how often it is read."""
    return " and ".join(f"{rounded(count)} epochs of {name}" for name, count in read.items()) or "from a stream"


def saving(train: TrainConfig) -> str:
    """When a run saves checkpoints, in words."""
    if train.save_every:
        return f"saved every {counted(train.save_every, 'update')}"
    return f"saved every {train.save_minutes:g} minutes and at the end" if train.save_minutes else "saved at the end"


def warnings(configs: Iterable[RunConfig], device: torch.device, processes: int) -> list[str]:
    """Warnings about these runs, so many of them at once on one device; each warning once."""
    found = [[*repetition(epochs(one, one.train.steps)), *room(one, 1, device, processes, FEWER)[1]] for one in configs]
    return list(dict.fromkeys(line for lines in found for line in lines))


def gibibytes(count: int) -> str:
    """A number of bytes in words."""
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"


def room(
    config: RunConfig, world_size: int, device: torch.device, sharing: int, advice: str = NO_ROOM
) -> tuple[str, list[str]]:
    """How much memory `sharing` of the `world_size` processes of a run need of what `device` has,
    and a warning if that is less.
    """
    needed, there = sharing * memory_per_device(config, world_size)["total"], memory_of(device)
    if there is None:
        return f"memory: about {gibibytes(needed)}", []
    told = f"about {gibibytes(needed)} of {gibibytes(there)}"
    return f"memory: {told}", [f"warning: memory does not fit ({told}): {advice}"] * (needed > there)
