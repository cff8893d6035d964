"""What this machine can do, and whether it does it right: the checks of `spherelm doctor`.

Where a check compares two ways to compute, it does so on a small model of each arm, of the sizes `SIZES`.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from spherelm.counting import counted
from spherelm.errors import UserError
from spherelm.experiments.bench import MATMUL_SIZE, matmul_rate
from spherelm.experiments.jobs import cores
from spherelm.models import ARM_NAMES, ARMS, build
from spherelm.recipes import make_run
from spherelm.runs.config import RunConfig
from spherelm.runs.metrics import read_metrics
from spherelm.runs.record import versions
from spherelm.train.diagnostics import data_sheet_flops
from spherelm.train.estimate import memory_of
from spherelm.train.opening import gibibytes
from spherelm.train.parallel import backend_of
from spherelm.train.precision import best_device, compile_parts, device_name, name_of, resolve_dtype
from spherelm.train.rehearsal import processor
from spherelm.train.threads import threads, threads_for

SIZES = {"n_layers": 2, "d_model": 64, "n_heads": 2, "seq_len": 256, "batch_size": 2, "vocab_size": 256, "lr": 1e-3}
LIMITS = {torch.float32: 1e-3, torch.bfloat16: 0.5}
"""How far a tensor computed in a format may be from float32's, of its length: rounding is less, and garbage is more.

In bfloat16 the small gradients of a fresh nGPT's queries and keys are off by 0.2.
"""

SIZE_ON_CPU = 1024
"""As `MATMUL_SIZE`, where a processor that emulates bfloat16 multiplies it in seconds."""

FREE = 2**30
"""Bytes that must be free where runs are written."""

SECONDS = 300
"""How long a run of the check may take."""


class NotThere(Exception):
    """The machine has nothing that a check could look at."""


@dataclass(frozen=True)
class CheckResult:
    """The result of a check. state: "ok", "failed" or "not there". fix: what to do where it failed.
    trace: where it did.
    """

    name: str
    state: str
    text: str
    fix: str = ""
    trace: str = ""

    def lines(self) -> str:
        """For a person, and for an issue."""
        told = f"{self.name:20}{self.state:11}{self.text}"
        return told + "".join(f"\n    {line}" for line in self.trace.splitlines())


def software() -> str:
    """Versions of what numbers depend on."""
    return ", ".join(f"{name} {number}" for name, number in versions().items())


def optional() -> str:
    """Versions of the libraries of the optional sets, and the names of those that are not installed."""
    of_sets = re.findall(
        r"^(?!spherelm)([\w-]+).*extra == \"(?!dev|dist|docs)", "\n".join(requires("spherelm") or []), re.M
    )
    there: list[str] = []
    lacking: list[str] = []
    for name in dict.fromkeys(of_sets):
        try:
            there.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            lacking.append(name)
    return "; not there: ".join(", ".join(names) for names in (there or ["none"], lacking) if names)


def device() -> str:
    """What computes, and its memory."""
    found = best_device()
    if found.type == "cpu" and shutil.which("nvidia-smi"):
        raise UserError(f"nvidia-smi is there, and torch {torch.__version__} sees no GPU")
    size = memory_of(found)
    memory = "memory unknown" if size is None else gibibytes(size)
    if found.type == "cpu":
        return f"{processor().splitlines()[0].partition(': ')[2] or processor()}, {counted(cores(), 'core')}, {memory}"
    return f"{torch.accelerator.device_count()} x {device_name(found)}, {memory}"


def disk() -> str:
    """Room where this command was started."""
    free, here = shutil.disk_usage(".").free, Path.cwd()
    if free < FREE:
        raise UserError(f"{gibibytes(free)} free in {here}")
    return f"{gibibytes(free)} free in {here}"


def run_of(arm: str, **fields: Any) -> RunConfig:
    """A run of the demo's size, or with other `fields`."""
    return make_run(arm, **{"vocab_size": 4096, "steps": 1, "lr": 1e-3, **fields})


def fast_format() -> torch.dtype:
    """What `--dtype auto` is for the demo."""
    config = run_of("ngpt")
    rows = config.train.batch_size * config.train.seq_len
    return resolve_dtype("auto", build(config.model).to(best_device()), rows)


