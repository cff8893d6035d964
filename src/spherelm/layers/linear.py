"""Weights, plain and on the sphere, and the one mechanism that keeps them there.

The module that owns a matrix declares once which side of it faces the hidden state: it reads the state, or it writes to
it (`writes`). On the sphere the unit axis follows (`unit_axis`): rows of a matrix that reads, columns of one that
writes. `retract` walks the modules and puts every weight with a unit axis back on the sphere. Module attributes survive
`fully_shard`, parameter attributes do not, which is why the declaration lives on the module.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spherelm import sphere
from spherelm.errors import UserError
from spherelm.layers.grouped import product_by_groups
from spherelm.sharding import is_sharded, own_vectors


def draw_weight(module: Any, std: float) -> None:
    """Draw the weight of `module` again, from N(0, std)."""
    nn.init.normal_(module.weight, std=std)


def scaled_rows(weight: Tensor, scale: Tensor | None) -> Tensor:
    """A weight [..., out_features, in_features] with each row times its `scale` [..., out_features],
    at its own precision.

    Folding a per-output scale into the rows costs a pass over the matrix instead of one over every token.
    """
    return weight if scale is None else weight * scale.unsqueeze(-1)


def folded_product(x: Tensor, weight: Tensor, scale: Tensor | None = None) -> Tensor:
    """`scale * (x W^T)` in the dtype of `x`, the scale [out_features] folded into the weight's rows."""
    return F.linear(x, scaled_rows(weight, scale).to(x.dtype))


def folded_groups(rows: Tensor, weight: Tensor, ends: Tensor, scale: Tensor | None = None) -> Tensor:
    """`folded_product` of the rows of each group, which end at `ends`, with the group's own matrix and scale."""
    return product_by_groups(rows, scaled_rows(weight, scale).to(rows.dtype), ends)


class Linear(nn.Linear):
    """A matrix product without bias: [..., in_features] -> [..., out_features], computed in the dtype of its input.

    The weight [out_features, in_features] keeps its own dtype (float32 while training) and is cast for the product.
    `role` names the optimizer group: "matrix", or "output_embedding" for the matrix that reads out logits. writes:
    whether the result is added to the hidden state; otherwise the input is the hidden state. `product` computes the
    result; it can be replaced by another function with its arguments, as `train.low_precision.lower_precision` does.
    """

    product: Callable[..., Tensor] = staticmethod(folded_product)
    start = draw_weight

    def __init__(self, in_features: int, out_features: int, role: str = "matrix", writes: bool = False) -> None:
        super().__init__(in_features, out_features, bias=False)
        self.role, self.writes = role, writes

    def scaled_weight(self, scale: Tensor | None = None) -> Tensor:
        """The weight with row i multiplied by `scale[i]`, at the weight's own precision."""
        return scaled_rows(self.weight, scale)

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        """`scale * (x W^T)`, with a scale [out_features] if there is one."""
        return self.product(x, self.weight, scale)


class UnitLinear(Linear):
    """A matrix without bias whose vectors along the hidden state are unit (nGPT, sections 2.3, 2.4).

        q = UnitLinear(128, 64)  # [..., 128] -> [..., 64], unit rows
        o = UnitLinear(64, 128, writes=True)  # [..., 64] -> [..., 128], unit columns

    It computes as `torch.nn.Linear`, in the dtype of its input. `retract` normalizes its vectors.

    Args:
        in_features: Size of the input's last dimension.
        out_features: Size of the output's last dimension.
        role: Optimizer group, "matrix" or "output_embedding".
        writes: The output is added to the hidden state. Otherwise the input is the hidden state.
    """

    def __init__(self, in_features: int, out_features: int, role: str = "matrix", writes: bool = False) -> None:
        super().__init__(in_features, out_features, role, writes)
        self.unit_axis = 0 if writes else 1


class ExpertLinear(nn.Module):
    """A matrix for each of `n_experts`, as one weight [n_experts, out_features, in_features], without bias.

    It keeps its own dtype and is cast to that of the input for the product, as in `Linear`; writes,
    `product`: as there.
    """

    role = "matrix"
    product: Callable[..., Tensor] = staticmethod(folded_groups)
    start = draw_weight

    def __init__(self, n_experts: int, in_features: int, out_features: int, writes: bool = False) -> None:
        super().__init__()
        self.writes = writes
        self.weight = nn.Parameter(torch.empty(n_experts, out_features, in_features))
        bound = 1 / math.sqrt(in_features)  # as nn.Linear
        nn.init.uniform_(self.weight, -bound, bound)

    def forward(self, rows: Tensor, ends: Tensor, scale: Tensor | None = None) -> Tensor:
        """[rows, in_features] -> [rows, out_features]: the rows of each expert, which end at `ends`, times its matrix.

        ends: int32 [n_experts], as for `grouped_product`. scale [n_experts, out_features] multiplies the results.
        """
        return self.product(rows, self.weight, ends, scale)


INNER_NORMS: Mapping[bool, Callable[[Tensor], Tensor]] = {True: sphere.norm, False: torch.positive}
"""What goes into a matrix that writes passes `Norm`, as FNGPT has it (arXiv 2605.06067),
or nothing (`Variant.inner_norm`).
"""


