"""Types of flags that several commands share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import FlagCreatePairsOff, OmitArgPrefixes, Positional, arg

from spherelm.cli.given import Needs, Sets

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


BEAMS = "spherelm.generation.beam.BeamSettings"
OfBeams = Sets(BEAMS)
TRAIN = "spherelm.runs.config.TrainConfig"
OfTrain = Sets(TRAIN)
OfPreset = Sets(TRAIN, left_out="(default: the preset's)")
OfModel = Sets("spherelm.models.config.ModelConfig", left_out="(default: the preset's)")


@dataclass(frozen=True)
class Sizes:
    """The shape of a model and the length of its run."""

    steps: Annotated[int | None, OfPreset] = None
    seq_len: Annotated[int | None, OfPreset] = None
    batch_size: Annotated[int | None, OfPreset] = None
    micro_batch_size: Annotated[int | None, OfPreset] = None
    d_model: Annotated[int | None, OfModel] = None
    n_layers: Annotated[int | None, OfModel] = None
    n_heads: Annotated[int | None, OfModel] = None


@dataclass(frozen=True)
class Rhythm:
    """How often a run validates and saves."""

    eval_every: Annotated[int | None, OfPreset] = None
    save_every: Annotated[int | None, OfTrain] = None
    save_minutes: Annotated[float | None, OfTrain] = None
    keep: Annotated[int | None, OfTrain] = None
    keep_every: Annotated[int | None, OfTrain, Needs("--save-every")] = None


@dataclass(frozen=True)
class Spreading:
    """How several processes, started by torchrun, share a run; with one process too, so that the command stays the same."""

    strategy: Annotated[Literal["replicate", "shard", "hybrid"] | None, OfTrain] = None
    shard_size: Annotated[int | None, OfTrain, Needs("--strategy hybrid")] = None
    recompute: Annotated[Flag, OfTrain] = False
    timeout: Annotated[float | None, OfTrain] = None


@dataclass(frozen=True)
class BadSteps:
    """What becomes of an update that went wrong."""

    on_bad_step: Annotated[Literal["stop", "skip"] | None, OfTrain] = None
    skip_budget: Annotated[int | None, OfTrain, Needs("--on-bad-step skip")] = None
    spike_factor: Annotated[float | None, OfTrain] = None


@dataclass(frozen=True)
class Logs:
    """What is logged, and where besides metrics.jsonl."""

    log_to: Annotated[str | None, OfTrain] = None
    diagnose_every: Annotated[int | None, OfTrain] = None


@dataclass(frozen=True)
class TrainingTasks:
    """Tasks that are scored in training."""

    eval_tasks: Annotated[str | None, OfTrain] = None
    eval_tasks_every: Annotated[int | None, OfTrain, Needs("--eval-tasks")] = None
    task_data: Annotated[str | None, OfTrain, Needs("--eval-tasks")] = None
    eval_limit: Annotated[int | None, OfTrain, Needs("--eval-tasks")] = None


@dataclass(frozen=True)
class BeamSearch:
    """A search instead of a draw; then --samples are the best texts found."""

    beams: Annotated[
        int | None, Sets(BEAMS, left_out="(default: none, texts are drawn)"), Needs(without=["--interactive"])
    ] = None
    length_penalty: Annotated[float, OfBeams, Needs("--beams")] = 1.0


@dataclass(frozen=True)
class Translation:
    """Texts that a run shall write.

    Attributes:
        translate: A file with a text a line; what the run writes for each is scored by BLEU, chrF and error rates.
        write: A file to be made of what was written.
    """

    translate: Annotated[Path | None, Needs("--reference")] = None
    write: Annotated[Path | None, Needs("--translate")] = None
    beams: Annotated[int, OfBeams, Needs("--translate")] = 5
    length_penalty: Annotated[float, OfBeams, Needs("--translate")] = 1.0


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
