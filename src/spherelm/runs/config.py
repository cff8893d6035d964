"""A run's resolved configuration, as stored in the run directory's `config.json`."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from spherelm.errors import UserError, read_text
from spherelm.fields import BelowOne, check, from_plain
from spherelm.layers.low_precision import Precision
from spherelm.models import CONFIGS, Config, older
from spherelm.models.config import to_plain
from spherelm.optim import OptimConfig, ScheduleConfig
from spherelm.optim.transfer import BaseShape


@dataclass(frozen=True)
class TrainConfig:
    """How long and on what a model trains.

    Attributes:
        steps: Updates.
        seq_len: Tokens a sequence.
        batch_size: Sequences an update, over all processes.
        micro_batch_size: Sequences computed at once in a process; gradients accumulate over the batch. All if left out.
        seed: Seed of the initial weights and of the order of the data.
        dtype: Number format of the computation (weights stay float32); auto: the faster one on this machine, recorded.
        precision: Number format of the operands of products with the blocks' matrices, if it has fewer bits than dtype.
        device: cpu, cuda, cuda:1 and so on; if left out, the accelerator if there is one, else the CPU.
        threads: CPU threads; if left out, the fastest number, which may change during the run.
        compile: Whether to use torch.compile.
        eval_every: Updates between validations; 0: only at the end.
        eval_windows: Sequences read per validation.
        save_every: Updates between checkpoints; 0: every save_minutes, and at the end.
        save_minutes: Minutes between checkpoints where save_every is 0; 0: only at the end.
        keep: Number of newest checkpoints to keep.
        mask_documents: Keep attention within a document where a sequence holds several.
        quiet: Show no progress.
        log_every: Updates between lines on screen; if left out, a bar on a terminal, else a line every ten seconds.
        log_to: Where records go besides metrics.jsonl: any of tensorboard, wandb, trackio.
        diagnose_every: Updates between measurements of update angles and learned scales; 0: never.
        eval_tasks: Tasks of the evaluation harness to score in training (spherelm list tasks), into metrics.jsonl.
        eval_tasks_every: Updates between these scores; 0: only at the end.
        task_data: Directory with local copies of the tasks' data; downloaded if left out.
        eval_limit: Score only this many documents of each task; all if left out.
        keep_every: Also keep the checkpoints at multiples of this many updates; 0: none.
        strategy: How processes share a model. replicate: each holds all of it; shard: each holds a part; hybrid: each
            group of processes shards one replica.
        shard_size: Processes per group, for the strategy hybrid.
        gather: Format in which the weights of blocks travel between processes, for the strategies shard and hybrid.
        recompute: Activation checkpointing: recompute blocks in the backward pass. Less memory, more time.
        timeout: Seconds that processes wait for each other before the run ends.
        on_bad_step: stop or skip: what to do where the loss or gradient is not finite, or the gradient norm jumps.
        skip_budget: Updates that may be skipped in a run.
        spike_factor: The gradient norm jumps if it is this many times its running average; 0: never.
        stop_above: A validation loss above this after the start ends the run as diverged; null: no limit.
        label_smoothing: The fraction of a target's probability that the training loss spreads over the vocabulary.
    """

    steps: PositiveInt
    seq_len: PositiveInt
    batch_size: PositiveInt
    micro_batch_size: PositiveInt | None = None
    seed: Annotated[int, Field(ge=0, lt=2**64)] = 0
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    precision: Precision = Precision()
    device: str | None = None
    threads: PositiveInt | None = None
    compile: bool = True
    eval_every: NonNegativeInt = 100
    eval_windows: PositiveInt = 64
    save_every: NonNegativeInt = 0
    save_minutes: NonNegativeFloat = 30.0
    keep: PositiveInt = 2
    mask_documents: bool = False
    quiet: bool = False
    log_every: PositiveInt | None = None
    log_to: str = ""
    diagnose_every: NonNegativeInt = 0
    eval_tasks: str = ""
    eval_tasks_every: NonNegativeInt = 0
    task_data: str | None = None
    eval_limit: PositiveInt | None = None
    keep_every: NonNegativeInt = 0
    strategy: Literal["replicate", "shard", "hybrid"] = "replicate"
    shard_size: PositiveInt = 8
    gather: Literal["float32", "bfloat16"] = "float32"
    recompute: bool = False
    timeout: PositiveFloat = 600.0
    on_bad_step: Literal["stop", "skip"] = "stop"
    skip_budget: NonNegativeInt = 10
    spike_factor: NonNegativeFloat = 0.0
    stop_above: float | None = None
    label_smoothing: BelowOne = 0.0

    def __post_init__(self) -> None:
        check(self)
        if 0 < self.spike_factor <= 1:
            raise UserError(f"spike_factor must be 0 or more than 1, got {self.spike_factor}")
        if self.micro_batch_size is not None and self.batch_size % self.micro_batch_size:
            raise UserError(f"micro_batch_size={self.micro_batch_size} does not divide batch_size={self.batch_size}")


@dataclass(frozen=True)
class RunConfig:
    """Everything that decides the outcome of a run: model, optimizer, schedule, length, data.

    data: the path of a data directory, or `None` for the text that ships with spherelm. init_from: the run, checkpoint
    or folder whose weights it begins with, `None` for weights that are drawn. base: where the recipe "nugpt" carried
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
    init_from: str | None = None

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

    At most `train.micro_batch_size` at once, fewer where that does not divide the part of one process. Raises
    `UserError` where a batch cannot be shared so.
    """
    local, rest = divmod(train.batch_size, world_size)
    if rest or not local:
        raise UserError(
            f"batch_size={train.batch_size} cannot be shared by {world_size} processes: choose a multiple of {world_size}"
        )
    size = part_of_batch(train.micro_batch_size or local, local)
    return size, local // size


def parts_of_model(train: TrainConfig, world_size: int) -> int:
    """Into how many parts `world_size` processes cut weights, gradients and moments.

    Raises `UserError` where `train.shard_size` does not divide the processes.
    """
    if train.strategy == "hybrid" and world_size % train.shard_size:
        raise UserError(f"--shard-size {train.shard_size} does not divide the {world_size} processes: choose a divisor")
    return {"replicate": 1, "shard": world_size, "hybrid": train.shard_size}[train.strategy]


def part_of_batch(limit: int, batch_size: int) -> int:
    """The largest divisor of a batch that is not above `limit`."""
    most = min(limit, batch_size)
    return next((size for size in range(most, 0, -1) if batch_size % size == 0), 1)


def to_dict(config: RunConfig) -> dict[str, Any]:
    """The configuration as plain JSON values."""
    plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(config)))
    return {"arm": config.arm, **plain, "model": to_plain(config.model)}


@dataclass(frozen=True)
class Record:
    """The output of `to_dict`, of this version or of 0.1.0, before its parts are read."""

    arm: str
    recipe: str
    preset: str
    model: dict[str, Any]
    optim: dict[str, Any]
    schedule: dict[str, Any]
    train: dict[str, Any]
    data: str | None = None
    base: dict[str, Any] | None = None
    init_from: str | None = None


def from_dict(record: dict[str, Any]) -> RunConfig:
    """The configuration that `to_dict` wrote, of this version or of 0.1.0; keys that are not its own are left alone.

    Raises `UserError` naming what is missing, unknown or wrong.
    """
    if not isinstance(record, dict):
        raise UserError("not a run configuration: it is not an object with fields")
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
            init_from=parts.init_from,
        )
    except UserError as error:
        raise UserError(f"not a run configuration of this version of spherelm: {error}") from error


def record_today(record: dict[str, Any]) -> dict[str, Any]:
    """The content of a `config.json`, its configuration as this version writes it; any other record unchanged."""
    try:
        return {**record, **to_dict(from_dict(record))}
    except UserError:
        return record


def read_config(path: Path) -> RunConfig:
    """The configuration stored in the file `path`; raises `UserError` naming the file if it is not one."""
    record = read_record(path)
    try:
        return from_dict(record)
    except UserError as error:
        raise UserError(f"{path} cannot be used: {error}") from error


def read_record(path: Path) -> dict[str, Any]:
    """Everything in a run's `config.json`, or in such a file that was written by hand,
    of JSON or (.yaml, .yml) of YAML.

    Raises `UserError` naming the file if it cannot be read, holds no fields, or one twice.
    """
    text = read_text(path, "give the config.json of a run, or a file of settings in JSON or YAML")
    try:
        # PyYAML, which reads YAML 1.1, would take 1e-3 for text.
        read = YAML(typ="safe", pure=True).load if path.suffix in (".yaml", ".yml") else _read_json
        record: dict[str, Any] = read(text)
        _check_names(record)
    except MarkedYAMLError as error:
        line = "" if error.problem_mark is None else f" (line {error.problem_mark.line + 1})"
        raise UserError(f"{path} cannot be used: {error.problem}{line}") from error
    except (json.JSONDecodeError, YAMLError, UserError) as error:
        raise UserError(f"{path} cannot be used: {' '.join(str(error).split())}") from error
    except RecursionError as error:
        raise UserError(f"{path} cannot be used: it is nested too deeply") from error
    if not isinstance(record, dict):
        raise UserError(f"{path} cannot be used: it holds no fields")
    return record


def _check_names(value: Any) -> None:
    """Raise `UserError` for a name in a file that cannot be a field's."""
    for key, inner in value.items() if isinstance(value, dict) else ():
        if not isinstance(key, str) or not key:
            raise UserError(f"{key!r} stands where the name of a field should: write the name, in quotes if need be")
        _check_names(inner)


def _read_json(text: str) -> Any:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        twice = [name for name, count in Counter(name for name, _ in pairs).items() if count > 1]
        if twice:
            raise UserError(f"{twice[0]!r} occurs twice in one object")
        return dict(pairs)

    return json.loads(text, object_pairs_hook=once)
