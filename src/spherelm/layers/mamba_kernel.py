"""The fused kernel of the `mamba_ssm` package for `state_space.chunked`,
where the package is installed and there is a GPU.

Its call is tested with a stand-in; it was neither run nor timed here.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from spherelm.layers.state_space import Scanned, chunked
from spherelm.sphere import transformed


@lru_cache
def kernel() -> Callable[..., Any] | None:
    """`mamba_chunk_scan_combined`, or `None` where mamba_ssm is not installed."""
    try:
        from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined
    except ImportError:
        return None
    found: Callable[..., Any] = mamba_chunk_scan_combined
    return found


def fused(
    x: Tensor,
    dt: Tensor,
    rate: Tensor,
    b: Tensor,
    c: Tensor,
    state: Tensor,
    chunk_size: int,
    begins: Tensor | None = None,
) -> Scanned:
    """`chunked` by the kernel, with the same arguments and result."""
    scan = kernel()
    assert scan is not None
    # The state from before belongs to the text numbered 0: a row that begins with a new one starts at 1.
    text = None if begins is None else begins.cumsum(1).to(torch.int32)
    y, last = scan(
        x,
        dt,
        rate,
        b,
        c,
        chunk_size=chunk_size,
        initial_states=state,
        seq_idx=text,
        return_final_states=True,
    )
    return _KernelResult.apply(y, last.to(state.dtype))


class _KernelResult(torch.autograd.Function):
    """Hands on what it is given; its backward pass refuses to be differentiated,
    for the kernel's would count as constant.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, state: Tensor) -> Scanned:
        return y.view_as(y), state.view_as(state)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, ...]:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError(
                "the kernel of mamba_ssm has no second derivatives: give every StateSpace of the model the plain scan, "
                "ssm.scan = spherelm.layers.state_space.chunked"
            )
        return grad_outputs


def scan(
    x: Tensor,
    dt: Tensor,
    rate: Tensor,
    b: Tensor,
    c: Tensor,
    state: Tensor,
    chunk_size: int,
    begins: Tensor | None = None,
) -> Scanned:
    """`fused` where it can run, and not under torch.func, else `chunked`; arguments and result are theirs."""
    compute = fused if x.is_cuda and kernel() is not None and not transformed() else chunked
    return compute(x, dt, rate, b, c, state, chunk_size, begins)
