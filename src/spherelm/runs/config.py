"""What a run is: its resolved configuration, as it stands in the run directory's `config.json`."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spherelm.errors import UserError
from spherelm.fields import check_fields
from spherelm.models import CONFIGS, Config, older
from spherelm.models.config import check_known, from_plain, to_plain
from spherelm.optim import RULES, OptimConfig, RateMultipliers, ScheduleConfig
from spherelm.optim.transfer import BaseShape

DTYPES = ("auto", "float32", "bfloat16")
STRATEGIES = ("replicate", "shard", "hybrid")
ON_BAD_STEP = ("stop", "skip")


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

    steps: int
    seq_len: int
    batch_size: int
    micro_batch_size: int | None = None
    seed: int = 0
    dtype: str = "auto"
    compile: bool = True
    eval_every: int = 100
    eval_windows: int = 64
    save_every: int = 0
    save_minutes: float = 30.0
    keep: int = 2
    mask_documents: bool = False
    log_to: str = ""
    diagnose_every: int = 0
    eval_tasks: str = ""
    eval_tasks_every: int = 0
    task_data: str | None = None
    eval_limit: int | None = None
    keep_every: int = 0
    strategy: str = "replicate"
    shard_size: int = 8
    recompute: bool = False
    timeout: float = 600.0
    on_bad_step: str = "stop"
    skip_budget: int = 10
    spike_factor: float = 0.0
    stop_above: float | None = None
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        check_fields(self)
        for name in ("steps", "seq_len", "batch_size", "eval_windows", "keep"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, got {getattr(self, name)}")
        counts = ("eval_every", "save_every", "seed", "diagnose_every", "eval_tasks_every", "keep_every", "skip_budget")
        for name in (*counts, "spike_factor", "save_minutes"):
            if getattr(self, name) < 0:
                raise UserError(f"{name} must not be negative, got {getattr(self, name)}")
        if self.seed >= 2**64:
            raise UserError(f"seed must be below 2^64, got {self.seed}")
        for name, known in (("dtype", DTYPES), ("strategy", STRATEGIES), ("on_bad_step", ON_BAD_STEP)):
            if getattr(self, name) not in known:
                raise UserError(f"unknown {name} {getattr(self, name)!r}: choose one of {', '.join(known)}")
        for name in ("shard_size", "timeout"):
            if not getattr(self, name) > 0:
                raise UserError(f"{name} must be positive, got {getattr(self, name)}")
        if 0 < self.spike_factor <= 1:
            raise UserError(f"spike_factor must be 0 or more than 1, got {self.spike_factor}")
        if self.eval_limit is not None and self.eval_limit < 1:
            raise UserError(f"eval_limit must be at least 1 or None, got {self.eval_limit}")
        if not 0 <= self.label_smoothing < 1:
            raise UserError(f"label_smoothing must lie in [0, 1), got {self.label_smoothing}")
        if self.micro_batch_size is not None and (self.micro_batch_size < 1 or self.batch_size % self.micro_batch_size):
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
        check_fields(self)
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


def from_dict(record: dict[str, Any]) -> RunConfig:
    """The configuration that `to_dict` wrote, of this version or of 0.1.0; keys that are not its own are left alone.

    Raises `ValueError` naming what is missing or unknown.
    """
    if not isinstance(record, dict):
        raise UserError("not a run configuration: it holds no object of JSON")
    try:
        model = older.fields_today(record["arm"], record["model"])
        optim = dict(record["optim"])
        rule = older.rule_today(optim)
        check_known("optimizer", rule["kind"], RULES)
        optim["optimizer"] = RULES[rule.pop("kind")](**rule)
        optim["multipliers"] = RateMultipliers(**optim["multipliers"])
        return RunConfig(
            recipe=record["recipe"],
            preset=record["preset"],
            model=from_plain(CONFIGS[older.arm_today(record["arm"])], model),
            optim=OptimConfig(**optim),
            schedule=ScheduleConfig(**record["schedule"]),
            train=TrainConfig(**record["train"]),
            data=record["data"],
            base=BaseShape(**record["base"]) if record.get("base") else None,
        )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"not a run configuration of this version of spherelm: {error}") from error


def record_today(record: dict[str, Any]) -> dict[str, Any]:
    """What stands in a `config.json`, its configuration as this version writes it; a record of anything else as it is."""
    try:
        return {**record, **to_dict(from_dict(record))}
    except ValueError:
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
