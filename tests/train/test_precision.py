"""A trained model in a smaller number format: weights and computation, how near, and how far off the sphere."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

from spherelm import departure, load_model, retract
from spherelm.generation.generate import generate
from spherelm.generation.samples import continuations
from spherelm.models import Decoder
from spherelm.train.trainer import train

HALVES = (torch.bfloat16, torch.float16)
VARIANTS: dict[str, dict[str, Any]] = {"plain": {}, "grouped": {"n_kv_heads": 1}, "tied": {"tie_embeddings": True}}
each_half = pytest.mark.parametrize("dtype", HALVES)


@pytest.fixture(scope="module")
def runs(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    """A run of two updates of each arm and variant.

    nGPT's rows start apart: of rows that start together nearly all is one direction, which moves all logits alike, so
    that after two updates rounding is large beside what tells the logits from each other. It is not in a trained model.
    """
    paths = {(arm, variant): tmp_path_factory.mktemp("half") / "run" for arm in tiny.ARMS for variant in VARIANTS}
    for (arm, variant), path in paths.items():
        apart = {"common_start": 0.0} if arm == "ngpt" else {}
        config = tiny.run_config(arm, data, steps=2, eval_every=0, d_model=32, **VARIANTS[variant], **apart)
        train(config, path, show_progress=False)
    return paths


def make_tokens(*shape: int) -> Tensor:
    return torch.randint(tiny.VOCAB, shape, generator=torch.Generator().manual_seed(5))


def relative_error(model: Decoder, exact: Decoder, tokens: Tensor) -> float:
    """Root mean square of the difference of the logits, over their standard deviation."""
    with torch.no_grad():
        expected = exact(tokens)
        return ((model(tokens).float() - expected).square().mean().sqrt() / expected.std()).item()


@each_half
@pytest.mark.parametrize("arm", tiny.ARMS)
@pytest.mark.parametrize("variant", list(VARIANTS))
def test_weights_and_computation_are_in_that_format(
    arm: str, variant: str, dtype: torch.dtype, runs: dict[tuple[str, str], Path]
) -> None:
    run, tokens = runs[arm, variant], make_tokens(2, 16)
    exact, half = load_model(run), load_model(run, dtype)
    for name, parameter in exact.named_parameters():
        assert half.get_parameter(name).equal(parameter.to(dtype)), "rounded once and left there"
    assert half(tokens).dtype == dtype
    assert (half.head.linear.weight is half.embed.weight) == (variant == "tied")
    error, of_the_weights = (relative_error(model, exact, tokens) for model in (half, load_model(run, dtype).float()))
    assert 1.05 * of_the_weights < error < 2 * torch.finfo(dtype).eps, "the weights' rounding, and the computation's"
    targets = make_tokens(2, 16).roll(1)
    assert half.loss(tokens, targets).item() == pytest.approx(
        exact.loss(tokens, targets).item(), abs=8 * torch.finfo(dtype).eps
    )
    assert generate(half, tokens[:, :4], 3, temperature=0).shape == (2, 7)


@each_half
def test_rounding_leaves_vectors_near_the_sphere_and_retraction_no_nearer(
    dtype: torch.dtype, runs: dict[tuple[str, str], Path]
) -> None:
    """Why a loaded model is not retracted: the corrected vector would be rounded again."""
    half, eps = load_model(runs["ngpt", "plain"], dtype), torch.finfo(dtype).eps
    before = departure(half)
    assert eps / 100 < before < eps
    retract(half)
    assert eps / 100 < departure(half) < eps
    assert departure(load_model(runs["gpt", "plain"], dtype)) == 0.0


def test_float32_stays_the_default(runs: dict[tuple[str, str], Path]) -> None:
    model = load_model(runs["ngpt", "plain"])
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert departure(model) < 1e-6


def test_float16_has_room_for_large_learned_scales(runs: dict[tuple[str, str], Path]) -> None:
    """float16 ends at 65504: effective values of 100 times what training reached here stay finite and right."""
    run, tokens = runs["ngpt", "plain"], make_tokens(2, 16)
    exact, half = load_model(run), load_model(run, torch.float16)
    with torch.no_grad():
        for model in (exact, half):
            model.head.s_z.value.mul_(100)
            for block in model.blocks:
                block.mlp.part.s_u.value.mul_(100)
                block.attention.part.s_qk.value.mul_(10)
    assert half(tokens).isfinite().all()
    assert relative_error(half, exact, tokens) < 0.02


def test_float16_survives_a_large_residual_stream(runs: dict[tuple[str, str], Path]) -> None:
    """GPT's hidden state has no bound; the square of 300 does not fit float16,
    so its RMSNorm must reduce in float32.
    """
    run, tokens = runs["gpt", "plain"], make_tokens(2, 16)
    exact, half = load_model(run), load_model(run, torch.float16)
    with torch.no_grad():
        for model in (exact, half):
            model.embed.weight.mul_(3000 / model.embed.weight.abs().max())
    assert half(tokens).isfinite().all()
    assert relative_error(half, exact, tokens) < 0.02


def test_int8_without_torchao_names_the_extra(
    runs: dict[tuple[str, str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(ValueError, match=r"pip install '\.\[quantize\]' in a clone of spherelm"):
        continuations(runs["gpt", "plain"], "ba", 1, 1, precision="int8")
