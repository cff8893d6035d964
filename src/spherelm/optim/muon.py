"""Muon (Jordan et al., 2024) for block matrices, Adam for everything else, as one optimizer; and Muon on the sphere.

`torch.optim.Muon` computes in bfloat16 always, which most processors emulate at a hundredth of their speed, and takes
no DTensors; so the update stands here, twenty lines, tested against torch's. On the sphere the update is scaled so that
the rate is an angle. With Hyperball (arXiv 2606.16899) a plain matrix too keeps the Frobenius norm
that it started with.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from spherelm.errors import UserError
from spherelm.models.decoder import Decoder
from spherelm.optim.schedule import float32_rate
from spherelm.sharding import from_own_part, from_whole_matrices, own_part, whole_matrices

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic that pushes every singular value towards 1 (Jordan et al., 2024)."""

ITERATIONS = 5

SMALLEST_NORM = 1e-7
"""The norm below which a matrix is taken for zero."""

SMALL = 2**17
"""Entries up to which a processor orthogonalizes matrices of one shape together:
what is between products costs more there.
"""

TOGETHER = 2**27
"""Entries that an accelerator orthogonalizes together:
few operations are begun, and their copies take little memory.
"""


def product_dtype(model: nn.Module) -> torch.dtype:
    """The number format of the iteration: the model's compute format, where it is given.

    Else bfloat16, which is enough, on an accelerator, and float32 on a processor, since most emulate bfloat16 at a
    hundredth of their speed.
    """
    named = (module.runtime.compute_dtype for module in model.modules() if isinstance(module, Decoder))
    on_cpu = all(parameter.device.type == "cpu" for parameter in model.parameters())
    return next((dtype for dtype in named if dtype is not None), torch.float32 if on_cpu else torch.bfloat16)


def orthogonalized(g: Tensor, dtype: torch.dtype) -> Tensor:
    """Near `U V^T` for `g = U S V^T`: singular values between about 0.7 and 1.2,
    by `ITERATIONS` Newton-Schulz steps in `dtype`.

    g: [rows, columns] or [matrices, rows, columns]; the result has its shape, in `dtype`. A zero matrix stays zero.
    """
    a, b, c = COEFFICIENTS
    wide = g.shape[-2] <= g.shape[-1]
    x = (g if wide else g.mT).to(dtype)
    x = x if x.ndim == 3 else x.unsqueeze(0)
    if 2 * x.shape[-2] <= x.shape[-1] and torch.finfo(dtype).bits >= 32:
        x = _turning(x) @ x
    else:
        x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp_min(SMALLEST_NORM)
        for _ in range(ITERATIONS):
            gram = x @ x.mT
            x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x if wide else x.mT).reshape(g.shape)


def _turning(x: Tensor) -> Tensor:
    """The matrix that all steps together multiply x by, and its norm;
    computed from `x x^T`, so with few products of a wide x.

    Not in 16 bits, where the small eigenvalues of `x x^T` are rounding and each step needs x itself.
    """
    a, b, c = COEFFICIENTS
    gram = x @ x.mT
    square = gram.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None].clamp_min(SMALLEST_NORM**2)  # of the norm of x
    gram = gram / square
    turning: Tensor | None = None
    for step in range(ITERATIONS):
        factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        factor.diagonal(dim1=-2, dim2=-1).add_(a)
        turning = factor if turning is None else factor @ turning
        if step < ITERATIONS - 1:
            gram = factor @ (factor @ gram)
    assert turning is not None
    return turning * square.rsqrt()


def step_size(shape: torch.Size, unit_axis: int | None) -> float:
    """The factor of the rate for an orthogonalized update of this shape, [rows, columns] or a bank of such.

    Unit rows or columns: so that the rate is the root mean square angle, in radians, by which a vector turns (an
    orthogonal matrix has unit vectors along its shorter side only; with `ITERATIONS` steps it is 0.86 to 0.91 of it,
    for random gradients).
    Without a unit axis: `sqrt(max(1, rows/columns))` (Jordan et al.).
    """
    rows, columns = shape[-2:]
    return math.sqrt(max(1.0, columns / rows if unit_axis == len(shape) - 2 else rows / columns))


def hyperball_move(weight: Tensor, update: Tensor, angle: float) -> Tensor:
    """`R unit(W - angle R unit(u))`, where R is the Frobenius norm of W
    and unit divides by it (Hyperball, arXiv 2606.16899).

    weight, update: [rows, columns], or banks of such. A matrix of zeros stays zero. The norm is that of the start,
    since no move changes it.
    """
    radius, length = (torch.linalg.matrix_norm(x, keepdim=True) for x in (weight, update))
    moved = weight - angle * radius * update / length.clamp_min(SMALLEST_NORM)
    return moved * (radius / torch.linalg.matrix_norm(moved, keepdim=True).clamp_min(SMALLEST_NORM))


