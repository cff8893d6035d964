"""Other positions for trained models, against transformers' Llama, which has the baseline's architecture."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from spherelm.evaluate.positions import Positions, parse_positions, place
from spherelm.layers.rope import yarn
from spherelm.models import GPT, Decoder, GPTConfig, NGPTConfig, build

SIZES: dict[str, Any] = {"vocab_size": 41, "n_layers": 2, "d_model": 32, "n_heads": 2, "d_ff": 48, "max_seq_len": 64}


def llama(model: GPT, scaling: dict[str, Any]) -> LlamaForCausalLM:
    """Transformers' model with the weights of ours, and its own implementation of `scaling`."""
    config = LlamaConfig(
        vocab_size=41,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=256,
        rms_norm_eps=1e-6,
        tie_word_embeddings=False,
        rope_parameters=scaling,
    )
    parts = {"attention.norm": "input_layernorm", "mlp.norm": "post_attention_layernorm"}
    parts |= {f"attention.part.{name}": f"self_attn.{name}_proj" for name in "qkvo"}
    parts |= {"mlp.part.u": "mlp.up_proj", "mlp.part.v": "mlp.gate_proj", "mlp.part.o": "mlp.down_proj"}
    names = {
        "embed.weight": "model.embed_tokens.weight",
        "head.norm.weight": "model.norm.weight",
        "head.linear.weight": "lm_head.weight",
    }
    for i in range(2):
        names |= {f"blocks.{i}.{a}.weight": f"model.layers.{i}.{b}.weight" for a, b in parts.items()}
    theirs = LlamaForCausalLM(config)
    missing = theirs.load_state_dict({names[name]: value for name, value in model.state_dict().items()}, strict=False)
    assert not missing.unexpected_keys
    assert not missing.missing_keys
    return theirs.eval()


@pytest.mark.row("Perplexity over length")
@pytest.mark.parametrize(
    ("base", "scaling", "theirs"),
    [
        (None, None, {"rope_type": "default", "rope_theta": 10000.0}),
        (85550.0, None, {"rope_type": "default", "rope_theta": 85550.0}),
        (None, "linear:4", {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}),
        (
            50.0,
            "yarn:4",
            {"rope_type": "yarn", "rope_theta": 50.0, "factor": 4.0, "original_max_position_embeddings": 64},
        ),
    ],
)
def test_gpt_computes_what_llama_does(base: float | None, scaling: str | None, theirs: dict[str, Any]) -> None:
    """With every scaling, YaRN's attention temperature included, at four times the length trained on."""
    model = build(GPTConfig(**SIZES))
    assert isinstance(model, GPT)
    with torch.no_grad():  # matrices as large as after training, so that scores are not all alike
        for parameter in model.parameters():
            parameter.mul_(8 if parameter.ndim == 2 else 1)
    tokens = torch.randint(41, (2, 256))
    expected = llama(model, theirs)
    place(model, parse_positions(base, scaling), trained_length=64)
    with torch.no_grad():
        ours, other = model(tokens), expected(tokens).logits
    torch.testing.assert_close(ours, other, rtol=1e-4, atol=2e-4 * other.abs().max().item())


def test_the_temperature_reaches_ngpts_scores() -> None:
    """A factor on cosines and sines would be normalized away:
    the same as `s_qk`, on q and on k, times 0.1 ln(factor) + 1.
    """
    model, other = (build_ngpt() for _ in range(2))
    place(model, Positions(scaling="yarn", factor=8), trained_length=64)
    other.runtime.table = yarn(8, 64)
    with torch.no_grad():
        for block in other.blocks:
            block.attention.part.s_qk.value.mul_(0.1 * math.log(8) + 1)  # type: ignore[union-attr,operator]
    tokens = torch.randint(41, (2, 100))
    torch.testing.assert_close(model(tokens), other(tokens), rtol=1e-12, atol=1e-12)
    assert not torch.allclose(model(tokens), build_ngpt()(tokens))


def build_ngpt() -> Decoder:
    torch.manual_seed(3)
    return build(NGPTConfig(**SIZES)).double()


def test_nvidias_embedding_has_no_yarn() -> None:
    model = build(NGPTConfig(**SIZES, rope="nvidia"))
    place(model, Positions(scaling="linear", factor=2), trained_length=64)
    with pytest.raises(ValueError, match="yarn needs a model with rope='standard'"):
        place(model, Positions(scaling="yarn", factor=2), trained_length=64)


@pytest.mark.parametrize("text", ["yarn", "linear:", "linear:0.5", "linear:inf", "yarn:nan", "ntk:4", "linear:x"])
def test_what_is_no_scaling_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not a way to scale positions"):
        parse_positions(None, text)


def test_what_is_asked_for_is_said() -> None:
    assert parse_positions(None, None) == parse_positions(None, "none") == Positions()
    assert str(Positions()) == "as trained"
    assert str(parse_positions(85550, "yarn:8")) == "base 85550, yarn:8"
    with pytest.raises(ValueError, match="rope_base must be more than 1, got 0"):
        parse_positions(0, None)
