"""Encoder-decoders beyond the equations: padding, causality, cached decoding, compute dtype, names, bad sizes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import ARMS, LENGTHS, make_pair_case, pair_config

from spherelm.models import EncoderDecoder, build
from spherelm.models.encoder_decoder import padded

both_arms = pytest.mark.parametrize("arm", ARMS)
ENCODER = {f"attention.part.{w}.weight" for w in "qkvo"} | {f"mlp.part.{w}.weight" for w in "uvo"}
DECODER = ENCODER | {f"cross_attention.part.{w}.weight" for w in "qkvo"}
SCALES = {"attention.alpha.value", "mlp.alpha.value"} | {
    "attention.part.s_qk.value",
    "mlp.part.s_u.value",
    "mlp.part.s_v.value",
}


def close(ours: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(ours, wanted, rtol=1e-11, atol=1e-12)


def test_parameter_names_are_pinned() -> None:
    def names(block: set[str], encoder_block: set[str], rest: set[str]) -> set[str]:
        of_blocks = {f"blocks.{i}.{n}" for i in range(2) for n in block}
        return of_blocks | {f"encoder.blocks.{i}.{n}" for i in range(3) for n in encoder_block} | rest

    embeddings = {"embed.weight", "encoder.embed.weight", "head.linear.weight"}
    gains = {"attention.norm.weight", "mlp.norm.weight"}
    plain, unit = (build(pair_config(arm)) for arm in ARMS)
    assert {name for name, _ in plain.named_parameters()} == names(
        DECODER | gains | {"cross_attention.norm.weight"},
        ENCODER | gains,
        embeddings | {"head.norm.weight", "encoder.norm.weight"},
    )
    assert {name for name, _ in unit.named_parameters()} == names(
        DECODER | SCALES | {"cross_attention.alpha.value", "cross_attention.part.s_qk.value"},
        ENCODER | SCALES,
        embeddings | {"head.s_z.value"},
    )


@pytest.mark.row("Embeddings")
@both_arms
def test_embeddings_can_be_shared(arm: str) -> None:
    names = {name for name, _ in build(pair_config(arm, share_embeddings=True)).named_parameters()}
    assert "embed.weight" in names
    assert "encoder.embed.weight" not in names
    names = {name for name, _ in build(pair_config(arm, share_embeddings=True, tie_embeddings=True)).named_parameters()}
    assert [name for name in names if "embed" in name or "head.linear" in name] == ["embed.weight"]


@both_arms
def test_padding_changes_nothing(arm: str) -> None:
    """A row is computed as it is alone, whatever stands beside it and however wide the batch is."""
    c = make_pair_case(arm)
    together = c.model(c.source, c.tokens)
    for i, length in enumerate(LENGTHS):
        alone = c.model(c.source[i : i + 1, :length], c.tokens[i : i + 1])
        close(together[i : i + 1], alone)
        wide = torch.cat((c.source[i : i + 1, :length], torch.full((1, 9), -1)), 1)
        close(c.model(wide, c.tokens[i : i + 1]), alone)


@both_arms
def test_the_encoder_sees_in_both_directions_and_the_decoder_in_one(arm: str) -> None:
    c = make_pair_case(arm)
    for changed in (0, LENGTHS[1] - 1):
        source = c.source.clone()
        source[1, changed] = (source[1, changed] + 1) % 37
        before, after = c.model.encoded(c.source).states[1], c.model.encoded(source).states[1]
        assert ((before - after).abs().amax(-1) > 1e-6).all()
    tokens = c.tokens.clone()
    tokens[:, 5:] = (tokens[:, 5:] + 1) % 37
    before, after = c.model(c.source, c.tokens), c.model(c.source, tokens)
    close(after[:, :5], before[:, :5])
    assert ((before[:, 5:] - after[:, 5:]).abs().amax(-1) > 1e-6).all()


@both_arms
@pytest.mark.parametrize("n_kv_heads", [3, 1])
@pytest.mark.parametrize("pieces", [[9], [1] * 9, [4, 1, 3, 1]])
def test_cached_decoding_is_the_full_forward_pass(arm: str, n_kv_heads: int, pieces: list[int]) -> None:
    c = make_pair_case(arm, n_kv_heads=n_kv_heads)
    given = c.model.given(c.source)
    cache = given.new_cache()
    parts = [given(tokens, cache) for tokens in c.tokens.split(pieces, dim=1)]
    close(torch.cat(parts, 1), c.model(c.source, c.tokens))
    assert cache.length == 9


@both_arms
def test_given_a_source_it_is_a_language_model(arm: str) -> None:
    c = make_pair_case(arm)
    given = c.model.given(c.source)
    close(given(c.tokens), c.model(c.source, c.tokens))
    close(given.loss(c.tokens, c.targets), c.model.loss(*c.batch))
    twice = given.repeated(2)(c.tokens.repeat_interleave(2, 0))
    close(twice, c.model(c.source, c.tokens).repeat_interleave(2, 0))
    assert {id(p) for p in given.parameters()} < {id(p) for p in c.model.parameters()}


@both_arms
def test_prompts_are_sources(arm: str) -> None:
    c = make_pair_case(arm)
    given, rows = c.model.conditioned([[1, 2, 3], [4]], end_token=0)
    assert rows == [[0], [0]]
    source = torch.tensor([[1, 2, 3, 0], [4, 0, -1, -1]])
    close(given(torch.tensor(rows)), c.model(source, torch.tensor(rows)))
    with pytest.raises(ValueError, match="give eos_id"):
        c.model.conditioned([[1]], None)


@both_arms
def test_hypotheses_change_places_in_the_cache(arm: str) -> None:
    """Reordering as in a beam search: rows of one source continue another row's text."""
    c = make_pair_case(arm)
    given = c.model.given(c.source).repeated(2)
    cache, texts = given.new_cache(), torch.arange(24).reshape(6, 4)
    given(texts, cache)
    order = torch.tensor([1, 1, 2, 3, 5, 4])
    cache.select(order)
    new = torch.tensor([[7]] * 6)
    whole = given(torch.cat((texts[order], new), 1))
    close(given(new, cache), whole[:, -1:])


