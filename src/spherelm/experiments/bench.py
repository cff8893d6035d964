"""The cost of a training step on this machine: nGPT against GPT, and both against the hardware."""

from __future__ import annotations

import json
import multiprocessing
import resource
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from spherelm.counting import counted
from spherelm.errors import UserError
from spherelm.experiments.cost import StepCost, TimedSteps, measure_cost
from spherelm.layers.linear import retract
from spherelm.models import ARM_NAMES, ARMS, build
from spherelm.recipes import make_run
from spherelm.runs.config import RunConfig
from spherelm.third_parties import silence
from spherelm.train.counting import training_flops
from spherelm.train.diagnostics import data_sheet_flops, product_seconds
from spherelm.train.precision import best_device, device_name, name_of, resolve_dtype

MATMUL_SIZE = 4096
"""The peak is that of a product of two square matrices of this size, which is large enough for any hardware here."""


@dataclass(frozen=True)
class Shape:
    """A shape to time: `n_layers` of `d_model` in `n_heads` heads on `batch_size` sequences of `seq_len`
    from `vocab_size`.
    """

    n_layers: int
    d_model: int
    n_heads: int
    seq_len: int
    batch_size: int
    vocab_size: int


def parse_shape(text: str) -> Shape:
    """`Shape` from "layers,d_model,heads,sequence,batch,vocabulary"; raises `ValueError` for anything else."""
    parts = text.split(",")
    if len(parts) != 6 or not all(part.strip().isdecimal() and int(part) for part in parts):
        raise UserError(f"--shape takes six whole numbers L,D,H,T,B,V such as 6,384,6,512,8,8192; got {text!r}")
    return Shape(*map(int, parts))


def configs(
    shape: Shape, dtype: str, compiled: bool, pattern: str | None = None, recipe: str = "law"
) -> dict[str, RunConfig]:
    """A run of GPT and of nGPT at `shape`, or of both hybrids with the layers of `pattern`, the baseline first.

    Of the recipe, only the optimizer and the norm of queries and keys matter to a step's cost.
    """
    sizes: dict[str, Any] = {**asdict(shape), "steps": 1, "dtype": dtype, "compile": compiled}
    if pattern is not None:
        sizes["pattern"] = pattern
        del sizes["n_layers"]
    return {arm: make_run(arm, recipe=recipe, lr=1e-3, **sizes) for arm in ARMS}


def resolved(shape: Shape, dtype: str, pattern: str | None = None) -> str:
    """The number format that `dtype` comes to at `shape` on this machine, by name."""
    baseline = next(iter(configs(shape, dtype, compiled=False, pattern=pattern).values()))
    model = build(baseline.model).to(best_device())
    return name_of(resolve_dtype(dtype, model, shape.batch_size * shape.seq_len))


def matmul_rate(dtype: torch.dtype, size: int = MATMUL_SIZE) -> float:
    """The best of three products of [size, size] matrices, in floating point operations per second."""
    return 2 * size**3 / product_seconds(torch.randn(size, size, device=best_device()).to(dtype))


def peak_memory(config: RunConfig) -> float:
    """The most memory, in MiB, that two steps of a fresh process need beyond what it held before the model was made."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context, _set_threads, (torch.get_num_threads(),)) as pool:
        return pool.submit(_memory_of_two_steps, config).result()


def _set_threads(threads: int) -> None:
    silence()
    torch.set_num_threads(threads)


def _resident() -> float:
    """The most memory that this process has had resident so far, in MiB (Linux counts KiB, macOS bytes).

    On Linux not from `getrusage`, where a new process starts at the peak of the one that made it.
    """
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text(encoding="utf-8").splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) / (1 << 10)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << 20 if sys.platform == "darwin" else 1 << 10)


def _memory_of_two_steps(config: RunConfig) -> float:
    on_cpu, before = best_device().type == "cpu", _resident()
    steps = TimedSteps(config)
    for _ in range(2):
        steps.time_step()
    return _resident() - before if on_cpu else torch.accelerator.max_memory_allocated() / (1 << 20)


def median_seconds(action: Callable[[], object], repeats: int) -> float:
    """The median time that `action` takes, in seconds."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        action()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def retraction_seconds(config: RunConfig) -> float:
    """The median time that putting all weights of the model of `config` back on the sphere takes."""
    model = TimedSteps(config).model
    return median_seconds(lambda: retract(model), 9)


