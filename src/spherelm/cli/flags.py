"""Types of flags that several commands share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import FlagCreatePairsOff, OmitArgPrefixes, Positional, arg

from spherelm.cli.given import Needs

Flag = Annotated[bool, FlagCreatePairsOff]
"""A switch: absent or `--name`, without a `--no-name` beside it."""

Runs = Annotated[Positional[tuple[Path, ...]], arg(metavar="RUN [RUN ...]", help_behavior_hint="(required)")]
"""One directory or more."""

DataDirectories = Annotated[Positional[tuple[Path, ...]], arg(metavar="DIR [DIR ...]", help_behavior_hint="(required)")]
"""One data directory or more."""

Dtype = Literal["auto", "float32", "bfloat16"]


@dataclass(frozen=True)
class DryRun:
    """What a dry run takes for granted.

    Attributes:
        dry_run: Print parameters, memory a device, operations, time and the resolved configuration, and stop.
        json: Print what a dry run says as JSON.
        world_size: Devices that the dry run spreads the run over.
        mfu: Part of the peak that the dry run assumes to be reached.
        peak_tflops: Peak of a device in the dry run, in 10^12 operations a second; an H100's in bfloat16 if left out.
        device_memory: Memory of a device in the dry run, in GiB; if left out, that of the accelerator here, else 80.
    """

    dry_run: Flag = False
    json: Annotated[Flag, Needs("--dry-run")] = False
    world_size: Annotated[int, Needs("--dry-run")] = 1
    mfu: Annotated[float, Needs("--dry-run")] = 0.4
    peak_tflops: Annotated[float, Needs("--dry-run")] = 989.0
    device_memory: Annotated[float | None, Needs("--dry-run")] = None


@dataclass(frozen=True)
class Sizes:
    """The shape of a model and the length of its run; the preset's where left out.

    Attributes:
        steps: Updates.
        seq_len: Tokens a sequence.
        batch_size: Sequences an update.
        micro_batch_size: Sequences at once, gradients accumulating over the batch.
        d_model: Channels of the hidden state.
        n_layers: Layers.
        n_heads: Heads of attention, each of d_model / n_heads channels.
    """

    steps: int | None = None
    seq_len: int | None = None
    batch_size: int | None = None
    micro_batch_size: int | None = None
    d_model: int | None = None
    n_layers: int | None = None
    n_heads: int | None = None


@dataclass(frozen=True)
class Rhythm:
    """How often a run validates and saves.

    Attributes:
        eval_every: Updates between validations; the preset's if left out.
        save_every: Updates between checkpoints; 0: by the clock, every --save-minutes, and at the end.
        save_minutes: Minutes between checkpoints where --save-every is 0; 0: only one at the end.
        keep: Checkpoints that stay, the newest ones.
        keep_every: Checkpoints of every so many updates stay as well, 0 for none.
    """

    eval_every: int | None = None
    save_every: int = 0
    save_minutes: float = 30.0
    keep: int = 2
    keep_every: Annotated[int, Needs("--save-every")] = 0


@dataclass(frozen=True)
class Spreading:
    """How several processes, started by torchrun, share a run.

    Attributes:
        strategy: replicate: each process has the whole model; shard: a part of it; hybrid: groups share one, as replicas.
        shard_size: Processes of a group, for the strategy hybrid.
        recompute: Blocks keep only their input, and are computed again for the backward pass: less memory, more time.
        timeout: Seconds that processes wait for one another before the run ends.
    """

    strategy: Literal["replicate", "shard", "hybrid"] = (
        "replicate"  # with one process too: the same command for any number
    )
    shard_size: Annotated[int, Needs("--strategy hybrid")] = 8
    recompute: Flag = False
    timeout: float = 600.0


@dataclass(frozen=True)
class BadSteps:
    """What becomes of an update that went wrong.

    Attributes:
        on_bad_step: stop or skip: where the loss or gradient is no number, or the gradient norm leaps.
        skip_budget: Updates that may be skipped in a run.
        spike_factor: The norm leaps if it is so many times its running average; 0: it may.
    """

    on_bad_step: Literal["stop", "skip"] = "stop"
    skip_budget: Annotated[int, Needs("--on-bad-step skip")] = 10
    spike_factor: float = 0.0


@dataclass(frozen=True)
class Logs:
    """What is logged, and where besides metrics.jsonl.

    Attributes:
        log_to: Where records go besides metrics.jsonl: any of tensorboard,wandb,trackio, by commas.
        diagnose_every: Updates between measurements of update angles and learned scales, 0 for none.
    """

    log_to: str = ""
    diagnose_every: int = 0


@dataclass(frozen=True)
class TrainingTasks:
    """Tasks that are scored in training.

    Attributes:
        eval_tasks: Tasks of the evaluation harness to score in training, by commas, into metrics.jsonl.
        eval_tasks_every: Updates between these scores, 0 for only at the end.
        task_data: Directory with local copies of the tasks' data; the harness downloads them if left out.
        eval_limit: Documents of each task, the first ones; all if left out.
    """

    eval_tasks: str = ""
    eval_tasks_every: Annotated[int, Needs("--eval-tasks")] = 0
    task_data: Annotated[Path | None, Needs("--eval-tasks")] = None
    eval_limit: Annotated[int | None, Needs("--eval-tasks")] = None


@dataclass(frozen=True)
class BeamSearch:
    """A search instead of a draw.

    Attributes:
        beams: Search for the most probable texts with so many at a time, instead of drawing; then --samples are the best.
        length_penalty: Of that search: a text counts as its log probability over its length to this power.
    """

    beams: Annotated[int | None, Needs(without=["--interactive"])] = None
    length_penalty: Annotated[float, Needs("--beams")] = 1.0


@dataclass(frozen=True)
class Translation:
    """Texts that a run shall write.

    Attributes:
        translate: A file with a text a line; what the run writes for each is scored by BLEU, chrF and error rates.
        write: A file to be made of what was written.
        beams: Texts that are pursued at a time.
        length_penalty: A text counts as its log probability over its length to this power.
    """

    translate: Annotated[Path | None, Needs("--reference")] = None
    write: Annotated[Path | None, Needs("--translate")] = None
    beams: Annotated[int, Needs("--translate")] = 5
    length_penalty: Annotated[float, Needs("--translate")] = 1.0


SizeFlags = Annotated[Sizes, OmitArgPrefixes]
DryRunFlags = Annotated[DryRun, OmitArgPrefixes]
LogFlags = Annotated[Logs, OmitArgPrefixes]
TaskFlags = Annotated[TrainingTasks, OmitArgPrefixes]
SpreadFlags = Annotated[Spreading, OmitArgPrefixes]
RhythmFlags = Annotated[Rhythm, OmitArgPrefixes]
BadStepFlags = Annotated[BadSteps, OmitArgPrefixes]
TranslationFlags = Annotated[Translation, OmitArgPrefixes]
BeamFlags = Annotated[BeamSearch, OmitArgPrefixes]
"""Flags that stand among a command's own."""
