"""Many processes as one run: where they meet, how a model is spread over them, and the few numbers they agree on.

The engines are torch's: torchrun starts the processes, `DistributedDataParallel` sums the gradients of whole copies,
`fully_shard` (FSDP2) cuts weights, gradients and moments into parts. A run of one process has a `Group` of one, for
which everything here does nothing, so that there is one training loop and not two.
"""

from __future__ import annotations

import gc
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint as recomputed

from spherelm.layers.linear import unit_modules
from spherelm.layers.moe import parts_of_batch, routers, uncounted
from spherelm.models import Decoder
from spherelm.models.kit import Surroundings
from spherelm.runs.config import TrainConfig, parts_of_model
from spherelm.runs.group import Group
from spherelm.sharding import cut, own_part

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule

ANSWER_SECONDS = 10.0
"""How long ranks wait for one another's sign of life after a collective operation failed."""

T = TypeVar("T")


class RankLost(RuntimeError):
    """Some processes of the run no longer answer."""


class ElsewhereFailed(RuntimeError):
    """A joint operation failed on another rank, for the reason given."""


@dataclass(frozen=True)
class Ranks(Group):
    """The processes of a run that are more than one. store: where they leave signs of life."""

    store: Any = None

    def gather(self, values: list[float]) -> list[list[float]]:
        """As `Group.gather`."""
        parts = [torch.empty(len(values), dtype=torch.float64) for _ in range(self.world_size)]
        dist.all_gather(parts, torch.tensor(values, dtype=torch.float64))
        return [part.tolist() for part in parts]

    def summed(self, counts: Tensor) -> Tensor:
        """As `Group.summed`."""
        dist.all_reduce(counts := counts.clone())
        return counts

    def together(self, action: Callable[[], T]) -> T:
        """As `Group.together`: what it raises is raised where it is raised; the other ranks raise `ElsewhereFailed`."""
        failure: Exception | None = None
        try:
            result = action()
        except Exception as error:
            failure = error
        if any(flag for (flag,) in self.gather([float(failure is not None)])):
            reasons: list[Any] = [None] * self.world_size
            dist.all_gather_object(reasons, None if failure is None else str(failure) or type(failure).__name__)
            if failure is not None:
                raise failure
            raise ElsewhereFailed(next(f"rank {rank}: {why}" for rank, why in enumerate(reasons) if why is not None))
        return result

    def first(self, action: Callable[[], T]) -> T:
        """As `Group.first`."""
        box: list[Any] = [self.together(action if self.is_first else lambda: None)]
        dist.broadcast_object_list(box, src=0)
        result: T = box[0]
        return result

    @torch.no_grad()
    def unequal_ranks(self, model: nn.Module) -> list[int]:
        """As `Group.unequal_ranks`."""
        parts = 1 if self.mesh is None else self.mesh.size(-1)
        own = sum((own_part(p).double().sum() for p in model.parameters()), torch.zeros((), dtype=torch.float64))
        sums = [value for (value,) in self.gather([float(own)])]
        return [rank for rank, value in enumerate(sums) if math.isfinite(value) and value != sums[rank % parts]]

    def silent_ranks(self) -> list[int]:
        """Which ranks give no sign of life after a collective operation failed, having waited a while for them."""
        try:
            self.store.set(f"alive/{self.rank}", "1")
            return sorted(silent_among(range(self.world_size), self.store, "alive/"))
        except RuntimeError:  # the store itself is gone, and with it the process that kept it
            return [0]

    @contextmanager
    def answering(self) -> Iterator[None]:
        """Turn the failure of a collective operation into `RankLost`, which names the ranks that do not answer."""
        try:
            yield
        except RuntimeError as error:
            if not is_communication(error):
                raise
            silent = self.silent_ranks()
            names = ", ".join(map(str, silent)) or "none, so the network failed"
            raise RankLost(
                f"rank {self.rank} could not reach the others ({str(error).splitlines()[0][:200]}); ranks that no longer "
                f"answer (killed, hung, or their machine lost): {names}; --resume continues the run from its last checkpoint"
            ) from error


