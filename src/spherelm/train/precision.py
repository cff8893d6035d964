"""Which number format computes fast here, formats of fewer bits, and compilation that falls back instead of failing."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Literal

import torch
from torch import nn

from spherelm.errors import UserError, unknown
from spherelm.layers.linear import ExpertLinear, Linear
from spherelm.layers.low_precision import BLOCKS, LowPrecisionProduct, Precision, by_groups, torchao
from spherelm.layers.mamba2 import StateSpace
from spherelm.models import Decoder, NGPTConfig
from spherelm.progress import say
from spherelm.train.rehearsal import known_dtype, matrices


def resolve_dtype(name: str, model: nn.Module, rows: int) -> torch.dtype:
    """The dtype of the computation that "auto", "float32" or "bfloat16" means for `model` on `rows` tokens at once.

    "auto" is, on a processor, in which the products of the model are faster; on a GPU bfloat16 where it has that in hardware.
    """
    if name != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]
    device = next(model.parameters()).device
    if device.type == "cpu":
        return known_dtype(matrices(model), rows)
    fast = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if fast else torch.float32


def name_of(dtype: torch.dtype) -> Literal["float32", "bfloat16"]:
    """As a configuration names what `resolve_dtype` gives."""
    return "bfloat16" if dtype == torch.bfloat16 else "float32"


def lower_precision(model: Decoder, precision: Precision, noise: torch.Generator) -> None:
    """Have every product with a matrix of the blocks of `model` rounded as `precision` says; noise: as there.

    Embeddings, read-out, routers, norms and the core of attention stay as they are. Raises `UserError` where torchao is
    missing, or for a matrix whose sides are not whole blocks of the format.
    """
    if precision.kind is None:
        return
    if precision.kind != "nvfp4":
        torchao(f"precision={precision.kind}")
    block = BLOCKS[precision.kind]
    joined = isinstance(model.config, NGPTConfig) and model.config.variant.inner_norm
    for name, module in model.named_modules():
        if not isinstance(module, Linear | ExpertLinear) or module.role != "matrix":
            continue
        rows, columns = module.weight.shape[-2:]
        if rows % block or columns % block:
            raise UserError(
                f"precision={precision.kind} takes {block} numbers at a time, and {name} is {rows} x {columns}: choose sizes "
                f"that are multiples of {block}"
            )
        on_sphere = hasattr(module, "unit_axis")
        product = LowPrecisionProduct(precision, on_sphere and (joined or not module.writes), on_sphere, noise)
        module.product = product if isinstance(module, Linear) else by_groups(product)


def seed_noise(noise: torch.Generator, *numbers: int) -> None:
    """Have `noise` draw what belongs to these numbers, whatever it drew before, so that a resumed run draws the same."""
    noise.manual_seed(int(hashlib.sha256(repr(numbers).encode()).hexdigest()[:15], 16))


def emulation(precision: Precision, dtype: str) -> list[str]:
    """The line that says what the products of a run are rounded to, and that this is emulated; none without a format."""
    if precision.kind is None:
        return []
    operands = [name for name in ("inputs", "weights", "gradients") if getattr(precision, name)]
    own = ""
    if precision.kind == "nvfp4":
        own = f"; amax {precision.amax}{', Hadamard transform' * precision.hadamard}"
        own += ", stochastic rounding" * (precision.stochastic and precision.gradients)
    return [
        f"{precision.kind} of {', '.join(operands) or 'nothing'}{own}: emulated, rounded and multiplied in {dtype}, which is "
        "slower than without; no torch.compile"
    ]


_CHOSEN: ContextVar[torch.device | None] = ContextVar("device", default=None)


def best_device() -> torch.device:
    """The device that was chosen by `on_device`; else the accelerator if there is one, else the CPU."""
    return _CHOSEN.get() or torch.accelerator.current_accelerator() or torch.device("cpu")


@contextmanager
def on_device(name: str | None) -> Iterator[None]:
    """Have `best_device` be the one of this name, such as "cpu" or "cuda:1", for as long as the context lasts.

    `None` changes nothing. Raises `UserError` where there is no such device.
    """
    if name is None:
        yield
        return
    there = torch.accelerator.current_accelerator()
    known = [
        "cpu",
        *([there.type, *(f"{there.type}:{i}" for i in range(torch.accelerator.device_count()))] if there else []),
    ]
    if name not in known:
        raise unknown("device", name, known)
    before = _CHOSEN.set(torch.device(name))
    try:
        yield
    finally:
        _CHOSEN.reset(before)


def device_name(device: torch.device) -> str:
    """The device's name: a GPU's model, else its type."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def leave_state_spaces_uncompiled(model: nn.Module) -> None:
    """Keep what a Mamba mixer does between its matrices out of compilation on a processor.

    What Inductor (torch 2.13, with g++ 12 and AVX512) writes for it computes garbage in 16 bits, where a kernel reads two tiles
    across their layout, and has been seen to write beyond its buffers. The mixer's matrices, norms and steps are compiled.
    """
    for module in model.modules():
        if isinstance(module, StateSpace) and module.A_log.device.type == "cpu":
            module.forward = torch.compiler.disable(module.forward)  # type: ignore[method-assign]


def compile_blocks(model: Decoder, trial: Callable[[], object]) -> None:
    """Compile each block of `model` in place, and its read-out: blocks share one compilation, a fraction of the whole's time.

    trial: uses the blocks once, which is when they are compiled. Where that fails, this says so on stderr and the process
    continues without compilation.
    """
    try:
        leave_state_spaces_uncompiled(model)
        for block in model.blocks:
            block.compile()
        model.head.compile()
        model.runtime.score = torch.compile(model.runtime.score)
        trial()
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        say(f"torch.compile does not work here ({reason}); continuing without it")
        torch.compiler.set_stance("force_eager")
