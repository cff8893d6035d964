"""Measurements of a run besides its loss: update angles, learned scales, memory, MFU."""

from __future__ import annotations

import math
import resource
import sys
import time
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from spherelm import sphere
from spherelm.analysis.parts import layers_with
from spherelm.layers.linear import role_of, unit_modules, weight_of
from spherelm.layers.moe import routers
from spherelm.models import Decoder
from spherelm.runs.config import TrainConfig
from spherelm.sharding import gathered, own_part
from spherelm.train.counting import flops_per_token
from spherelm.train.precision import device_name


class UpdateAngles:
    """The angles in radians by which an update turned the unit vectors of a model, mean and largest of each role.

    Made before the step, it holds a copy of the unit weights until it is asked. Of sharded weights it measures the
    vectors of this process, which are whole where the unit axis is not cut.
    """

    @torch.no_grad()
    def __init__(self, model: nn.Module) -> None:
        self._before = [
            (role_of(module), module, axis, own_part(weight_of(module)).clone())
            for _, module, axis in unit_modules(model)
        ]

    @torch.no_grad()
    def measure(self) -> dict[str, dict[str, float]]:
        """`{"angle_mean": {role: radians}, "angle_max": {...}}`; empty for a model without unit weights."""
        by_role: dict[str, list[Tensor]] = {}
        for role, module, axis, before in self._before:
            by_role.setdefault(role, []).append(sphere.angle(before, own_part(weight_of(module)), dim=axis).flatten())
        if not by_role:
            return {}
        angles = {role: torch.cat(parts) for role, parts in by_role.items()}
        return {
            "angle_mean": {role: found.mean().item() for role, found in angles.items()},
            "angle_max": {role: found.max().item() for role, found in angles.items()},
        }


ALPHAS = {
    "attention": "alpha_A",
    "cross-attention": "alpha_C",
    "MLP": "alpha_M",
    "mixer": "alpha_mixer",
    "experts": "alpha_experts",
}
"""The names of each part's eigen learning rates in the log."""


@torch.no_grad()
def learned_scales(model: nn.Module) -> dict[str, Any]:
    """Mean effective `|alpha|` of the layers that have each part, and the mean of `s_z`; empty without them."""
    found: dict[str, Any] = {}
    for name, key in ALPHAS.items():
        scales = [sublayer.alpha for sublayer in layers_with(model, name).values() if hasattr(sublayer, "alpha")]
        if scales:
            found[key] = [_mean(scale.value, scale) for scale in scales]
    s_z: Any = getattr(model.head, "s_z", None)
    return found if s_z is None else {**found, "s_z": (gathered(s_z.value).mean() * s_z.init / s_z.scale).item()}


@torch.no_grad()
def load_by_layer(model: nn.Module) -> dict[str, list[float]]:
    """How evenly each mixture's experts were picked for the last update, mixture by mixture;
    empty for a model without them.

    load_max_by_layer: choices that fell on the busiest over the mean, 1 where all are alike. load_entropy_by_layer:
    entropy of the load over its largest, 1 where all are alike, 0 where one has everything. bias_range_by_layer: the
    largest bias less the smallest, in units of scores.
    """
    found: dict[str, list[float]] = {}
    for _, router in routers(model):
        largest, entropy = evenness(router.seen)
        spread = float(router.score_bias.max() - router.score_bias.min())
        for name, value in {"load_max": largest, "load_entropy": entropy, "bias_range": spread}.items():
            found.setdefault(f"{name}_by_layer", []).append(value)
    return found


def evenness(load: Tensor) -> tuple[float, float]:
    """`load_max` and `load_entropy`, as `load_by_layer` has them, of the choices int64 [n_experts] of one mixture."""
    load = load.to("cpu", torch.float64)
    part = load / load.sum().clamp_min(1)
    entropy = -torch.special.xlogy(part, part).sum() / math.log(max(len(part), 2))
    return float(part.max() * len(part)), float(entropy)


