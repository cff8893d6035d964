"""What a run is: its resolved configuration, as it stands in the run directory's `config.json`."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from spherelm.errors import UserError
from spherelm.fields import Part, check, from_plain
from spherelm.models import CONFIGS, Config, older
from spherelm.models.config import to_plain
from spherelm.optim import OptimConfig, ScheduleConfig
from spherelm.optim.transfer import BaseShape

Strategy = Literal["replicate", "shard", "hybrid"]
"""How several processes share a model."""


@dataclass(frozen=True)
class TrainConfig:
    """How long and on what a model trains.

    steps: optimizer updates. seq_len: tokens a sequence. batch_size: sequences an update, over all processes.
    micro_batch_size: sequences at once in one process, `None` for all; the gradients of the rest accumulate. dtype: of the
    computation; weights are float32 always; "auto" is bfloat16 where the hardware multiplies it fast. eval_every,
    save_every: in updates, 0 for only at the end. save_minutes: where save_every is 0, save so often all the same, 0 for never.
    eval_windows: sequences of validation text read each time. keep: how many checkpoints stay. mask_documents: attention does
    not cross from one document of a sequence into another.
    log_to: where records go besides `metrics.jsonl`, by commas. diagnose_every: updates between measurements of updates, or 0.
    eval_tasks: tasks of the evaluation harness, by commas, scored every eval_tasks_every updates (0: only at the end), on
    copies of their data in the directory task_data (`None`: downloaded) and the first eval_limit documents (`None`: all).
    keep_every: checkpoints of every so many updates stay for good, 0 for none. strategy: how several processes share a model:
    "replicate" (each has all of it), "shard" (each has a part), "hybrid" (groups of shard_size share one, and are
    replicas). recompute: blocks keep only their input, and are computed again for the backward pass. timeout: seconds that
    processes wait for one another. on_bad_step: "stop" or "skip" an update whose loss or gradient is no number, or whose
    gradient norm is more than spike_factor times its running average (0: any is let through); at most skip_budget in a run.
    stop_above: a validation loss after the start that is higher ends the run as diverged, `None` for no such limit.
    label_smoothing: the part of a target's probability that the training loss spreads over the vocabulary; validation has none.
    """

    steps: PositiveInt
    seq_len: PositiveInt
    batch_size: PositiveInt
    micro_batch_size: PositiveInt | None = None
    seed: Annotated[int, Field(ge=0, lt=2**64)] = 0
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    compile: bool = True
    eval_every: NonNegativeInt = 100
    eval_windows: PositiveInt = 64
    save_every: NonNegativeInt = 0
    save_minutes: NonNegativeFloat = 30.0
    keep: PositiveInt = 2
    mask_documents: bool = False
    log_to: str = ""
    diagnose_every: NonNegativeInt = 0
    eval_tasks: str = ""
    eval_tasks_every: NonNegativeInt = 0
    task_data: str | None = None
    eval_limit: PositiveInt | None = None
    keep_every: NonNegativeInt = 0
    strategy: Strategy = "replicate"
    shard_size: PositiveInt = 8
    recompute: bool = False
    timeout: PositiveFloat = 600.0
    on_bad_step: Literal["stop", "skip"] = "stop"
    skip_budget: NonNegativeInt = 10
    spike_factor: NonNegativeFloat = 0.0
    stop_above: float | None = None
    label_smoothing: Part = 0.0

    def __post_init__(self) -> None:
        check(self)
        if 0 < self.spike_factor <= 1:
            raise UserError(f"spike_factor must be 0 or more than 1, got {self.spike_factor}")
        if self.micro_batch_size is not None and self.batch_size % self.micro_batch_size:
            raise UserError(f"micro_batch_size={self.micro_batch_size} does not divide batch_size={self.batch_size}")


@dataclass(frozen=True)
class RunConfig:
    """Everything that decides the outcome of a run: model, optimizer, schedule, length, data.

    data: the path of a data directory, or `None` for the text that ships with spherelm. base: where the recipe "nugpt" carried
    its rates over from, `None` with any other; what it made of them stands in the other fields.
    """

    recipe: str
    preset: str
    model: Config
    optim: OptimConfig
    schedule: ScheduleConfig
    train: TrainConfig
    data: str | None = None
    base: BaseShape | None = None

    @property
    def arm(self) -> str:
        """The arm that is trained: "gpt" or "ngpt"."""
        return self.model.arm

    def __post_init__(self) -> None:
        check(self)
        if self.train.seq_len > self.model.max_seq_len:
            raise UserError(
                f"seq_len={self.train.seq_len} is longer than the model's max_seq_len={self.model.max_seq_len}: lower one"
            )
        if self.schedule.warmup_steps > self.train.steps:
            raise UserError(
                f"warmup_steps={self.schedule.warmup_steps} is more than the run's steps={self.train.steps}: lower it"
            )


def micro_batches(train: TrainConfig, world_size: int) -> tuple[int, int]:
    """Sequences of a micro-batch in each of `world_size` processes, and how many micro-batches an update takes.

    Raises `ValueError` where a batch cannot be shared so.
    """
    local, rest = divmod(train.batch_size, world_size)
    if rest or not local:
        raise UserError(
            f"batch_size={train.batch_size} cannot be shared by {world_size} processes: choose a multiple of {world_size}"
        )
    size = min(train.micro_batch_size or local, local)
    if local % size:
        raise UserError(f"micro_batch_size={size} does not divide the {local} sequences of each process")
    return size, local // size


def to_dict(config: RunConfig) -> dict[str, Any]:
    """The configuration as plain JSON values."""
    plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(config)))
    return {"arm": config.arm, **plain, "model": to_plain(config.model)}


@dataclass(frozen=True)
class Record:
    """What `to_dict` writes, of this version or of 0.1.0, before its parts are read."""

    arm: str
    recipe: str
    preset: str
    model: dict[str, Any]
    optim: dict[str, Any]
    schedule: dict[str, Any]
    train: dict[str, Any]
    data: str | None = None
    base: dict[str, Any] | None = None


def from_dict(record: dict[str, Any]) -> RunConfig:
    """The configuration that `to_dict` wrote, of this version or of 0.1.0; keys that are not its own are left alone.

    Raises `UserError` naming what is missing, unknown or wrong.
    """
    if not isinstance(record, dict):
        raise UserError("not a run configuration: it is no object with fields")
    try:
        own = {field.name for field in dataclasses.fields(Record)}
        parts = from_plain(Record, {name: value for name, value in record.items() if name in own})
        arm = older.arm_today(parts.arm)
        if arm not in CONFIGS:
            raise UserError(f"arm must be one of {', '.join(CONFIGS)}, got {parts.arm!r}")
        return RunConfig(
            recipe=parts.recipe,
            preset=parts.preset,
            model=from_plain(CONFIGS[arm], older.fields_today(parts.arm, parts.model), "model."),
            optim=from_plain(OptimConfig, older.optim_today(parts.optim), "optim."),
            schedule=from_plain(ScheduleConfig, parts.schedule, "schedule."),
            train=from_plain(TrainConfig, parts.train, "train."),
            data=parts.data,
            base=from_plain(BaseShape, parts.base, "base.") if parts.base else None,
        )
    except UserError as error:
        raise UserError(f"not a run configuration of this version of spherelm: {error}") from error


def record_today(record: dict[str, Any]) -> dict[str, Any]:
    """What stands in a `config.json`, its configuration as this version writes it; a record of anything else as it is."""
    try:
        return {**record, **to_dict(from_dict(record))}
    except UserError:
        return record


def read_config(path: Path) -> RunConfig:
    """The configuration stored in the file `path`; raises `ValueError` naming the file if it is not one."""
    try:
        return from_dict(read_record(path))
    except (json.JSONDecodeError, UnicodeDecodeError, ValueError) as error:
        raise UserError(f"{path} cannot be used: {error}") from error


def read_record(path: Path) -> dict[str, Any]:
    """Everything in a run's `config.json`."""
    record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return record