def formats() -> str:
    """Rates of matrix products in each number format, and how near bfloat16 computes to float32."""
    there = best_device()
    rates = {
        name_of(one): matmul_rate(one, SIZE_ON_CPU if there.type == "cpu" else MATMUL_SIZE) / 1e12 for one in LIMITS
    }
    told = ", ".join(f"{name} {rate:.3g}" for name, rate in rates.items())
    sheet = data_sheet_flops(device_name(there), torch.bfloat16)
    known = f" (data sheet: {sheet / 1e12:.0f})" if sheet else ""
    error = apart(torch.bfloat16, lambda arm: results(arm, there, torch.bfloat16), lambda arm: results(arm, there))
    return f"TFLOP/s of products: {told}{known}; --dtype auto is {name_of(fast_format())}; bfloat16: {error}"


def processor_threads() -> str:
    """How many threads a run computes on, as the checks from here on do."""
    if best_device().type != "cpu":
        raise NotThere("a GPU computes")
    config, limit = run_of("ngpt"), torch.get_num_threads()
    model = build(config.model)
    model.runtime.compute_dtype = fast_format()
    tuner = threads_for(model, config.train.batch_size * config.train.seq_len)
    return f"{1 if tuner is None else tuner.count} of {limit}, the fastest now"


def attention() -> str:
    """The kernel that torch takes for causal attention in each number format."""
    told = []
    for one in LIMITS:
        q = torch.zeros(1, 2, 256, 64, dtype=one, device=best_device())
        kind = SDPBackend(torch._fused_sdp_choice(q, q, q, is_causal=True))
        told.append(f"{kind.name.lower()} in {name_of(one)}")
    return ", ".join(told)