def bench(shape: Shape, dtype: str, compiled: bool, steps: int, pattern: str | None = None) -> dict[str, Any]:
    """Time `steps` steps of each arm in turn, and report them as `spherelm bench --json` does.

    step_time_ratio: nGPT / GPT, or the hybrids', the median over neighbouring steps. tokens_per_second, mfu (model
    FLOPs per second over the peak), peak_memory_mb: by arm. peak_gflops, peak_source: that of the data sheet where the
    device is known, else the measured rate of a large matrix product in the same number format, or of a
    step that was faster.
    retraction_share: of a step of the normalized arm. All figures are of this process's number of threads. pattern: as
    for `configs`.
    """
    device = best_device()
    dtype = resolved(shape, dtype, pattern)
    arms = configs(shape, dtype, compiled, pattern)
    baseline, normalized = arms
    cost: StepCost = measure_cost(arms[baseline], arms[normalized], steps)
    seconds = {baseline: cost.gpt_seconds, normalized: cost.ngpt_seconds}
    rate, tokens = matmul_rate(getattr(torch, dtype)), shape.batch_size * shape.seq_len
    reached = {arm: training_flops(arms[arm].model, shape.batch_size, shape.seq_len) / seconds[arm] for arm in arms}
    known = data_sheet_flops(device_name(device), getattr(torch, dtype))
    peak = max(known or rate, *reached.values())
    product = f"a product of two {MATMUL_SIZE} x {MATMUL_SIZE} matrices"
    uncompiled = configs(shape, dtype, compiled=False, pattern=pattern)
    return {
        "shape": {**asdict(shape), "n_layers": arms[baseline].model.n_layers},
        "pattern": pattern,
        "dtype": dtype,
        "compiled": compiled,
        "device": device.type,
        "threads": torch.get_num_threads(),
        "step_seconds": seconds,
        "step_time_ratio": cost.ratio,
        "tokens_per_second": {arm: tokens / seconds[arm] for arm in arms},
        "matmul_gflops": rate / 1e9,
        "peak_gflops": peak / 1e9,
        "peak_source": f"the data sheet of {device_name(device)}"
        if known
        else product
        if peak == rate
        else "the faster step",
        "mfu": {arm: reached[arm] / peak for arm in arms},
        "peak_memory_mb": {arm: peak_memory(uncompiled[arm]) for arm in arms},
        "retraction_share": retraction_seconds(uncompiled[normalized]) / cost.ngpt_seconds,
    }


def profile(config: RunConfig) -> str:
    """A table of where three steps of `config` spend their time, by torch's profiler."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as recording

    steps = TimedSteps(config)
    steps.time_step()
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if best_device().type == "cuda" else [])
    with recording(activities=activities) as recorded:
        for _ in range(3):
            steps.time_step()
    table: str = recorded.key_averages().table(sort_by="self_cpu_time_total", row_limit=25)
    return table


def bench_table(result: dict[str, Any]) -> str:
    """The result of `bench` for people."""
    shape, arms = result["shape"], list(result["step_seconds"])
    baseline, normalized = (ARM_NAMES[arm] for arm in arms)
    layers = "" if result["pattern"] is None else f" {result['pattern']}"
    lines = [
        f"{counted(shape['n_layers'], 'layer')}{layers}, d {shape['d_model']}, "
        f"{counted(shape['n_heads'], 'head')}, sequence {shape['seq_len']}, "
        f"batch {shape['batch_size']}, vocabulary {shape['vocab_size']}; {result['dtype']}, "
        f"{'compiled' if result['compiled'] else 'not compiled'}, {result['device']}, {counted(result['threads'], 'thread')}",
        f"{'':24}{baseline:>12}{normalized:>12}",
    ]
    for name, key, unit, digits in (
        ("step", "step_seconds", "s", 3),
        ("tokens per second", "tokens_per_second", "", 0),
        ("of the peak", "mfu", "", 3),
        ("peak memory", "peak_memory_mb", "MiB", 0),
    ):
        first, second = (result[key][arm] for arm in arms)
        lines.append(f"{name:24}{first:12,.{digits}f}{second:12,.{digits}f} {unit}".rstrip())
    lines += [
        f"A step of {normalized} takes {result['step_time_ratio']:.3f} times as long as one of {baseline}.",
        f"Peak: {result['peak_gflops']:,.0f} GFLOP/s ({result['peak_source']}).",
        f"Retraction: {100 * result['retraction_share']:.2f} % of a step of {normalized}.",
    ]
    return "\n".join(lines)


def write_result(result: dict[str, Any], path: Path) -> None:
    """Write the result as JSON."""
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
