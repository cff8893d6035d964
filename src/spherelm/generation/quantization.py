"""Weights in 8 bits by `torchao`, for inference: an int8 direction a vector and a float length that keeps it unit.

Rounding to int8 takes a unit vector off the sphere. Each vector has a step size of its own anyway, so the
length is put right exactly in the step size: `w = q / ||q||` for the int8 vector q. That needs one step size for each
unit vector, along the axis that the weight declares. For rows it multiplies the outputs, as in any int8 matrix product,
together with the learned scale of the row. For columns (the two `o` matrices) it multiplies the inputs.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spherelm import sphere
from spherelm.errors import UserError
from spherelm.generation.folding import Folded
from spherelm.layers.linear import Embedding, Linear
from spherelm.layers.low_precision import torchao
from spherelm.layers.moe import Router
from spherelm.layers.readout import scaled
from spherelm.models import Decoder


def int8_vectors(weight: Tensor, axis: int, unit: bool) -> tuple[Tensor, Tensor]:
    """A matrix as int8 vectors along `axis` (1: rows, 0: columns) and the step size of each,
    float32 [rows] or [columns].

    A vector's step size is its largest entry over 127.5 as torchao chooses it, or, if `unit`, one over its int8 length.
    """
    rows = weight.detach().float() if axis == 1 else weight.detach().float().T.contiguous()
    quantization = torchao("int8").quantization
    packed = quantization.Int8Tensor.from_hp(rows, quantization.PerRow())
    entries, steps = packed.qdata, packed.scale.flatten()
    if unit:
        steps = torch.linalg.vector_norm(entries.float(), dim=-1).clamp_min(sphere.TINY).reciprocal()
    return (entries if axis == 1 else entries.T.contiguous()), steps


class Int8Matrix(nn.Module):
    """Replacement of a `Linear` or an `Embedding`: int8 `entries` [rows, columns], and step sizes along one axis.

    The axis is the unit axis of what it stands for, 1 (a step size for each row) where that has none. `weight` is the
    matrix that these numbers mean, computed at each access.
    """

    entries: Tensor
    steps: Tensor

    def __init__(self, source: Linear | Embedding, renormalize: bool) -> None:
        super().__init__()
        self.role = source.role
        axis = getattr(source, "unit_axis", None)
        if axis is not None:
            self.unit_axis = axis
        self.axis: int = 1 if axis is None else axis
        entries, steps = int8_vectors(source.weight, self.axis, unit=renormalize and axis is not None)
        self.register_buffer("entries", entries)
        self.register_buffer("steps", steps)

    @property
    def weight(self) -> Tensor:
        """The matrix, float32 [rows, columns]."""
        return self.entries.float() * self.steps.unsqueeze(self.axis)


class Int8Linear(Int8Matrix):
    """A `Linear` of int8 entries; the product is computed in the dtype of its input."""

    def scaled_weight(self, scale: Tensor | None = None) -> Tensor:
        """As that of `Linear`: the scale [rows] and the step sizes of rows are one factor, applied after the product.

        An `Int8Tensor` of torchao; where the step sizes are those of columns, the matrix written out.
        """
        if self.axis == 0:
            return self.weight if scale is None else self.weight * scale.unsqueeze(-1)
        return self._with_row_factors(self.steps if scale is None else self.steps * scale)

    def _with_row_factors(self, factors: Tensor) -> Tensor:
        """The matrix that torchao multiplies by: the entries with row i times `factors[i]`."""
        packed: Tensor = torchao("int8").quantization.Int8Tensor(
            self.entries, factors.unsqueeze(-1), [1, self.entries.shape[1]], factors.dtype
        )
        return packed

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        """`scale * (x W^T)`, [..., columns] -> [..., rows]."""
        if self.axis == 1:
            return F.linear(x, self.scaled_weight(scale))
        factors = self.steps.new_ones(len(self.entries)) if scale is None else scale
        return F.linear(x * self.steps.to(x.dtype), self._with_row_factors(factors))


class Int8Embedding(Int8Matrix):
    """An `Embedding` of int8 entries."""

    def forward(self, tokens: Tensor) -> Tensor:
        """int64 [batch, seq] -> [batch, seq, d_model], float32."""
        return self.entries[tokens].float() * self.steps[tokens].unsqueeze(-1)


@torch.no_grad()
def quantized(model: Decoder, renormalize: bool = True) -> Decoder:
    """A copy of `model` for inference whose matrices and embeddings are int8.

    Vectors of one dimension stay as they are, and so do banks of experts and the routers that choose among them.

    renormalize: make every vector with a unit axis unit again, to the rounding of float32 (`departure` says
    how far). Quantize the model as it was trained: learned scales of rows join the step sizes, so folding them first
    saves nothing.
    Computes in float32, or in the compute dtype of its `runtime`. The copy can be neither trained nor saved as a
    checkpoint. Raises `ValueError` if torchao is missing, or for a model that has been folded.
    """
    if isinstance(model, Folded):
        raise UserError("a folded model has lost its unit vectors: quantize the model that it was made from")
    copied = copy.deepcopy(model).requires_grad_(False).eval()
    if hasattr(copied.head, "reading"):
        copied.head.reading = scaled  # preconditioning is about gradients
    for name, module in list(copied.named_modules()):
        owner, _, leaf = name.rpartition(".")
        if isinstance(module, Linear) and not isinstance(module, Router):
            setattr(copied.get_submodule(owner), leaf, Int8Linear(module, renormalize))
        elif isinstance(module, Embedding):
            setattr(copied.get_submodule(owner), leaf, Int8Embedding(module, renormalize))
    if model.head.linear.weight is model.embed.weight:
        head, embed = copied.head.linear, copied.get_submodule("embed")
        head.entries, head.steps = embed.entries, embed.steps
    return copied


def weight_bytes(model: nn.Module) -> int:
    """Memory that the weights of `model` take, in bytes; shared ones count once."""
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return sum(t.numel() * t.element_size() for t in tensors.values())
