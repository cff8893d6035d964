"""Tensors that are cut over processes: all that this package knows of torch's `DTensor`.

Every function takes a plain tensor too, which is its own whole and its own part. `torch.distributed.tensor` takes a
second to import, and there is no `DTensor` before it is imported; so it is looked up and never imported here,
but to cut a model.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, TypeGuard

from torch import Size, Tensor

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor, Shard


def is_sharded(x: Tensor) -> TypeGuard[DTensor]:
    """Whether `x` is a `DTensor`."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(x, module.DTensor)


def gathered(x: Tensor) -> Tensor:
    """`x`, whole: of a sharded tensor, gathered from all processes, which must all ask then."""
    return x.full_tensor() if is_sharded(x) else x


def own_part(x: Tensor) -> Tensor:
    """`x`, or of a sharded tensor the part that this process holds, as a plain tensor that shares its memory."""
    return x.to_local() if is_sharded(x) else x


def from_own_part(own: Tensor, like: Tensor) -> Tensor:
    """The tensor of which this process holds `own`, of the shape of `like` and cut as it is;
    the inverse of `own_part`.
    """
    if not is_sharded(like):
        return own
    mesh, placements = like.device_mesh, like.placements
    return type(like).from_local(own, mesh, placements, run_check=False, shape=like.shape, stride=like.stride())


def own_vectors(x: Tensor, axis: int) -> Tensor:
    """The whole vectors along `axis` that this process holds of `x`, as a plain tensor that shares its memory.

    Where `x` is cut across its vectors, `x` itself: what is computed of it is computed by all processes.
    """
    return (
        x
        if is_sharded(x) and any(getattr(placement, "dim", None) == axis for placement in x.placements)
        else own_part(x)
    )


def _is_cut_between_matrices(x: DTensor) -> bool:
    """Whether every process that holds some of a bank [matrices, rows, columns] holds whole matrices."""
    return x.ndim == 3 and not any(placement.is_shard(axis) for placement in x.placements for axis in (1, 2))


def whole_matrices(x: Tensor) -> Tensor:
    """`gathered(x)`; but of a bank [matrices, rows, columns] that is cut between its matrices, `own_part(x)`."""
    return own_part(x) if is_sharded(x) and _is_cut_between_matrices(x) else gathered(x)


def from_whole_matrices(x: Tensor, like: Tensor) -> Tensor:
    """`x`, which is as `whole_matrices(like)` is, cut as `like` is; the inverse of `whole_matrices`."""
    if not is_sharded(like) or _is_cut_between_matrices(like):
        return from_own_part(x, like)
    from torch.distributed.tensor import Replicate

    mesh, placements = like.device_mesh, like.placements
    return type(like).from_local(x, mesh, [Replicate()] * mesh.ndim, run_check=False).redistribute(mesh, placements)


def cut(shape: Size, unit_axis: int | None, parts: int) -> Shard:
    """How a weight is cut into so many parts: between whole unit vectors where that can be.

    Along the first axis that is not the unit one and divides evenly, which is FSDP's condition for all but axis 0:
    columns between columns, a bank between its experts. Else along axis 0.
    """
    from torch.distributed.tensor import Shard

    between = (axis for axis in range(len(shape)) if axis != unit_axis and shape[axis] % parts == 0)
    return Shard(0 if unit_axis is None else next(between, 0))
