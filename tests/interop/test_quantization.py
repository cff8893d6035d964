"""8-bit weights: what they mean, where they lie, and that the model computes with nothing else."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from configs import make_config
from torch import Tensor

from spherelm import departure, generate
from spherelm.generation.folding import folded
from spherelm.generation.quantization import Int8Linear, Int8Matrix, int8_vectors, quantized, weight_bytes
from spherelm.layers.linear import Embedding, Linear, unit_modules
from spherelm.models import Decoder, build

SHAPE: dict[str, Any] = {"vocab_size": 61, "n_layers": 2, "d_model": 48, "n_heads": 4, "d_ff": 96, "max_seq_len": 32}
VARIANTS: dict[str, dict[str, Any]] = {"plain": {}, "grouped": {"n_kv_heads": 2}, "tied": {"tie_embeddings": True}}
both_arms = pytest.mark.parametrize("arm", ["gpt", "ngpt"])
every_variant = pytest.mark.parametrize("variant", list(VARIANTS))


def make_model(arm: str, **fields: Any) -> Decoder:
    """A model whose vectors of one dimension are not all alike."""
    torch.manual_seed(3)
    model = build(make_config(arm, **{**SHAPE, **fields}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1 or "s_qk" in name:
                parameter.mul_(torch.empty_like(parameter).uniform_(0.5, 2.0))
    return model.eval()


def make_tokens(*shape: int) -> Tensor:
    return torch.randint(SHAPE["vocab_size"], shape, generator=torch.Generator().manual_seed(5))


def with_dequantized_weights(model: Decoder, packed: Decoder) -> Decoder:
    """`model` with the weights that the int8 numbers of `packed` mean."""
    plain = copy.deepcopy(model)
    for name, module in packed.named_modules():
        if isinstance(module, Int8Matrix):
            plain.get_submodule(name).weight.data = module.weight
    return plain


@pytest.mark.row("Number formats for inference")
@pytest.mark.parametrize("axis", [0, 1])
def test_each_vector_is_rounded_to_steps_of_its_own(axis: int) -> None:
    torch.manual_seed(0)
    spread = torch.logspace(-3, 2, 7)
    weight = torch.randn(7, 40) * spread.unsqueeze(1)
    weight = weight if axis == 1 else weight.T
    entries, steps = int8_vectors(weight, axis, unit=False)
    assert entries.dtype == torch.int8
    assert entries.shape == weight.shape
    torch.testing.assert_close(steps, weight.abs().amax(axis) / 127.5)
    error = (entries * steps.unsqueeze(axis) - weight).abs()
    assert (error <= 0.5001 * steps.unsqueeze(axis)).all()
    assert (error > 0.4 * steps.unsqueeze(axis)).any(), "else the bound says nothing"


def test_a_zero_vector_stays_zero() -> None:
    entries, steps = int8_vectors(torch.zeros(2, 8), 1, unit=True)
    assert (entries * steps.unsqueeze(1)).eq(0).all()


@every_variant
def test_dequantized_vectors_are_unit(variant: str) -> None:
    model = make_model("ngpt", **VARIANTS[variant])
    assert departure(quantized(model)) < 3e-7
    assert departure(quantized(model, renormalize=False)) > 1e-3, "what the int8 numbers alone come to"


def test_renormalization_keeps_every_direction() -> None:
    """So it is the nearest point of the sphere, and no second rounding."""
    model = make_model("ngpt")
    raw, unit = (dict(quantized(model, renormalize=r).named_modules()) for r in (False, True))
    checked = [(axis, raw[name].weight, unit[name].weight) for name, _, axis in unit_modules(model)]
    assert {axis for axis, _, _ in checked} == {0, 1}
    for axis, before, after in checked:
        torch.testing.assert_close(torch.nn.functional.normalize(before, dim=axis), after, rtol=1e-5, atol=1e-7)


@both_arms
@every_variant
def test_the_logits_are_those_of_the_dequantized_weights(arm: str, variant: str) -> None:
    model = make_model(arm, **VARIANTS[variant])
    packed, tokens = quantized(model), make_tokens(2, 20)
    expected = with_dequantized_weights(model, packed)(tokens).detach()
    torch.testing.assert_close(packed(tokens), expected, rtol=1e-5, atol=2e-5)
    error = (expected - model(tokens)).square().mean().sqrt() / expected.std()
    assert 1e-4 < error < 0.03
    targets = make_tokens(2, 20)
    plain_loss = with_dequantized_weights(model, packed).loss(tokens, targets)
    assert packed.loss(tokens, targets).item() == pytest.approx(plain_loss.item(), abs=1e-5)


def test_preconditioning_does_not_matter_for_inference() -> None:
    model, tokens = make_model("ngpt", logit_preconditioning=0.5), make_tokens(1, 9)
    packed = quantized(model)
    torch.testing.assert_close(
        packed(tokens), with_dequantized_weights(model, packed)(tokens).detach(), rtol=1e-5, atol=2e-5
    )


@both_arms
def test_nothing_large_is_left_in_float(arm: str) -> None:
    model = make_model(arm)
    packed = quantized(model)
    assert not [name for name, module in packed.named_modules() if isinstance(module, Linear | Embedding)]
    entries = sum(module.entries.numel() for module in packed.modules() if isinstance(module, Int8Matrix))
    assert entries == sum(p.numel() for name, p in model.named_parameters() if p.ndim == 2 and "s_qk" not in name)
    assert weight_bytes(packed) < 0.4 * weight_bytes(model)


def test_tied_embeddings_stay_one() -> None:
    packed = quantized(make_model("ngpt", tie_embeddings=True))
    assert packed.head.linear.entries.data_ptr() == packed.embed.entries.data_ptr()
    assert weight_bytes(packed) < weight_bytes(quantized(make_model("ngpt"))) - packed.embed.entries.numel() + 1


@both_arms
def test_the_model_itself_is_left_alone(arm: str) -> None:
    model, tokens = make_model(arm).train(), make_tokens(1, 7)
    before = model(tokens)
    packed = quantized(model)
    assert not packed.training
    assert not [name for name, parameter in packed.named_parameters() if parameter.requires_grad]
    assert model.training
    assert model(tokens).equal(before)
    before.sum().backward()


@both_arms
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_it_writes_text_in_any_compute_dtype(arm: str, dtype: torch.dtype) -> None:
    model, tokens = make_model(arm), make_tokens(2, 5)
    packed = quantized(model)
    exact = packed(tokens)
    packed.runtime.compute_dtype = dtype
    logits = packed(tokens)
    assert logits.dtype == dtype
    bound = 1e-6 if dtype == torch.float32 else 8 * torch.finfo(dtype).eps
    assert (logits.float() - exact).square().mean().sqrt() < bound * exact.std()
    assert generate(packed, tokens, 4, temperature=0).shape == (2, 9)


def test_matrices_of_columns_can_be_written_out() -> None:
    torch.manual_seed(1)
    source = make_model("ngpt").blocks[0].mlp.part.o
    packed, scale, x = Int8Linear(source, renormalize=True), torch.rand(48), torch.randn(3, 96)
    torch.testing.assert_close(packed(x, scale), x @ packed.scaled_weight(scale).T)
    torch.testing.assert_close(packed.scaled_weight(), source.weight, rtol=0, atol=3e-3)


def test_a_folded_model_is_refused() -> None:
    with pytest.raises(ValueError, match="quantize the model that it was made from"):
        quantized(folded(make_model("ngpt")))


def test_a_wrapped_model_generates_in_8_bits() -> None:
    transformers = pytest.importorskip("transformers")
    transformers.logging.set_verbosity_error()
    from spherelm.interop.huggingface import to_hf

    model, tokens = make_model("ngpt"), make_tokens(2, 5)
    hf = to_hf(model)
    hf.model = quantized(hf.model)
    torch.testing.assert_close(hf(tokens).logits, quantized(model)(tokens))
    written = hf.generate(tokens, max_new_tokens=4, do_sample=False)
    assert written.equal(generate(quantized(model), tokens, 4, temperature=0))


@both_arms
def test_a_hybrid_computes_with_the_weights_that_its_numbers_mean(arm: str) -> None:
    """Mixers and all; with gradients of the logits preconditioned, which reads them in another way."""
    more: dict[str, Any] = {"logit_preconditioning": 1.0} if arm == "ngpt" else {}
    model = make_model(arm, pattern="MA-O", n_layers=4, mamba_d_head=24, mamba_d_state=8, d_expert=32, **more)
    packed, tokens = quantized(model), make_tokens(2, 9)
    wanted = with_dequantized_weights(model, packed)(tokens)
    assert (packed(tokens) - wanted).abs().max() <= 1e-4 * wanted.abs().max()
    assert isinstance(packed.get_submodule("blocks.0.mixer.part.in_proj"), Int8Linear)
    assert departure(packed) < 1e-6
