"""Checkpoints: written by `torch.distributed.checkpoint` as safetensors,
in a directory that appears whole or not at all.

Every process writes the parts that it holds, beside the training, and any number of processes can read them.
`state.json` is written last and lists the sha256 of each file, which reading verifies. Nothing is ever unpickled.
torch's checkpoints take as long to import as half of torch, so only what reads or writes one imports them.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from spherelm.errors import StorageError, UserError
from spherelm.models.older import is_old, renames
from spherelm.optim.groups import count_devices
from spherelm.runs.group import Group
from spherelm.sharding import from_own_part, is_sharded, own_part

WEIGHTS, MOMENTS, STATE = "model.safetensors", "optimizer.safetensors", "state.json"
REMEDY = "delete this checkpoint to resume from the one before"
NAME = re.compile(r"step-(\d{8})")
RANDOM_STATE = "random_state"
_WRITTEN = re.compile(r"shard-(\d+)-model-0000([12])-of-\d+\.safetensors")
ALONE = Group()


@dataclass(frozen=True)
class Progress:
    """How far a run has come: updates made, seconds spent training,
    and where a stream of text continues (`Batches.state`).

    skipped: updates that were left out. norm: what `Guard` remembers of gradient norms. start: the validation loss
    before training, `None` where it is not known.
    """

    step: int
    seconds: float
    data: dict[str, Any] = field(default_factory=dict)
    skipped: int = 0
    norm: float = 0.0
    start: float | None = None


def _weights(model: nn.Module) -> dict[str, Tensor]:
    """A model's tensors: its parameters, each once, and the rest of its state dict, such as the biases of routers."""
    state = model.state_dict(keep_vars=True)
    buffers = {name: value for name, value in state.items() if not isinstance(value, nn.Parameter)}
    return {**dict(model.named_parameters()), **buffers}