class UnitExpertLinear(ExpertLinear):
    """An `ExpertLinear` with unit vectors along the hidden state:
    each expert's rows if it reads, its columns if it writes.
    """

    def __init__(self, n_experts: int, in_features: int, out_features: int, writes: bool = False) -> None:
        super().__init__(n_experts, in_features, out_features, writes)
        self.unit_axis = 1 if writes else 2


class Embedding(nn.Embedding):
    """One vector a token: int64 [batch, seq] -> [batch, seq, d_model] (eq. 1)."""

    role = "input_embedding"
    start = draw_weight


class UnitEmbedding(Embedding):
    """A table of unit vectors, one per token (nGPT, section 2.1): int64 [batch, seq] -> [batch, seq, d_model].

    It takes the arguments of `torch.nn.Embedding`. `retract` normalizes its rows.
    """

    unit_axis = 1


FORMS = ("vector", "scalar", "fixed")
"""The forms of a learned scale."""


class Scale(nn.Module):
    """A learned scale (nGPT, section 2.5): stored at `scale`, and used as `value * init / scale`.

        alpha = Scale(128, init=0.05, scale=128**-0.5)
        h = sphere.step(h, proposal, alpha())

    An update of Adam moves the stored value by about the learning rate, and so the value in use by the rate times
    `init / scale`. A call without arguments returns the value in use.

    Args:
        shape: Shape of the value in use.
        init: Value in use at the start.
        scale: Value that is stored at the start, positive.
        form: "vector", a learned value for each entry; "scalar", one for all entries; "fixed", always `init` (Table 5).

    Raises:
        UserError: `scale` is not positive.
    """

    role = "scale"

    def __init__(self, shape: int | tuple[int, ...], init: float, scale: float, form: str = "vector") -> None:
        super().__init__()
        if not scale > 0:
            raise UserError(f"a learned scale must be stored at a positive value, got scale={scale}")
        self.init, self.scale = init, scale
        self.shape = (shape,) if isinstance(shape, int) else shape
        stored = self.shape if form == "vector" else (1,)
        self.value = nn.Parameter(torch.full(stored, float(scale)), requires_grad=form != "fixed")

    def start(self, std: float | None = None) -> None:
        """Back to the start, where the effective value is `init`, whatever weights are drawn from."""
        nn.init.constant_(self.value, self.scale)

    def forward(self) -> Tensor:
        """The effective value, of the shape that the scale was made with."""
        return (self.value * (self.init / self.scale)).expand(self.shape)


def weight_of(module: nn.Module) -> Tensor:
    """The weight of a module that `unit_modules` gives."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight


def role_of(module: nn.Module) -> str:
    """The role that such a module declares, else "matrix"."""
    return str(getattr(module, "role", "matrix"))


def block_matrices(model: nn.Module) -> Iterator[tuple[str, Linear | ExpertLinear]]:
    """The matrices of the blocks by name, each a module with a `weight`: no embedding, read-out or router."""
    for name, module in model.named_modules():
        if isinstance(module, Linear | ExpertLinear) and module.role == "matrix":
            yield name, module


def unit_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module, int]]:
    """Every module that declares a unit axis, as (name, module, axis), each weight once even if modules share it."""
    seen: dict[int, object] = {}  # the weights too: the identity of one that is gone may become another's
    for name, module in model.named_modules():
        axis = getattr(module, "unit_axis", None)
        if axis is not None and id(weight := module.weight) not in seen:
            seen[id(weight)] = weight
            yield name, module, axis


def retract(model: nn.Module) -> None:
    """Normalize the vectors of every unit weight of `model`, in place (nGPT, section 2.6).

    Lengths are computed in float32, of plain tensors and of DTensors. Vectors that are unit up to rounding stay bit for
    bit, so a second call changes nothing. A model without unit weights is left as it is.

    Args:
        model: Any module; its `UnitLinear`, `UnitEmbedding` and expert layers are normalized.
    """
    retract_weights((module.weight, axis) for _, module, axis in unit_modules(model))


@torch.no_grad()
def retract_weights(weights: Iterable[tuple[Any, int]]) -> None:
    """As `retract`, of weights with the axes along which their vectors are unit.

    What is between the lengths of a weight and its product with their factors is done of all weights at once: a GPU
    takes longer to begin an operation on a few thousand numbers than to carry it out.
    """
    alike: dict[tuple[Any, ...], list[tuple[Tensor, Tensor]]] = {}
    for weight, axis in weights:
        own = own_vectors(weight, axis)
        square = sphere.squared_length(own, dim=axis)
        if is_sharded(square):
            own.mul_(sphere.retraction_factor(square))
        else:
            alike.setdefault((square.dtype, square.device), []).append((own, square))
    for found in alike.values():
        flat = [square.flatten() for _, square in found]
        factors = sphere.retraction_factor(torch.cat(flat)).split([len(each) for each in flat])
        for (own, square), factor in zip(found, factors, strict=True):
            own.mul_(factor.view_as(square))


@torch.no_grad()
def departure(model: nn.Module) -> float:
    """Measure how far `model` is off the sphere: the largest `| ||w|| - 1 |` of any vector w of a unit weight.

    Returns:
        About 1e-7 for an nGPT in float32; 0.0 for a model without unit weights.
    """
    worst = 0.0
    for _, module, axis in unit_modules(model):
        lengths = torch.linalg.vector_norm(module.weight.cpu().to(torch.float64), dim=axis)
        worst = max(worst, (lengths - 1).abs().max().item())
    return worst
