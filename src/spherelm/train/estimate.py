"""Estimate of a run's parameters, memory per device, operations and time, for `spherelm train --dry-run`.

Counted: parameters, operations, and the bytes that a micro-batch holds (`train/counting.py`, of the code as it runs
without torch.compile, which holds less). Assumed, and printed: the device's peak, the part of it that is reached,
float32 weights, gradients and moments, and that sharding splits these evenly and holds two blocks whole at a time.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from math import ceil
from pathlib import Path
from typing import Any

import torch
from pydantic import PositiveInt

from spherelm.counting import counted, rounded
from spherelm.errors import UserError
from spherelm.fields import check
from spherelm.layers.moe import idle_weights
from spherelm.models import Config, build
from spherelm.optim.groups import ROLES, parameter_roles
from spherelm.runs.config import RunConfig, micro_batches, parts_of_model, to_dict
from spherelm.runs.record import flat
from spherelm.train.batches import repetition
from spherelm.train.counting import block_costs, readout_cost, training_flops
from spherelm.train.precision import best_device, devices_here

NO_ROOM = "spread it over more devices (--strategy shard), lower --micro-batch-size, or give --recompute"
"""Advice for a run that needs more memory than there is."""

LAYOUT = ("strategy", "shard_size", "recompute")
"""The fields of a `TrainConfig` that say how a run is spread over devices."""

FLOAT32 = 4


@dataclass(frozen=True)
class Assumed:
    """The devices of a run that is told beforehand.

    Attributes:
        world_size: Number of devices to assume.
        mfu: Model FLOP/s utilization (MFU) to assume.
        peak_tflops: Peak TFLOP/s of a device to assume; an H100's in bfloat16 if left out.
        device_memory: Memory of a device to assume, in GiB; if left out, that of this machine's accelerator, else 80.
    """

    world_size: PositiveInt = 1
    mfu: float = 0.4
    peak_tflops: float = 989.0
    device_memory: float | None = None

    def __post_init__(self) -> None:
        check(self)
        if self.device_memory is not None and not 0 < self.device_memory < math.inf:
            raise UserError(f"--device-memory must be positive, got {self.device_memory:g}")
        if not 0 < self.mfu <= 1 or not self.peak_tflops > 0:
            raise UserError(
                f"--mfu must lie in (0, 1] and --peak-tflops be positive, got {self.mfu} and {self.peak_tflops}"
            )

    def memory(self, asked: str | None) -> float:
        """Bytes of memory of a device; asked: the device that the run names, else the accelerator here is meant."""
        if self.device_memory is not None:
            return self.device_memory * 2**30
        device = asked or best_device().type
        is_meant = device in devices_here() and (asked or device != "cpu")
        return (memory_of(torch.device(device)) if is_meant else None) or 80 * 2**30


def compute_dtype(name: str) -> torch.dtype:
    """The number format of a run on an accelerator: "auto" is bfloat16 there."""
    return torch.float32 if name == "float32" else torch.bfloat16


@lru_cache
def active_parameters(config: Config) -> int:
    """How many learned numbers a token meets: all of them but those of experts that are not picked for it."""
    with torch.device("meta"):
        model = build(config)
    return sum(parameter.numel() for parameter in model.parameters()) - idle_weights(model)


@lru_cache
def parameters_by_role(config: Config) -> dict[str, int]:
    """How many learned numbers the model of `config` has in each role; none of them are allocated."""
    with torch.device("meta"):
        model = build(config)
    roles, counts = parameter_roles(model), dict.fromkeys(ROLES, 0)
    for name, parameter in model.named_parameters():
        if name in roles:
            counts[roles[name]] += parameter.numel()
    return {role: count for role, count in counts.items() if count}


def activation_memory(
    config: Config, batch_size: int, seq_len: int, dtype: torch.dtype, recompute: bool = False
) -> dict[str, float]:
    """Bytes that a micro-batch holds at most, beyond weights and gradients, by kind; their sum is the peak.

    activations: what the blocks keep for the backward pass. logits: the most that the read-out and the loss hold.
    backward: what the backward pass through a block needs beyond these two, 0 where the loss was the peak.
    """
    blocks = block_costs(config, batch_size, seq_len, dtype)
    readout = readout_cost(config, batch_size * seq_len, dtype)
    h = float(batch_size * seq_len * config.d_model * dtype.itemsize)
    kept = h + sum(count * (h if recompute else block.saved) for count, block in blocks)
    logits = max(readout.forward_peak, readout.backward_peak)
    # At the most: where the block that needs most is the last, whose backward pass comes first.
    in_backward = kept + max(block.backward_peak - (0 if recompute else block.saved) for _, block in blocks)
    return {"activations": kept, "logits": logits, "backward": max(0.0, in_backward - kept - logits)}


def memory_per_device(config: RunConfig, world_size: int = 1) -> dict[str, int]:
    """Bytes on each of `world_size` devices by kind, and their "total"."""
    counts, train, parts = parameters_by_role(config.model), config.train, parts_of_model(config.train, world_size)
    parameters = sum(counts.values())
    moments = config.optim.optimizer.state_size(counts)
    share = {"weights": parameters, "gradients": parameters, "moments": moments}
    held = {kind: float(ceil(FLOAT32 * numbers / parts)) for kind, numbers in share.items()}
    if parts > 1:
        held["gathered"] = FLOAT32 * (2 * counts["matrix"] / config.model.n_layers + counts["output_embedding"])
    size, _ = micro_batches(train, world_size)
    held |= activation_memory(config.model, size, train.seq_len, compute_dtype(train.dtype), train.recompute)
    whole = {kind: round(value) for kind, value in held.items()}
    return {**whole, "total": sum(whole.values())}


def estimate(
    config: RunConfig, assumed: Assumed | None = None, epochs: Mapping[str, float] | None = None
) -> dict[str, Any]:
    """Everything that a dry run says, as plain JSON values; the configuration is merged in.

    Time is that of the model's operations alone, as "6N + 12 L d T" counts them. epochs: how often each text is read,
    by name. Raises `ValueError` for what cannot be shared by the devices.
    """
    assumed, asked = assumed or Assumed(), config.train.device
    device = asked or best_device().type
    train, roles, world_size = config.train, parameters_by_role(config.model), assumed.world_size
    size, per_update = micro_batches(train, world_size)
    memory, device_memory = memory_per_device(config, world_size), assumed.memory(asked)
    step_flops = training_flops(config.model, train.batch_size, train.seq_len)
    step_seconds = step_flops / (world_size * assumed.peak_tflops * 1e12 * assumed.mfu)
    return {
        "parameters": sum(roles.values()),
        "parameters_active": active_parameters(config.model),
        "parameters_by_role": roles,
        "layout": {"world_size": world_size, **{name: getattr(train, name) for name in LAYOUT}},
        "sequences": {"micro_batch": size, "micro_batches_per_update": per_update, "update": train.batch_size},
        "memory_per_device": memory,
        "device_memory": device_memory,
        "fits": memory["total"] <= device_memory,
        "epochs": dict(epochs or {}),
        "tokens": train.steps * train.batch_size * train.seq_len,
        "flops_per_token": step_flops / (train.batch_size * train.seq_len),
        "flops": step_flops * train.steps,
        "step_seconds": step_seconds,
        "hours": step_seconds * train.steps / 3600,
        "device": {"name": device, "is_here": device in devices_here()},
        "assumed": {
            "mfu": assumed.mfu,
            "peak_tflops": assumed.peak_tflops,
            "dtype": str(compute_dtype(train.dtype)).split(".")[1],
        },
        **to_dict(config),
    }


def estimate_table(found: dict[str, Any]) -> str:
    """The result of `estimate` as a table."""
    layout, assumed, sequences = found["layout"], found["assumed"], found["sequences"]
    rows = [f"{found['arm']} {found['preset']}, recipe {found['recipe']}", "", "parameters"]
    rows += [_row(role, f"{count:,}") for role, count in found["parameters_by_role"].items()]
    rows += [_row("total", f"{found['parameters']:,}")]
    if found["parameters_active"] != found["parameters"]:
        rows += [_row("active per token", f"{found['parameters_active']:,}")]
    rows += ["", f"memory per device, GiB ({_layout_in_words(layout)})"]
    rows += [_row(kind, f"{size / 2**30:,.2f}") for kind, size in found["memory_per_device"].items()]
    rows += [_row("a device has", f"{found['device_memory'] / 2**30:,.2f}")]
    if not found["fits"]:
        rows += [f"  It does not fit: {NO_ROOM}."]
    rows += [
        "",
        f"one update: {counted(sequences['update'], 'sequence')} of {counted(found['train']['seq_len'], 'token')}, "
        f"on each device {sequences['micro_batches_per_update']} x {sequences['micro_batch']}",
        "",
        "the run",
        _row("updates", f"{found['train']['steps']:,}"),
        _row("tokens", f"{found['tokens']:,}"),
        *(_row("epochs", rounded(count)) + f"  of {name}" for name, count in found["epochs"].items()),
        *(f"  {line}" for line in repetition(found["epochs"])),
        _row("FLOPs per token", f"{found['flops_per_token']:.4g}"),
        _row("FLOPs", f"{found['flops']:.4g}"),
        _row("seconds per update", f"{found['step_seconds']:,.4g}"),
        _row("hours", f"{found['hours']:,.4g}"),
        f"  assumed: {assumed['peak_tflops']:g} TFLOP/s a device, {100 * assumed['mfu']:g} % of it reached, "
        f"{assumed['dtype']}, not compiled",
        *_device(**found["device"]),
        "",
        "configuration",
    ]
    for part in ("model", "optim", "schedule", "train"):
        rows.append(f"  {part}: " + ", ".join(f"{name}={value}" for name, value in flat(found[part]).items()))
    if found["base"] is not None:
        rows.append("  base: " + ", ".join(f"{name}={value}" for name, value in found["base"].items()))
    return "\n".join([*rows, f"  data: {found['data'] or 'the text that ships with spherelm'}"])


def memory_of(device: torch.device) -> int | None:
    """Bytes of memory of a GPU, or of this machine (of this container, if that has less) for its
    processor, where known.
    """
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    if device.type != "cpu" or "SC_PHYS_PAGES" not in getattr(os, "sysconf_names", {}):
        return None
    whole, limit = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), Path("/sys/fs/cgroup/memory.max")
    try:
        return min(whole, int(limit.read_text()))
    except (OSError, ValueError):  # there is no container, or no limit
        return whole


def _row(name: str, value: str) -> str:
    return f"  {name:22}{value:>24}"


def _device(name: str, is_here: bool) -> list[str]:
    if not is_here:
        return [f"  no device {name} is here: training would be refused on this machine"]
    return ["  on this machine training would use its processor: give its --peak-tflops for its time"] * (name == "cpu")


def _layout_in_words(layout: dict[str, Any]) -> str:
    groups = f" of {layout['shard_size']}" if layout["strategy"] == "hybrid" else ""
    recomputed = ", blocks recomputed" if layout["recompute"] else ""
    return f"{layout['world_size']} device(s), {layout['strategy']}{groups}{recomputed}"
