"""Shapes and dtypes of the public functions, as jaxtyping annotations: one letter is one size throughout a call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import tiny
import torch
from configs import make_config
from torch import Tensor

from spherelm import Scale, UnitEmbedding, UnitLinear, build, generate, retract, sphere

jaxtyping = pytest.importorskip("jaxtyping", reason="needs the extra dev")
Float, Float32, Int64 = jaxtyping.Float, jaxtyping.Float32, jaxtyping.Int64

H, ALPHA, ONE = Float[Tensor, "*batch d"], Float32[Tensor, "d"], Float32[Tensor, ""]
OF_ANGLES, OF_FACTORS = Float[Tensor, "*batch"], Float32[Tensor, "*batch 1"]
TOKENS = Int64[Tensor, "batch seq"]

SPHERE: dict[str, tuple[Callable[..., Any], list[Any], Any]] = {
    "norm": (sphere.norm, [H], H),
    "squared_length": (lambda w: sphere.squared_length(w, -1), [Float32[Tensor, "*batch d"]], OF_FACTORS),
    "step": (sphere.step, [H, H, ALPHA], H),
    "riemannian_step": (sphere.riemannian_step, [H, H, ALPHA], H),
    "slerp": (lambda a, b: sphere.slerp(a, b, 0.3), [H, H], H),
    "tangent": (sphere.tangent, [H, H], H),
    "angle": (sphere.angle, [H, H], OF_ANGLES),
    "capped_move": (lambda a, b: sphere.capped_move(a, b, 0.1), [H, H], H),
}
"""Each function of vectors: how it is called, what it takes, and what it gives."""


def assert_shapes(function: Callable[..., Any], given: list[Tensor], kinds: list[Any], result: Any) -> None:
    """The arguments and the result of a call are of these kinds, their letters bound together."""
    with jaxtyping.jaxtyped("context"):
        for value, kind in zip(given, kinds, strict=True):
            assert isinstance(value, kind), (value.shape, kind)
        found = function(*given)
        assert isinstance(found, result), (found.shape, found.dtype, result)


@pytest.mark.parametrize("name", SPHERE)
@pytest.mark.parametrize("shape", [(4,), (1, 1), (2, 3, 8)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_functions_on_the_sphere(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    function, kinds, result = SPHERE[name]
    given = [torch.rand(shape[-1:]) if kind is ALPHA else torch.randn(shape).to(dtype) for kind in kinds]
    given = [value if kind is ALPHA else sphere.norm(value) for value, kind in zip(given, kinds, strict=True)]
    if name == "squared_length":
        given = [value.float() for value in given]
    assert_shapes(function, given, kinds, result)
    if dtype == torch.bfloat16 and result is H:
        assert function(*given).dtype == dtype


@pytest.mark.parametrize("shape", [(5,), (1, 5), (2, 3, 5)], ids=str)
def test_layers(shape: tuple[int, ...]) -> None:
    read, written = UnitLinear(5, 7), UnitLinear(5, 7, writes=True)
    for layer in (read, written):
        assert_shapes(layer, [torch.randn(shape)], [Float[Tensor, "*batch 5"]], Float[Tensor, "*batch 7"])
    assert_shapes(UnitEmbedding(9, 5), [torch.zeros(2, 3, dtype=torch.int64)], [TOKENS], Float32[Tensor, "batch seq 5"])
    assert_shapes(Scale((2, 3), 1.0, 0.1), [], [], Float32[Tensor, "2 3"])
    before = read.weight.detach().clone()
    retract(read)
    assert_shapes(lambda w: read.weight, [before], [Float32[Tensor, "out in"]], Float32[Tensor, "out in"])


@pytest.mark.parametrize("arm", tiny.ARMS)
@pytest.mark.parametrize(("batch", "seq"), [(1, 1), (3, 5)])
def test_models(arm: str, batch: int, seq: int) -> None:
    model = build(make_config(arm, vocab_size=11, n_layers=1, d_model=8, n_heads=2, max_seq_len=16))
    tokens = torch.randint(11, (batch, seq))
    assert_shapes(model, [tokens], [TOKENS], Float32[Tensor, "batch seq 11"])
    assert_shapes(model.loss, [tokens, tokens], [TOKENS, TOKENS], ONE)
    assert_shapes(lambda t: generate(model, t, 4), [tokens], [TOKENS], Int64[Tensor, "batch seq+4"])
    model.runtime.compute_dtype = torch.bfloat16
    assert_shapes(model, [tokens], [TOKENS], jaxtyping.BFloat16[Tensor, "batch seq 11"])
