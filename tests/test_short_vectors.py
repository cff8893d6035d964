"""Vectors of zero and nearly zero length: what is made of them is finite, and so is every gradient, in every format."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from spherelm import sphere
from spherelm.layers.attention import Attention, UnitAttention
from spherelm.layers.feedforward import FeedForward, UnitFeedForward
from spherelm.layers.linear import Scale
from spherelm.layers.mamba2 import Mamba2, MambaShape, UnitMamba2
from spherelm.layers.moe import MixtureOfExperts, Router, UnitMixtureOfExperts
from spherelm.layers.rope import ROPES, rotary_table
from spherelm.models import GPTConfig, NGPTConfig, ScaleSpec, build
from spherelm.models.variants import STEPS
from spherelm.optim.retraction import attach_retraction

FORMATS = [torch.float16, torch.bfloat16, torch.float32]
LENGTHS = [0.0, 1e-45, 1e-30, 1e-13, 1e-11, 1e-7, 6e-5, 7e-5, 1e-3]
"""About the smallest numbers of each format, and about the length below which a vector counts as zero."""
D = 8
TABLE = rotary_table(torch.arange(3.0), D, 50.0)

UNIT: dict[str, Callable[[Tensor], Tensor]] = {
    "norm": sphere.norm,
    **{f"rotation, rope {name}": lambda x, rope=rope: rope.unit_rotation(x, TABLE) for name, rope in ROPES.items()},
    **{
        f"step, {name}": lambda x, step=step: step(x, x.flip(-1), torch.full((D,), 0.3)) for name, step in STEPS.items()
    },
}
"""Functions whose results are unit vectors, or zero."""
OTHERS: dict[str, Callable[[Tensor], Tensor]] = {
    **{f"plain rotation, rope {name}": lambda x, rope=rope: rope.rotation(x, TABLE) for name, rope in ROPES.items()},
    "slerp": lambda x: sphere.slerp(x, x.flip(-1), 0.3),
    "angle": lambda x: sphere.angle(x, x.flip(-1)),
}


def scale(*shape: int) -> Scale:
    return Scale(shape, 1.0, 1.0)


SHAPE = MambaShape(D, 2, 4, 4)
LAYERS: dict[str, Callable[[], nn.Module]] = {
    "attention": lambda: Attention(D, 1, 1),
    "unit attention": lambda: UnitAttention(D, 1, 1, scale(1, D)),
    "mlp": lambda: FeedForward(D, 16),
    "unit mlp": lambda: UnitFeedForward(D, 16, scale(16), scale(16)),
    "experts": lambda: MixtureOfExperts(D, 16, Router(D, 4, 2)),
    "unit experts": lambda: UnitMixtureOfExperts(D, 16, Router(D, 4, 2), scale(1), scale(4, 16), scale(4, 16)),
    "mamba": lambda: initialized(Mamba2(SHAPE)),
    "unit mamba": lambda: initialized(UnitMamba2(SHAPE, scale(1))),
}


def initialized(mixer: Any) -> nn.Module:
    mixer.ssm.init_weights()
    module: nn.Module = mixer
    return module


def vectors(length: float, dtype: torch.dtype) -> Tensor:
    """[2, 1, 3, 8] in different directions, the first of them zero, and all of about this length."""
    x = sphere.norm(torch.randn(2, 1, 3, D, dtype=torch.float64)) * length
    x[0, 0, 0] = 0
    return x.to(dtype).requires_grad_()


def pulled(out: Tensor, *inputs: Tensor) -> list[Tensor]:
    """The gradients of `inputs` from one of size 1 at every number of `out`."""
    grads = torch.autograd.grad(out, inputs, torch.ones_like(out), retain_graph=True, materialize_grads=True)
    return list(grads)


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("name", [*UNIT, *OTHERS])
def test_functions(name: str, dtype: torch.dtype) -> None:
    for length in LENGTHS if name != "angle" else [0.0]:  # an angle does depend on the lengths
        x = vectors(length, dtype)
        out = (UNIT | OTHERS)[name](x)
        (gradient,) = pulled(out, x)
        assert out.isfinite().all()
        assert gradient.isfinite().all(), length
        if name in UNIT:
            assert not gradient[0, 0, 0].any(), "of a zero vector"
            lengths = out.float().norm(dim=-1)
            assert ((lengths == 0) | ((lengths - 1).abs() < 1e-2)).all()


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("name", UNIT)
def test_functions_by_plain_operations(name: str, dtype: torch.dtype) -> None:
    """As torch.func sees them: the same numbers, to the last bit of the result."""
    for length in LENGTHS:
        x = vectors(length, dtype).detach()
        gradient, out = torch.func.grad(lambda x: ((out := UNIT[name](x)).sum(), out), has_aux=True)(x)
        assert torch.equal(out, UNIT[name](x))
        assert gradient.isfinite().all()
        assert not gradient[0, 0, 0].any()


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_between_zero_and_the_sphere(name: str, dtype: torch.dtype) -> None:
    layer = LAYERS[name]()
    for length in LENGTHS:
        h = vectors(length, dtype).detach().squeeze(1).requires_grad_()
        made = layer(h, TABLE) if "attention" in name else layer(h)
        for out in (made, sphere.norm(made)):
            assert out.isfinite().all()
            for gradient in pulled(out, h, *layer.parameters()):
                assert gradient.isfinite().all(), length


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("arm", ["gpt", "ngpt"])
def test_a_left_padded_batch_is_learned(arm: str, dtype: torch.dtype) -> None:
    """Attention's output at a position that sees nothing is exactly zero;
    its gradient must not stop the gradient scaler.
    """
    sizes: dict[str, Any] = {"vocab_size": 31, "n_layers": 2, "d_model": 32, "n_heads": 2, "max_seq_len": 16}
    model = build(GPTConfig(**sizes) if arm == "gpt" else NGPTConfig(**sizes, s_z=ScaleSpec(5.0)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    if arm == "ngpt":
        attach_retraction(optimizer, model)
    scaler = torch.amp.GradScaler("cpu")
    tokens, padding = torch.randint(31, (4, 12)), torch.zeros(4, 12, dtype=torch.bool)
    padding[1, :3] = padding[2, :7] = True
    mask = (torch.ones(12, 12, dtype=torch.bool).tril() & ~padding.unsqueeze(1)).unsqueeze(1)
    losses = []
    for _ in range(15):
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            loss = model.loss(tokens, tokens.roll(-1, 1), mask, ((~padding).cumsum(1) - 1).clamp_min(0))
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2
    assert scaler.get_scale() >= 1