def results(
    arm: str, place: torch.device, dtype: torch.dtype | None = None, compiled: bool = False
) -> dict[str, Tensor]:
    """Logits of a small model of `arm` and the gradients of its loss, computed at `place`; as float32 on the CPU."""
    torch.manual_seed(0)
    config = run_of(arm, **SIZES)
    model, tokens = build(config.model).to(place), torch.randint(SIZES["vocab_size"], (2, 257)).to(place)  # type: ignore
    model.runtime.compute_dtype = dtype
    if compiled:
        compile_parts(model)
    model.loss(tokens[:, :-1], tokens[:, 1:]).backward()
    with torch.no_grad():
        found = {"logits": model(tokens[:, :-1])}
    found |= {f"gradient of {name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: tensor.float().cpu() for name, tensor in found.items()}


def apart(
    dtype: torch.dtype, one: Callable[[str], dict[str, Tensor]], other: Callable[[str], dict[str, Tensor]]
) -> str:
    """The difference of two ways to compute what `results` gives, in words;
    `UserError` where one is above the limit.
    """
    worst, limit = {"logits": 0.0, "gradients": 0.0}, LIMITS[dtype]
    for arm in ARMS:
        first, second = one(arm), other(arm)
        for name, tensor in second.items():
            error = float((first[name] - tensor).norm() / tensor.norm())
            if not error <= limit:
                raise UserError(f"{ARM_NAMES[arm]}'s {name} is off by {error:.1e} of its length, more than {limit:g}")
            kind = "logits" if name == "logits" else "gradients"
            worst[kind] = max(worst[kind], error)
    return f"logits off by up to {worst['logits']:.0e}, gradients by {worst['gradients']:.0e}"


def compilation() -> str:
    """Blocks through torch.compile, in the fast format, against float32 without."""
    there, dtype = best_device(), fast_format()
    try:
        error = apart(dtype, lambda arm: results(arm, there, dtype, True), lambda arm: results(arm, there))
    finally:
        torch.compiler.reset()
    return f"works in {name_of(dtype)}; from uncompiled float32: {error}"


def against_the_cpu() -> str:
    """The device's float32 against the CPU's."""
    there, cpu = best_device(), torch.device("cpu")
    if there == cpu:
        raise NotThere("the CPU is the device")
    error = apart(torch.float32, lambda arm: results(arm, there), lambda arm: results(arm, cpu))
    return f"GPT and nGPT in float32: {error}"


@cache
def trained(processes: int, place: str) -> list[dict[str, Any]]:
    """The metrics of a short run of nGPT by so many processes on devices of the kind `place`; it is gone afterwards."""
    many = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else []
    with TemporaryDirectory(prefix=".spherelm-doctor-", dir=".") as folder:
        words = ["train", "--arm", "ngpt", "--preset", "0.3m", "--steps", "20", "--no-compile", "--dtype", "float32"]
        words += ["--device", place, "--strategy", "shard", "--timeout", "60", "--out", f"{folder}/run", "--quiet"]
        command = [sys.executable, *many, "-m", "spherelm", *words]
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
        if done.returncode:
            said = [line for line in done.stderr.splitlines() if line.startswith("spherelm: ")]
            raise UserError(said[-1] if said else done.stderr.strip()[-2000:] or f"exit code {done.returncode}")
        return read_metrics(Path(folder) / "run" / "metrics.jsonl")


def losses(metrics: list[dict[str, Any]]) -> list[float]:
    """Those of a run's validations."""
    return [record["loss"] for record in metrics if record["kind"] == "val"]


def training() -> str:
    """A short run on the device, with its checkpoint."""
    metrics = trained(1, best_device().type)
    first, *_, last = losses(metrics)
    if not last < first:
        raise UserError(f"20 updates took the validation loss from {first:.3f} to {last:.3f}")
    speed = max(record["tokens_per_second"] for record in metrics if record["kind"] == "train")
    return f"20 updates of 0.3m: validation loss {first:.3f} to {last:.3f}, {speed:,.0f} tokens/s"


def processes() -> str:
    """The same run by two processes, sharded, ends with the same loss:
    over NCCL where there are two GPUs, else over gloo.
    """
    place = best_device().type if torch.accelerator.device_count() > 1 else "cpu"
    ends = [losses(trained(count, place))[-1] for count in (1, 2)]
    if not abs(ends[0] - ends[1]) < 1e-3:
        raise UserError(f"one process ends at a loss of {ends[0]:.4f}, two at {ends[1]:.4f}")
    backend = backend_of(torch.device(place))
    return f"two, sharded, on {place} by {backend}: the loss of one to {abs(ends[0] - ends[1]):.0e}"


CHECKS: dict[str, tuple[Callable[[], str], str]] = {
    "versions": (software, "install spherelm again in a new environment"),
    "optional libraries": (optional, "install spherelm again in a new environment"),
    "device": (device, "install the torch for your CUDA: https://pytorch.org/get-started"),
    "disk": (disk, "make room, or work in another directory"),
    "threads": (processor_threads, "train with --threads 1"),
    "number formats": (formats, "train with --dtype float32"),
    "attention": (attention, "install torch again: https://pytorch.org/get-started"),
    "torch.compile": (compilation, "train with --no-compile, or install a C++ compiler (g++) and the Python headers"),
    "device and CPU": (against_the_cpu, "train with --device cpu, and report it"),
    "training": (training, "see the lines below training, and report them"),
    "processes": (processes, "train with one process; for several, see the lines below processes"),
}
"""Each check, and what to do where it fails."""


def examine() -> Iterator[CheckResult]:
    """Make every check, one after the other; a check that fails does not keep others from being made."""
    trained.cache_clear()
    with threads(torch.get_num_threads()):
        for name, (check, fix) in CHECKS.items():
            yield made(name, check, fix)


def made(name: str, check: Callable[[], str], fix: str) -> CheckResult:
    """The result of one check. Whatever it raises is what is wrong with the machine."""
    try:
        return CheckResult(name, "ok", check())
    except NotThere as reason:
        return CheckResult(name, "not there", str(reason))
    except UserError as error:
        return CheckResult(name, "failed", str(error), fix)
    except Exception as error:
        line = next(iter(str(error).splitlines()), "")
        return CheckResult(name, "failed", f"{type(error).__name__}: {line}", fix, traceback.format_exc(limit=-4))


def verdict(found: Iterable[CheckResult]) -> str:
    """One line about all of it."""
    failed = [one for one in found if one.state == "failed"]
    if not failed:
        return f"ready: GPT and nGPT train on {device_name(best_device())}"
    return "not ready: " + "; ".join(f"{one.name} failed: {one.fix}" for one in failed)


def record(found: Iterable[CheckResult]) -> dict[str, Any]:
    """All of it as JSON."""
    found = list(found)
    return {"verdict": verdict(found), "versions": versions(), "checks": [asdict(one) for one in found]}
