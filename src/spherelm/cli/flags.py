"""Flags that several commands share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from spherelm.cli.parser import ASSIGNMENT, POSITIONAL, Fields, Needs

Run = Annotated[Path, POSITIONAL]
Runs = Annotated[tuple[Path, ...], POSITIONAL]
"""One directory or more."""

Arm = Literal["gpt", "ngpt"]
Settings = Annotated[tuple[str, ...], ASSIGNMENT]
Given = dict[str, Any]
"""The flags of some fields that were given, by field."""


@dataclass(frozen=True)
class DryRun:
    """Assumptions of a dry run.

    Attributes:
        dry_run: Print parameters, memory per device, operations, time and the resolved configuration, and stop. A text
            that is no data directory is prepared first.
        json: Print the dry run's results as JSON.
        world_size: Number of devices to assume.
        mfu: Model FLOP/s utilization (MFU) to assume.
        peak_tflops: Peak TFLOP/s of a device to assume; an H100's in bfloat16 if left out.
        device_memory: Memory of a device to assume, in GiB; if left out, that of this machine's accelerator, else 80.
    """

    dry_run: bool = False
    json: bool = False
    world_size: int = 1
    mfu: float = 0.4
    peak_tflops: float = 989.0
    device_memory: float | None = None


@dataclass(frozen=True)
class Machine:
    """Where a command computes.

    Attributes:
        threads: CPU threads; torch's default if left out.
        device: cpu, cuda, cuda:1 and so on; if left out, the accelerator if there is one, else the CPU.
    """

    threads: int | None = None
    device: str | None = None


OnMachine = Annotated[Given, Fields("spherelm.cli.flags.Machine", "threads", "device", title="machine")]


@contextmanager
def computing(machine: Given) -> Iterator[None]:
    """Compute as the flags of `Machine` say, for as long as the context lasts."""
    with ExitStack() as stack:
        if machine:
            from spherelm.train.precision import on_device
            from spherelm.train.threads import threads

            stack.enter_context(on_device(machine.get("device")))
            if "threads" in machine:
                stack.enter_context(threads(machine["threads"]))
        yield


TRAIN, OPTIM = "spherelm.runs.config.TrainConfig", "spherelm.optim.groups.OptimConfig"
MODEL = "spherelm.models.config.ModelConfig"
OF_TASKS = dict.fromkeys(("eval_tasks_every", "task_data", "eval_limit"), Needs("--eval-tasks"))
OF_DRY_RUN = ("json", "world_size", "mfu", "peak_tflops", "device_memory")

TrainFlags = Annotated[
    Given,
    Fields(MODEL, "d_model", "n_layers", "n_heads", title="shape", left_out="the preset's"),
    Fields(MODEL, "d_ff", title="shape"),
    Fields(TRAIN, "steps", "seq_len", "batch_size", "micro_batch_size", title="length", left_out="the preset's"),
    Fields(OPTIM, "lr", title="training", left_out="the recipe's"),
    Fields(TRAIN, "seed", "mask_documents", title="training"),
    Fields(TRAIN, "dtype", "device", "threads", "recompute", title="machine"),
    Fields(TRAIN, "eval_every", title="validation and checkpoints", left_out="the preset's"),
    Fields(TRAIN, "save_every", "save_minutes", "keep", "keep_every", title="validation and checkpoints",
           needs={"keep_every": Needs("--save-every"),
                  "save_minutes": Needs("--save-every 0", without=["--save-every"])}),
    Fields(TRAIN, "quiet", "log_every", "diagnose_every", title="logs", needs={"log_every": Needs(without=["--quiet"])}),
    Fields(TRAIN, "log_to", title="logs", lists=True),
    Fields(TRAIN, "eval_tasks", title="tasks scored in training", lists=True),
    Fields(TRAIN, *OF_TASKS, title="tasks scored in training", needs=OF_TASKS),
    Fields(TRAIN, "on_bad_step", "skip_budget", "spike_factor", title="updates that went wrong",
           needs={"skip_budget": Needs("--on-bad-step skip")}),
    Fields(TRAIN, "strategy", "shard_size", "gather", "timeout", title="several processes, started by torchrun",
           needs={"shard_size": Needs("--strategy hybrid"), "gather": Needs("--strategy shard", "--strategy hybrid")}),
]  # fmt: skip
DryRunFlags = Annotated[
    Given,
    Fields("spherelm.cli.flags.DryRun", "dry_run", *OF_DRY_RUN, title="dry run",
           needs=dict.fromkeys(OF_DRY_RUN, Needs("--dry-run"))),
]  # fmt: skip
