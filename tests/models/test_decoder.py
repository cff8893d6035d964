"""Both models beyond the paper's equations: causality, cached decoding, compute dtype, names."""

from __future__ import annotations

from typing import Any

import golden
import paper
import pytest
import torch
from cases import config_of

from spherelm.layers.linear import Scale
from spherelm.models import build

BLOCK = {f"attention.part.{w}.weight" for w in "qkvo"} | {f"mlp.part.{w}.weight" for w in "uvo"}
SCALES = {"attention.alpha.value", "mlp.alpha.value"} | {
    "attention.part.s_qk.value",
    "mlp.part.s_u.value",
    "mlp.part.s_v.value",
}
both_arms = pytest.mark.parametrize("arm", golden.ARMS)


def test_parameter_names_are_pinned() -> None:
    """Checkpoints, the optimizer's roles and the importers depend on these."""
    gpt = {f"blocks.{i}.{n}" for i in range(2) for n in BLOCK | {"attention.norm.weight", "mlp.norm.weight"}}
    ngpt = {f"blocks.{i}.{n}" for i in range(2) for n in BLOCK | SCALES}
    assert set(build(config_of("gpt")).state_dict()) == gpt | {"embed.weight", "head.linear.weight", "head.norm.weight"}
    assert set(build(config_of("ngpt")).state_dict()) == ngpt | {"embed.weight", "head.linear.weight", "head.s_z.value"}


@both_arms
def test_no_token_sees_a_later_one(arm: str, case: Any) -> None:
    c = case(arm)
    changed = c.tokens.clone()
    changed[:, 5:] = (changed[:, 5:] + 1) % 37
    before, after = c.model(c.tokens), c.model(changed)
    torch.testing.assert_close(before[:, :5], after[:, :5], rtol=1e-13, atol=1e-13)
    assert ((before[:, 5:] - after[:, 5:]).abs().amax(-1) > 1e-6).all()


@both_arms
@pytest.mark.parametrize("n_kv_heads", [3, 1])
@pytest.mark.parametrize("pieces", [[9], [1] * 9, [4, 1, 3, 1], [2, 7]])
def test_cached_decoding_is_the_full_forward_pass(arm: str, n_kv_heads: int, pieces: list[int], case: Any) -> None:
    c = case(arm, n_kv_heads=n_kv_heads)
    cache = c.model.new_cache()
    parts = [c.model(tokens, cache) for tokens in c.tokens.split(pieces, dim=1)]
    assert cache.length == 9
    torch.testing.assert_close(torch.cat(parts, 1), c.model(c.tokens), rtol=1e-11, atol=1e-12)


@both_arms
def test_sequences_longer_than_trained_on_can_be_read(arm: str, case: Any) -> None:
    c = case(arm, max_seq_len=4)
    assert c.model(c.tokens).shape == (3, 9, 37)


def test_the_hidden_state_is_unit_after_every_block(case: Any) -> None:
    c = case("ngpt", n_layers=3)
    lengths = []
    for module in (c.model.embed, *c.model.blocks):
        module.register_forward_hook(lambda _module, _inputs, h: lengths.append(h.detach().norm(dim=-1)))
    c.model(c.tokens)
    assert len(lengths) == 4
    for length in lengths:
        torch.testing.assert_close(length, torch.ones_like(length), rtol=0, atol=1e-14)


def test_with_alpha_zero_the_logits_are_scaled_cosines_of_embeddings(case: Any) -> None:
    c = case("ngpt")
    with torch.no_grad():
        for block in c.model.blocks:
            block.attention.alpha.value.zero_()
            block.mlp.alpha.value.zero_()
    p = c.weights
    s_z = paper.effective(p["s_z.value"], c.shape.s_z, c.shape.d_model)
    wanted = s_z * (p["embed.weight"][c.tokens] @ p["head.weight"].T)
    torch.testing.assert_close(c.model(c.tokens), wanted, rtol=1e-12, atol=1e-13)


def test_only_the_size_of_alpha_counts(case: Any) -> None:
    c = case("ngpt")
    before = c.model(c.tokens)
    with torch.no_grad():
        for block in c.model.blocks:
            block.attention.alpha.value.neg_()
            block.mlp.alpha.value.neg_()
    assert torch.equal(c.model(c.tokens), before)


@both_arms
def test_float32_agrees_with_float64(arm: str, case: Any) -> None:
    c = case(arm)
    wanted = c.model(c.tokens)
    got = c.model.float()(c.tokens)
    assert (got - wanted).abs().max() <= 2e-5 * wanted.abs().max()


@pytest.mark.row("Number formats")
@both_arms
def test_bfloat16_compute_keeps_float32_weights_gradients_and_loss(arm: str, case: Any) -> None:
    c = case(arm)
    model = c.model.float()
    wanted, exact = model(c.tokens), model.loss(c.tokens, c.targets)
    model.runtime.compute_dtype = torch.bfloat16
    logits, loss = model(c.tokens), model.loss(c.tokens, c.targets)
    loss.backward()
    assert logits.dtype == torch.bfloat16
    assert loss.dtype == torch.float32
    assert all(p.dtype == torch.float32 and p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert (logits.float() - wanted).abs().max() <= 0.1 * wanted.abs().max()
    assert loss.item() == pytest.approx(exact.item(), rel=0.02)
    model.runtime.compute_dtype = None
    assert torch.equal(model(c.tokens), wanted)


def test_gains_and_scales_are_parameters_of_their_own_modules(case: Any) -> None:
    model = case("ngpt").model
    assert sum(isinstance(m, Scale) for m in model.modules()) == 2 * 5 + 1