def at_once(shape: torch.Size, device: torch.device) -> int:
    """How many matrices [rows, columns] are orthogonalized together; a bank is many by itself."""
    if len(shape) != 2 or (device.type == "cpu" and shape.numel() > SMALL):
        return 1
    return sys.maxsize if device.type == "cpu" else max(1, TOGETHER // shape.numel())


class MuonAdamW(Optimizer):
    """Muon for the groups with `"muon": True`, torch's AdamW for the others, behind the interface of one optimizer.

    Both see the very groups and state of this object, so a schedule, a checkpoint or a hook needs to know nothing of
    it. A muon group holds matrices and banks of them only. Besides `lr` and `weight_decay` it has `momentum`,
    `unit_axes` (one for each of its parameters, `None` for a plain matrix) and `hyperball`: whether plain matrices keep
    their norm. Each matrix of a bank is orthogonalized by itself. Under sharding every process gathers a matrix to
    orthogonalize it; of a bank each does its own. dtype: in which it is orthogonalized.
    """

    def __init__(
        self, groups: list[dict[str, Any]], lr: float, betas: tuple[float, float], eps: float, fused: bool,
        dtype: torch.dtype = torch.float32,
    ) -> None:  # fmt: skip
        self._adam: AdamW | None = None
        self._fused, self._is_built, self.dtype = fused, False, dtype
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "muon": False, "weight_decay": 0.0})
        self._is_built = True
        self._share()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's; `ValueError` for a muon group with anything but matrices and banks of them."""
        super().add_param_group(param_group)
        if param_group["muon"]:
            plain = {"momentum": 0.95, "hyperball": False, "unit_axes": [None] * len(param_group["params"])}
            param_group |= {name: value for name, value in plain.items() if name not in param_group}
        if param_group["muon"] and any(p.ndim not in (2, 3) for p in param_group["params"]):
            self.param_groups.pop()
            raise UserError("Muon takes matrices only: leave its other parameters to Adam")
        if self._is_built:
            self._share()

    def __getstate__(self) -> dict[str, Any]:
        """The state for copies and pickles: torch's, and the fields of this class; Adam is created again."""
        return {**super().__getstate__(), "_adam": None, "_fused": self._fused, "_is_built": True, "dtype": self.dtype}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """As torch's, for both parts; `load_state_dict` calls it too."""
        super().__setstate__(state)
        self._share()

    def _share(self) -> None:
        """Let Adam work on this object's groups and state themselves."""
        rest = [group for group in self.param_groups if not group["muon"]]
        if rest and self._adam is None:
            self._adam = AdamW(
                rest, **{name: self.defaults[name] for name in ("lr", "betas", "eps")}, fused=self._fused
            )
        if self._adam is not None:
            for group in rest:
                group |= {name: value for name, value in self._adam.defaults.items() if name not in group}
            self._adam.param_groups = rest
            self._adam.state = self.state

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient; returns what `closure`, if given, returns."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        if self._adam is not None:
            self._adam.step()
        for group in self.param_groups:
            if group["muon"]:
                self._turn_all(group)
        return loss

    def _turn_all(self, group: dict[str, Any]) -> None:
        """Update the matrices of a muon group, those of one shape and axis together, as many as are taken at once."""
        alike: dict[tuple[Any, ...], list[Tensor]] = {}
        for parameter, axis in zip(group["params"], group["unit_axes"], strict=True):
            if parameter.grad is not None:
                alike.setdefault((parameter.shape, axis), []).append(parameter)
        for (shape, axis), found in alike.items():
            count = at_once(shape, found[0].device)
            for start in range(0, len(found), count):
                self._turn(found[start : start + count], axis, group)

    def _updates(self, parameters: list[Tensor], momentum: float) -> list[Tensor]:
        """The momentum's updates, whole: what is to be orthogonalized."""
        for parameter in parameters:
            if "momentum_buffer" not in self.state[parameter]:
                self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        gradients = [own_part(parameter.grad) for parameter in parameters]  # type: ignore[arg-type]
        averages = [own_part(self.state[parameter]["momentum_buffer"]) for parameter in parameters]
        torch._foreach_lerp_(averages, gradients, 1 - momentum)
        updates = torch._foreach_lerp(gradients, averages, momentum)  # Nesterov
        return [whole_matrices(from_own_part(one, like)) for one, like in zip(updates, parameters, strict=True)]

    def _turn(self, parameters: list[Tensor], axis: int | None, group: dict[str, Any]) -> None:
        """Decay and move parameters of one shape against their orthogonalized updates."""
        updates = self._updates(parameters, group["momentum"])
        turned = orthogonalized(updates[0] if len(updates) == 1 else torch.stack(updates), self.dtype)
        turned = turned.to(parameters[0].dtype).contiguous()  # operations on many tensors want them alike
        pairs = zip([turned] if len(updates) == 1 else turned.unbind(), parameters, strict=True)
        steps = [from_whole_matrices(one, parameter) for one, parameter in pairs]
        own = [own_part(parameter) for parameter in parameters]
        if group["weight_decay"]:
            torch._foreach_mul_(own, 1 - group["lr"] * group["weight_decay"])
        if group["hyperball"] and axis is None:
            for parameter, step in zip(parameters, steps, strict=True):
                parameter.copy_(hyperball_move(parameter, step, float32_rate(group["lr"])))
            return
        rate = float32_rate(group["lr"] * step_size(parameters[0].shape, axis))
        torch._foreach_add_(own, [own_part(step) for step in steps], alpha=-rate)