def _optimizer_tensors(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """The optimizer's state by parameter name: `blocks.0.mlp.u.weight/exp_avg`, and torch's random state."""
    tensors = {RANDOM_STATE: torch.get_rng_state()}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            assert isinstance(value, Tensor), f"optimizer state {key} of {name} is not a tensor"
            tensors[f"{name}/{key}"] = value
    return tensors


def _digest(path: Path) -> str:
    """The sha256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _sync(path: Path) -> None:
    """Have the file or directory on the disk before continuing."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@torch.no_grad()
def _copied(tensor: Tensor) -> Tensor:
    """A copy in the processor's memory, that training does not change; of a sharded tensor, of this process's part."""
    copy = own_part(tensor).detach().to("cpu", copy=True)
    return from_own_part(copy, tensor) if is_sharded(tensor) else copy.contiguous()


class CheckpointWriter:
    """Writes the checkpoints of a run beside its training, one at a time.

    `run/checkpoints/step-XXXXXXXX` are written under another name, flushed to the disk and renamed, so a crash or a
    full disk leaves the earlier ones as they were. The newest `keep` stay, and those of every `keep_every`-th step (0:
    none). Every process of the group makes one; what a process that was killed had not finished is removed then.
    """

    def __init__(self, run: Path, keep: int, keep_every: int = 0, group: Group = ALONE) -> None:
        import torch.distributed.checkpoint.hf_storage  # noqa: F401, here and not first in the thread that writes

        self.run, self.keep, self.keep_every, self.group = run, keep, keep_every, group
        group.first(lambda: drop_unfinished(run))  # before any process begins to write
        self._pool = ThreadPoolExecutor(1, "checkpoint")
        self._pending: Future[None] | None = None

    def save(self, model: nn.Module, optimizer: Optimizer, progress: Progress) -> Path:
        """Copy what is to be saved and begin to write it; every process of the group must call.
        Returns where it will be.

        Waits for the one before, and raises what `wait` does.
        """
        self.wait()
        weights = {name: _copied(tensor) for name, tensor in _weights(model).items()}
        moments = {name: _copied(value) for name, value in _optimizer_tensors(model, optimizer).items()}
        final = self.run / "checkpoints" / f"step-{progress.step:08d}"
        self._pending = self._pool.submit(self._write, final, weights, moments, progress)
        return final

    def wait(self) -> None:
        """Until nothing is being written. Raises `OSError` naming the directory if what was could not be."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """`wait`, and end."""
        try:
            self.wait()
        finally:
            self._pool.shutdown()

    def abandon(self) -> None:
        """Leave what is being written to itself: the processes that share in it are gone."""
        self._pending = None
        self._pool.shutdown(wait=False)

    def _write(self, final: Path, weights: dict[str, Tensor], moments: dict[str, Tensor], progress: Progress) -> None:
        from torch.distributed.checkpoint.api import CheckpointException
        from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
        from torch.distributed.checkpoint.state_dict_saver import save

        part = final.with_name(f".{final.name}.part")
        try:
            part.mkdir(parents=True, exist_ok=True)
            files = dict.fromkeys(weights, 1) | dict.fromkeys(moments, 2)
            writer = HuggingFaceStorageWriter(str(part), files, save_distributed=True)
            with _one_process_is_meant():
                save(
                    {**weights, **moments},
                    storage_writer=writer,
                    process_group=self.group.saving,
                    no_dist=self.group.is_alone,
                )
            hashes = self._hashes(part)
            if self.group.is_first:
                self._finish(part, final, hashes, progress)
        except (Exception, CheckpointException) as error:  # the latter derives from BaseException
            shutil.rmtree(part, ignore_errors=True)
            last = latest_checkpoint(self.run)
            good = f"the last good checkpoint is {last}" if last else "there is no earlier checkpoint"
            raise StorageError(
                f"could not save a checkpoint in {final.parent} ({reason(error)}); {good}: free some space and --resume"
            ) from error

    def _hashes(self, part: Path) -> dict[str, str]:
        """Give this process's files their names, and return the sha256 of all processes' files on the first."""
        own: dict[str, str] = {}
        for path in sorted(part.iterdir()):
            match = _WRITTEN.fullmatch(path.name)
            if match and int(match[1]) == self.group.rank + 1:
                named = path.with_name(self._name(WEIGHTS if match[2] == "1" else MOMENTS))
                path.rename(named)
                _sync(named)
                own[named.name] = _digest(named)
        if self.group.is_alone:
            return own
        every: list[Any] = [None] * self.group.world_size
        dist.all_gather_object(every, own, group=self.group.saving)
        return {name: digest for hashes in every for name, digest in hashes.items()}

    def _name(self, name: str) -> str:
        if self.group.is_alone:
            return name
        return name.replace(".", f"-{self.group.rank + 1:05d}-of-{self.group.world_size:05d}.")

    def _finish(self, part: Path, final: Path, hashes: dict[str, str], progress: Progress) -> None:
        """Make the written files a checkpoint, and drop those that need not stay."""
        state = {**vars(progress), "processes": self.group.world_size, "sha256": hashes}
        (part / STATE).write_text(json.dumps(state))
        for path in (part / STATE, part):
            _sync(path)
        if final.exists():
            shutil.rmtree(final)
        os.rename(part, final)
        _sync(final.parent)
        for old in _checkpoints(self.run)[: -self.keep]:
            if not (self.keep_every and int(old.name.removeprefix("step-")) % self.keep_every == 0):
                shutil.rmtree(old)


def reason(error: BaseException) -> str:
    """The cause of an error, in one line; of a `CheckpointException`, that of the first rank that failed."""
    from torch.distributed.checkpoint.api import CheckpointException

    if isinstance(error, CheckpointException):
        rank, (cause, _) = next(iter(error.failures.items()))
        return f"rank {rank}: {reason(cause)}" if len(error.failures) > 1 or rank else reason(cause)
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def save_checkpoint(run: Path, model: nn.Module, optimizer: Optimizer, progress: Progress, keep: int) -> Path:
    """Write a checkpoint of a run of one process and wait until it is there. As `CheckpointWriter.save`."""
    writer = CheckpointWriter(run, keep)
    try:
        return writer.save(model, optimizer, progress)
    finally:
        writer.close()


def drop_unfinished(run: Path) -> None:
    """Remove what a process that was killed has left of checkpoints that it was writing."""
    for part in (run / "checkpoints").glob(".step-*.part"):
        shutil.rmtree(part, ignore_errors=True)


def _checkpoints(run: Path) -> list[Path]:
    return sorted(c for c in (run / "checkpoints").glob("step-*") if NAME.fullmatch(c.name))


def latest_checkpoint(run: Path) -> Path | None:
    """The newest complete checkpoint of a run, or `None`."""
    found = [checkpoint for checkpoint in _checkpoints(run) if (checkpoint / STATE).exists()]
    return found[-1] if found else None


def named_checkpoint(run: str | Path) -> Path | None:
    """The checkpoint that `run` is, by any of its names (a symbolic link, `.` from inside), or `None` if it is none."""
    path = Path(run).resolve()
    return path if NAME.fullmatch(path.name) and path.parent.name == "checkpoints" else None


def read_state(checkpoint: Path, group: Group = ALONE, of: str = "") -> dict[str, Any]:
    """`state.json` of a checkpoint whose files are what they were when written;
    else a `ValueError` that says what is not.

    of: how the names of the files that are looked at begin. The processes of the group share the work,
    and must all call.
    """

    def verified() -> dict[str, Any]:
        try:
            state: dict[str, Any] = json.loads((checkpoint / STATE).read_text(encoding="utf-8"))
            hashes = sorted(item for item in state["sha256"].items() if item[0].startswith(of))
            for name, expected in hashes[group.rank :: group.world_size]:
                if _digest(checkpoint / name) != expected:
                    raise UserError(f"{checkpoint / name} is damaged (its sha256 differs): {REMEDY}")
            return state
        except (
            KeyError,
            TypeError,
            AttributeError,
            json.JSONDecodeError,
            UnicodeDecodeError,
            FileNotFoundError,
        ) as error:
            raise UserError(f"{checkpoint} is not a complete checkpoint ({error}): {REMEDY}") from error

    return group.together(verified)


class _Entry(NamedTuple):
    """The name of a tensor in a checkpoint, which may be an older one, and its shape."""

    name: str
    shape: torch.Size


def _entries(checkpoint: Path) -> dict[str, _Entry]:
    """Everything in a checkpoint, by the names of today."""
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

    reader = HuggingFaceStorageReader(str(checkpoint))
    try:
        metadata = reader.read_metadata()
    except safetensors.SafetensorError as error:
        raise UserError(f"{checkpoint} holds a file that is not safetensors ({error}): {REMEDY}") from error
    shapes = {name: entry.size for name, entry in metadata.state_dict_metadata.items()}  # type: ignore[union-attr]
    weights = {name.partition("/")[0] for name in shapes}
    new = renames(weights) if is_old(weights) else {}
    found = {}
    for stored, shape in shapes.items():
        name, slash, key = stored.partition("/")
        found[new.get(name, name) + slash + key] = _Entry(stored, shape)
    return found


def _read(checkpoint: Path, into: dict[str, Tensor], group: Group) -> None:
    """Fill the tensors `into`, by the names in the checkpoint, from it, whatever number of processes wrote it."""
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.state_dict_loader import load

    reader = HuggingFaceStorageReader(str(checkpoint))
    with _one_process_is_meant():
        load(dict(into), storage_reader=reader, process_group=group.saving, no_dist=group.is_alone)


@contextmanager
def _one_process_is_meant() -> Iterator[None]:
    """Without torch's warning about a run of one process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized, assuming")
        yield


@torch.no_grad()
def load_weights(model: nn.Module, checkpoint: Path, group: Group = ALONE) -> None:
    """Copy the weights in a checkpoint, of this version or an older one, into `model`;
    names and shapes must agree exactly.

    Raises `ValueError` naming what does not.
    """
    stored = {n: entry for n, entry in _entries(checkpoint).items() if "/" not in n and n != RANDOM_STATE}
    weights = _weights(model)
    for name in sorted(weights.keys() ^ stored.keys()):
        where = "the model" if name in weights else "the checkpoint"
        raise UserError(f"{checkpoint} belongs to another model: only {where} has {name}")
    for name, weight in weights.items():
        if weight.shape != stored[name].shape:
            raise UserError(
                f"{checkpoint} belongs to another config: {name} is {tuple(stored[name].shape)} there, "
                f"{tuple(weight.shape)} in the model"
            )
    _read(checkpoint, {stored[name].name: weight.detach() for name, weight in weights.items()}, group)


@torch.no_grad()
def load_checkpoint(checkpoint: Path, model: nn.Module, optimizer: Optimizer, group: Group = ALONE) -> Progress:
    """Restore `model`, `optimizer` and torch's random state from a checkpoint; returns how far the run had come.

    The checkpoint may come from any number of processes. Raises `ValueError` for one that is incomplete, damaged or of
    another config.
    """
    if not any(checkpoint.glob(f"{Path(MOMENTS).stem}*.safetensors")):
        raise UserError(
            f"{checkpoint} holds weights alone, without the optimizer's state ({MOMENTS}): training cannot resume from it; "
            f"{REMEDY}"
        )
    state = read_state(checkpoint, group)
    load_weights(model, checkpoint, group)
    parameters = dict(model.named_parameters())
    into = {RANDOM_STATE: torch.empty_like(torch.get_rng_state())}
    devices = count_devices(optimizer)
    for path, (stored, shape) in _entries(checkpoint).items():
        name, _, key = path.partition("/")
        if key:
            parameter = parameters[name]
            count = torch.zeros((), device=devices.get(parameter, "cpu"))
            optimizer.state[parameter][key] = into[stored] = torch.zeros_like(parameter) if len(shape) else count
    _read(checkpoint, into, group)
    torch.set_rng_state(into[RANDOM_STATE])
    rest = {name: state[name] for name in ("data", "skipped", "norm", "start") if name in state}
    return Progress(state["step"], state["seconds"], **rest)