def load_of_experts(loads: Sequence[Tensor]) -> dict[str, float]:
    """`load_max` of the worst mixture and the mean `load_entropy` of the `loads` of mixtures, if there are any."""
    if not loads:
        return {}
    largest, entropies = zip(*map(evenness, loads), strict=True)
    return {"load_max": max(largest), "load_entropy": sum(entropies) / len(entropies)}


def _mean(value: Tensor, scale: Any) -> float:
    return (gathered(value).abs().mean() * scale.init / scale.scale).item()


def rates(optimizer: Optimizer) -> dict[str, float]:
    """The present learning rate of each role."""
    return {group["role"]: group["lr"] for group in optimizer.param_groups}


def peak_memory_mb(device: torch.device) -> float:
    """The most memory so far, in MiB: of this process on the CPU, of its tensors on an accelerator."""
    if device.type != "cpu":
        return torch.accelerator.max_memory_allocated() / 2**20
    # Linux counts in KiB, macOS in bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


@lru_cache
def matmul_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of the best of three products of square matrices on `device`,
    of a size that takes 5 ms or more.

    The peak that a run's `mfu` is a part of where the data sheet's is not known, until an update is faster. Measured
    once a process, in about 30 ms. It draws no random numbers.
    """
    size, seconds = 128, 0.0
    while seconds < 5e-3 and size < 8192:
        size *= 2
        seconds = product_seconds(torch.full((size, size), 0.5, device=device, dtype=dtype))
    return 2 * size**3 / seconds


def product_seconds(a: Tensor) -> float:
    """The seconds of the best of three products of the square matrix `a` with itself, after one more."""
    times = []
    for _ in range(4):
        start = time.perf_counter()
        torch.mm(a, a)
        if a.device.type != "cpu":
            torch.accelerator.synchronize()
        times.append(time.perf_counter() - start)
    return min(times[1:])


DATA_SHEETS = {"A100": 312.0, "H100 PCIe": 756.0, "H100": 989.0, "H200": 989.0, "L40S": 362.0}
"""Dense bfloat16 matrix products of GPUs by what their name contains, in 10^12 operations a second;
the first that fits.
"""


def data_sheet_flops(name: str, dtype: torch.dtype) -> float | None:
    """Operations a second of matrix products on the GPU `name`, `None` where its data sheet is not known here."""
    found = next((peak for part, peak in DATA_SHEETS.items() if part in name), None)
    return found * 1e12 if found and dtype == torch.bfloat16 else None


class Speed:
    """Turns tokens a second into `mfu`: the part of a device's peak that the model's operations use, never above 1.

    The peak is the data sheet's where the device is known, else the largest rate measured so far: of a matrix product
    at the start, or of an update that was faster. Operations are those that a dry run counts. devices: how many the
    tokens are spread over, each with the same peak.
    """

    def __init__(self, model: Decoder, train: TrainConfig, device: torch.device, devices: int = 1) -> None:
        self._flops_per_token, self._devices = flops_per_token(model, train.seq_len), devices
        dtype = model.runtime.compute_dtype or torch.float32
        known = data_sheet_flops(device_name(device), dtype)
        self._peak = known or matmul_flops(device, dtype)
        self._source = f"the data sheet of {device_name(device)}" if known else "the fastest measured here so far"

    def mfu(self, tokens_per_second: float) -> float:
        """Of a run that sees so many tokens a second."""
        rate = tokens_per_second * self._flops_per_token / self._devices
        self._peak = max(self._peak, rate)
        return rate / self._peak

    def peak(self) -> str:
        """The peak that `mfu` is relative to, in words."""
        return f"{self._peak / 1e12:,.3g} TFLOP/s a device, {self._source}"


class Diagnosis:
    """The effect of an update on a model, with its learned scales and rates;
    created before the update, read after it.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer) -> None:
        self._model, self._optimizer, self._angles = model, optimizer, UpdateAngles(model)

    def measure(self) -> dict[str, Any]:
        """`lr_by_role`, `angle_mean` and `angle_max` by role, `alpha_A`, `alpha_M` and the like by layer,
        `s_z`; what there is.

        Of experts what `load_by_layer` says.
        """
        found = {"lr_by_role": rates(self._optimizer), **self._angles.measure(), **learned_scales(self._model)}
        return found | load_by_layer(self._model)