def is_communication(error: RuntimeError) -> bool:
    """Whether an error comes from processes that do not reach each other."""
    return isinstance(error, dist.DistError) or any(
        word in str(error) for word in ("gloo", "Gloo", "NCCL", "Timed out")
    )


def silent_among(ranks: Iterable[int], store: Any, prefix: str = "") -> set[int]:
    """Those of `ranks` that have not left a sign in the `store` after a while."""
    waiting, end = set(ranks), time.monotonic() + ANSWER_SECONDS
    while waiting and time.monotonic() < end:
        waiting = {rank for rank in waiting if not store.check([f"{prefix}{rank}"])}
        time.sleep(0.02)
    return waiting


@contextmanager
def joined(train: TrainConfig, device: torch.device) -> Iterator[Group]:
    """Meet the other processes that torchrun started, for as long as the context lasts; alone without torchrun.

    device: the kind to compute on; each process of a machine takes the one of its number. Leave nothing
    of the model alive in the caller: parts must be gone before the processes part, or some of them abort when all work
    is done.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size == 1:
        yield Group(device=device)
        return
    if device.type != "cpu":
        device = torch.device(device.type, int(os.environ.get("LOCAL_RANK", "0")))
        torch.accelerator.set_device_index(device)
    patience = timedelta(seconds=train.timeout)
    store, rank, _ = next(rendezvous("env://", timeout=patience))
    # A restarted run must not read what the one before it left.
    store = PrefixStore(f"spherelm/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    dist.init_process_group(backend_of(device), store=store, rank=rank, world_size=world_size, timeout=patience)
    saving = dist.new_group(backend="gloo", timeout=patience)
    yield Ranks(rank, world_size, device, mesh_of(train, world_size, device), saving, store)
    gc.collect()
    dist.barrier()
    dist.destroy_process_group()


def backend_of(device: torch.device) -> str:
    """The libraries by which processes on devices of this kind exchange tensors, as torch names them."""
    return "gloo" if device.type == "cpu" else f"cpu:gloo,{device.type}:{dist.get_default_backend_for_device(device)}"


def leave(say: Callable[[], object], code: int) -> NoReturn:
    """End one of several processes, all of which end for one reason: the first calls `say`, the others keep silent.

    They wait a while for one another, so that torchrun, which ends all when one has ended, does not cut off the first;
    one whose first rank never comes here calls `say` itself. The groups of processes are not taken apart: that aborts
    now and then (SIGABRT) when an exception is under way.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ["WORLD_SIZE"])
    if rank == 0:
        say()
    try:
        store, _, _ = next(rendezvous("env://", timeout=timedelta(seconds=ANSWER_SECONDS)))
        store = PrefixStore(f"spherelm/end/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        if rank and silent_among([0], store):
            say()
        store.set(str(rank), "1")  # the last that this one asks of the store, which may end with the first
        if rank == 0:
            silent_among(range(world_size), store)
    except (RuntimeError, ValueError):  # there is no store, or no longer: the process that kept it has said why
        pass
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):
            stream.flush()
    os._exit(code)


