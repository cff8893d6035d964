"""Which number format computes fast here, and compilation that falls back instead of failing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Literal

import torch
from torch import nn

from spherelm.errors import unknown
from spherelm.layers.mamba2 import StateSpace
from spherelm.models import Decoder
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
