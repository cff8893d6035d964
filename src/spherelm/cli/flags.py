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
    """A description of a run in place of the run.

    Attributes:
        dry_run: Print parameters, memory per device, operations, time and the resolved configuration, and stop. A text
            that is no data directory is prepared first.
        json: Print the dry run's results as JSON.
    """

    dry_run: bool = False
    json: bool = False


@dataclass(frozen=True)
class Machine:
    """Where a command computes, besides the device of `TrainConfig`.

    Attributes:
        threads: CPU threads; torch's default if left out.
    """

    threads: int | None = None


@contextmanager
def computing(machine: Given) -> Iterator[None]:
    """Compute as the flags of `OnMachine` say, for as long as the context lasts."""
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
OnMachine = Annotated[Given, Fields("spherelm.cli.flags.Machine", "threads", title="machine"),
                      Fields(TRAIN, "device", title="machine")]  # fmt: skip
OF_TASKS = dict.fromkeys(("eval_tasks_every", "task_data", "eval_limit"), Needs("--eval-tasks"))
WITH_DRY_RUN = dict.fromkeys(("json", "world_size", "mfu", "peak_tflops", "device_memory"), Needs("--dry-run"))

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
    Fields("spherelm.cli.flags.DryRun", "dry_run", "json", title="dry run", needs=WITH_DRY_RUN),
    Fields("spherelm.train.estimate.Assumed", "world_size", "mfu", "peak_tflops", "device_memory", title="dry run",
           needs=WITH_DRY_RUN),
]  # fmt: skip