def mesh_of(train: TrainConfig, world_size: int, device: torch.device) -> DeviceMesh | None:
    """The arrangement of processes that the strategy asks for, `None` for whole copies.

    Raises what `parts_of_model` raises.
    """
    parts = parts_of_model(train, world_size)
    if train.strategy == "replicate":
        return None
    if train.strategy == "shard":
        return init_device_mesh(device.type, (world_size,), mesh_dim_names=("shard",))
    return init_device_mesh(device.type, (world_size // parts, parts), mesh_dim_names=("replicate", "shard"))


Loss = Callable[..., Tensor]
"""(tokens, targets, mask, positions) -> mean loss of one process's micro-batch, as `Decoder.loss`."""


@dataclass(frozen=True)
class DistributedModel:
    """A model over its group.

    loss: what to differentiate. device: where it wants its tokens. last: a context in which gradients are summed over
    the processes or, for all micro-batches of an update but the last, are not. rest: lets go of weights that were
    gathered for a forward pass without a backward pass, after which `model.parameters()` are this process's own again.
    whole: a context in which a batch is computed in so many parts by this process, given what passes all of them
    through the model.
    """

    loss: Loss
    device: torch.device
    last: Callable[[bool], AbstractContextManager[Any]] = lambda is_last: nullcontext()
    rest: Callable[[], None] = lambda: None
    whole: Callable[[int, Callable[[], object]], AbstractContextManager[Any]] = lambda parts, forward: nullcontext()


def distributed(model: Decoder, group: Group, recompute: bool = False, gather: str = "float32") -> DistributedModel:
    """Lay `model`, the same on every process, over `group`; recompute:
    blocks keep only their input for the backward pass.

    The order is recomputation, then compilation (the caller's, of blocks), then distribution, each around the one
    before. Weights are cut between unit vectors, so that their lengths need no communication; see `cut`. gather: the
    format in which parts of blocks are gathered; gradients are summed in float32.
    """
    if recompute:
        model.runtime.run = recompute_block
    laid_out = _distributed(model, group, torch.bfloat16 if gather == "bfloat16" else None)
    if not any(router.balance == "loss" for _, router in routers(model)):
        return laid_out

    def whole(parts: int, forward: Callable[[], object]) -> AbstractContextManager[Any]:
        is_one = group.is_alone and parts == 1
        return nullcontext() if is_one else parts_of_batch(model, forward, group.summed)

    return replace(laid_out, whole=whole)


def _distributed(model: Decoder, group: Group, gather: torch.dtype | None) -> DistributedModel:
    if group.is_alone:
        return DistributedModel(model.loss, group.device)
    if group.mesh is None:
        devices = None if group.device.type == "cpu" else [group.device]
        loss = _Loss(model)
        # Buffers are what each process counts by itself, or the same everywhere because all do the same to them. The
        # argument that says so has one name before torch 2.13 and another after.
        own = [name for name, _ in loss.named_buffers()]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(loss, own)
        copied = DistributedDataParallel(loss, device_ids=devices)
        return DistributedModel(copied, group.device, lambda is_last: nullcontext() if is_last else copied.no_sync())
    return _sharded(model, group.device, group.mesh, gather)


def _sharded(model: Decoder, device: torch.device, mesh: DeviceMesh, gather: torch.dtype | None) -> DistributedModel:
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    axes = {id(module.weight): axis for _, module, axis in unit_modules(model)}
    blocks = [
        block for name, part in model.named_modules() if name.split(".")[-1] == "blocks" for block in part.children()
    ]
    own = MixedPrecisionPolicy(gather, torch.float32, cast_forward_inputs=False) if gather else MixedPrecisionPolicy()

    def placed(p: nn.Parameter) -> Any:
        return cut(p.shape, axes.get(id(p)), mesh.size(-1))

    for block in blocks:
        fully_shard(block, mesh=mesh, shard_placement_fn=placed, mp_policy=own)
    fully_shard(model, mesh=mesh, shard_placement_fn=placed)
    register_fsdp_forward_method(model, "loss")
    root: Any = model  # an `FSDPModule` by now
    return DistributedModel(model.loss, device, partial(_synchronized, root), root.reshard)


@contextmanager
def _synchronized(model: FSDPModule, is_last: bool) -> Iterator[None]:
    model.set_requires_gradient_sync(is_last)
    yield


class _Loss(nn.Module):
    """`Decoder.loss` as a forward pass, which is what `DistributedDataParallel` wraps."""

    def __init__(self, model: Decoder) -> None:
        super().__init__()
        self.model = model

    def forward(self, *batch: Tensor) -> Tensor:
        return self.model.loss(*batch)


def _first_and_second(block: nn.Module) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    return nullcontext(), uncounted(block)


def recompute_block(block: nn.Module, h: Tensor, around: Surroundings) -> Tensor:
    """Call a block that keeps only its arguments, and is called again in the backward pass,
    where nothing is counted.
    """
    contexts = partial(_first_and_second, block)
    after: Tensor = recomputed(block, h, around, use_reentrant=False, context_fn=contexts)
    return after
