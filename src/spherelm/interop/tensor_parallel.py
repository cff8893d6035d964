"""Tensor parallelism: the matrices of a decoder cut over devices, for any loop that trains it by torch's own engines.

Matrices that read the hidden state are cut between their rows and those that write to it between their columns (Shoeybi
et al., arXiv 1909.08053). In nGPT these are the unit vectors: none is cut, and retraction needs no communication.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from spherelm.errors import UserError
from spherelm.layers.attention import Attention, UnitAttention
from spherelm.layers.feedforward import FeedForward, SquaredReLU, UnitFeedForward, UnitSquaredReLU
from spherelm.layers.linear import Linear, Scale
from spherelm.models import Decoder

ATTENTIONS = (Attention, UnitAttention)
MLPS = (FeedForward, SquaredReLU, UnitFeedForward, UnitSquaredReLU)


def tensor_parallel(model: Decoder, mesh: DeviceMesh) -> None:
    """Cut `model`, the same on every process, over the one axis of `mesh`, in place:
    every parameter becomes a `DTensor`.

    `model(tokens)` then gives logits that are cut along the vocabulary (`full_tensor()` gathers them); `model.loss` is
    for whole models. Call it before `fully_shard` on another axis, and before the optimizer is made. GPT and nGPT.

    Raises `UserError` for a model with other parts than attention and MLP, and for sizes that the mesh does not divide.
    """
    check(model, mesh.size())
    from torch.distributed.tensor import Replicate, Shard

    cut = _Cut(mesh)
    whole, first, last = Replicate(), Shard(0), Shard(-1)
    tied = model.head.linear.weight is model.embed.weight
    cut.module(model.embed, first, whole, whole)
    for sublayer in (sublayer for block in model.blocks for sublayer in block.children()):
        part: Any = sublayer.part
        for name, module in sublayer.named_children():
            if name != "part":  # alpha, or the baseline's norm
                cut.module(module, whole, None if isinstance(module, Scale) else whole, whole)
        cut.arguments(part, whole)
        for module in part.children():
            if isinstance(module, Linear):
                cut.module(
                    module,
                    last if module.writes else first,
                    last if module.writes else None,
                    whole if module.writes else last,
                )
            elif isinstance(module, Scale) and isinstance(part, ATTENTIONS):  # on queries, which are each process's own
                cut.module(module, first, None, first)
            elif isinstance(module, Scale):  # on rows of matrices
                cut.module(module, first)
            else:  # the baseline's norm of heads [batch, heads, seq, d_k]
                cut.module(module, whole, Shard(1), Shard(1))
        if isinstance(part, ATTENTIONS):
            part.n_heads, part.n_kv_heads = part.n_heads // mesh.size(), part.n_kv_heads // mesh.size()
    cut.arguments(model.head, whole)
    for name, module in model.head.named_children():
        cut.module(module, whole if name == "norm" else first)
    if tied:
        model.head.linear.weight = model.embed.weight


def check(model: Decoder, size: int) -> None:
    """Raise `UserError` if `tensor_parallel` cannot cut `model` into `size` parts."""
    config: Any = model.config
    parts = [sublayer.part for block in model.blocks for sublayer in block.children()]
    other = next((part for part in parts if not isinstance(part, (*ATTENTIONS, *MLPS))), None)
    if other is not None:
        raise UserError(
            f"tensor parallelism is for attention and MLP, and this model has {type(other).__name__}: use FSDP"
        )
    if config.arm == "ngpt" and (config.variant.inner_norm or config.logit_preconditioning):
        raise UserError("tensor parallelism is for nGPT without inner_norm and logit_preconditioning: use FSDP")
    for name, count in (("n_heads", config.n_heads), ("n_kv_heads", config.kv_heads), ("d_ff", config.ff_width)):
        if count % size:
            raise UserError(f"{name}={count} is not divided by {size} tensor-parallel processes: choose a divisor")


class _Cut:
    """Puts parameters on `mesh`, and makes of what modules take and give parts of tensors on it,
    and plain tensors again.
    """

    def __init__(self, mesh: DeviceMesh) -> None:
        self.mesh = mesh

    def module(self, module: nn.Module, parameters: Any, given: Any = None, made: Any = None) -> None:
        """Cut the parameters of `module`, say how its argument is cut, and make its result, cut so, a plain tensor."""
        from torch.distributed.tensor import Replicate, distribute_tensor

        for name, p in list(module.named_parameters(recurse=False)):
            placement = Replicate() if p.shape == (1,) else parameters  # a scale that is one number
            if parameters.is_shard(-1):
                placement = type(parameters)(p.ndim - 1)
            placed = distribute_tensor(p.detach(), self.mesh, [placement], src_data_rank=None)
            module.register_parameter(name, nn.Parameter(placed, requires_grad=p.requires_grad))
        if given is not None:
            self.arguments(module, given)
        if made is not None:
            module.register_forward_hook(self._plain(made))

    def arguments(self, module: nn.Module, placement: Any) -> None:
        """Say how the first argument of `module` is cut, or that every process has it whole."""

        def placed(_: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
            from torch.distributed.tensor import DTensor

            return (DTensor.from_local(arguments[0], self.mesh, [placement], run_check=False), *arguments[1:])

        module.register_forward_pre_hook(placed)

    def _plain(self, placement: Any) -> Callable[..., Tensor]:
        def plain(_: nn.Module, arguments: Any, result: Any) -> Tensor:
            local: Tensor = result.redistribute(placements=[placement]).to_local()
            return local

        return plain