@both_arms
def test_float32_and_bfloat16(arm: str) -> None:
    c = make_pair_case(arm)
    wanted = c.model(c.source, c.tokens)
    model = c.model.float()
    assert (model(c.source, c.tokens) - wanted).abs().max() <= 3e-5 * wanted.abs().max()
    model.runtime.compute_dtype = torch.bfloat16
    logits, loss = model(c.source, c.tokens), model.loss(*c.batch)
    loss.backward()
    assert logits.dtype == torch.bfloat16
    assert loss.dtype == torch.float32
    assert all(p.dtype == torch.float32 and p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert (logits - wanted).abs().max() <= 0.1 * wanted.abs().max()


def test_hidden_states_are_unit_everywhere() -> None:
    c = make_pair_case("ngpt")
    lengths: list[torch.Tensor] = []
    modules = (c.model.embed, *c.model.blocks, c.model.encoder.embed, *c.model.encoder.blocks)
    for module in modules:
        module.register_forward_hook(lambda _module, _inputs, h: lengths.append(h.detach().norm(dim=-1)))
    c.model(c.source, c.tokens)
    assert len(lengths) == len(modules)
    for length in lengths:
        torch.testing.assert_close(length, torch.ones_like(length), rtol=0, atol=1e-14)


def test_each_step_has_its_own_alpha() -> None:
    """With all alphas zero but one, the logits still change with that one's branch."""
    c = make_pair_case("ngpt")
    with torch.no_grad():
        for name, parameter in c.model.named_parameters():
            if "alpha" in name and not name.startswith("encoder."):
                parameter.zero_()
    still = c.model(c.source, c.tokens)
    sublayers = c.model.blocks[1].sublayers
    assert list(sublayers) == ["attention", "cross_attention", "mlp"]
    for sublayer in sublayers.values():
        scale = sublayer.alpha.value
        with torch.no_grad():
            scale.fill_(0.1)
        assert (c.model(c.source, c.tokens) - still).abs().max() > 1e-4
        with torch.no_grad():
            scale.zero_()


@pytest.mark.parametrize("bad", [0, -1, 1.5, True])
@both_arms
def test_bad_depths_are_refused(arm: str, bad: Any) -> None:
    with pytest.raises(ValueError, match=r"n_encoder_layers must be (more than 0|a valid integer), got"):
        pair_config(arm, n_encoder_layers=bad)


def test_arms_are_told_apart() -> None:
    for arm in ARMS:
        config = pair_config(arm)
        assert config.arm == arm
        assert isinstance(build(config), EncoderDecoder)


def test_the_baseline_starts_as_its_docstring_says() -> None:
    model = build(pair_config("gpt", d_model=96, n_heads=3, d_ff=None, vocab_size=500))
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            added = (2 if name.startswith("encoder.") else 3) * (3 if name.startswith("encoder.") else 2)
            wanted = 0.02 / added**0.5 if name.endswith(".o.weight") else 0.02
            assert parameter.std().item() == pytest.approx(wanted, rel=0.05), name


def test_rows_are_padded_on_the_right() -> None:
    assert padded([[1, 2], [3]]).tolist() == [[1, 2], [3, -100]]
