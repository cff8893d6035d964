"""Hybrids: against the oracle, against transformers' Mamba-2, and what generation needs of them."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import paper
import pytest
import torch
from cases import ARMS, assert_computes, assert_near, assert_retracts, assert_trains, hybrid_config, make_hybrid_case
from oracle_names import oracle_parameters

from spherelm.generation.beam import BeamSettings, beam_search
from spherelm.generation.continuation import Continuation
from spherelm.generation.generate import generate
from spherelm.generation.sampling import Sampling
from spherelm.layers.attention import separate_documents
from spherelm.layers.feedforward import MLPS
from spherelm.layers.linear import unit_modules
from spherelm.models import build

both_arms = pytest.mark.parametrize("arm", ARMS)
PATTERNS = ("MAM-", "A-", "M", "-MA", "MOAO")
CASES: list[tuple[str, str, dict[str, Any]]] = [(arm, pattern, {}) for arm in ARMS for pattern in PATTERNS]
CASES += [(arm, "MA", {"tie_embeddings": True, "n_heads": 6, "n_kv_heads": 2, "mamba_groups": 1}) for arm in ARMS]
CASES += [(arm, "AO", {"n_shared_experts": 1, "router_score": "softmax", "experts_per_token": 1}) for arm in ARMS]
CASES += [(arm, "MO", {"n_shared_experts": 1, "activation": "relu2"}) for arm in ARMS]
CASES += [("ngpt", "MAO-", {"n_shared_experts": 1, "activation": each, "variant.inner_norm": True}) for each in MLPS]
CASES += [("ngpt", "M-", {"s_mamba.init": 0.5, "s_mamba.scale": 0.3, "alpha.init": 0.4, "s_z.init": 5.0})]


@pytest.mark.row("Models")
@pytest.mark.parametrize(("arm", "pattern", "fields"), CASES)
def test_logits_loss_and_every_gradient_are_the_oracles(arm: str, pattern: str, fields: dict[str, Any]) -> None:
    assert_computes(make_hybrid_case(arm, pattern, **fields), 1e-11)


@both_arms
def test_training_is_the_oracles(arm: str) -> None:
    assert_trains(make_hybrid_case(arm), 8)


def test_retraction_finds_every_matrix_and_nothing_of_the_state_space() -> None:
    declared = assert_retracts(make_hybrid_case("ngpt", "MAMO", n_shared_experts=1))
    assert {"blocks.0.mamba.in_proj.weight", "blocks.2.mamba.out_proj.weight", "blocks.3.experts.o.weight"} < declared
    assert not list(unit_modules(make_hybrid_case("gpt").model))


def test_mixers_alone_are_transformers_mamba2() -> None:
    """`Mamba2ForCausalLM` from the same weights, to 1e-4 and better: an implementation that is not ours."""
    transformers = pytest.importorskip("transformers")
    ours = build(hybrid_config("gpt", "MMM")).eval()
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.mul_(1 + 0.3 * torch.randn_like(parameter))
    theirs = transformers.Mamba2ForCausalLM(
        transformers.Mamba2Config(
            num_heads=4, head_dim=12, hidden_size=24, state_size=5, n_groups=2, expand=2, conv_kernel=3, chunk_size=8,
            layer_norm_epsilon=1e-6, num_hidden_layers=3, vocab_size=37, use_cache=False, residual_in_fp32=False,
        )
    ).eval()  # fmt: skip
    names = {"embed.": "backbone.embeddings.", "head.": "lm_head.", "blocks.": "backbone.layers.", ".mamba.": ".mixer."}
    names |= {".ssm.conv_": ".conv1d.", ".ssm.": "."}
    weights = {}
    for name, parameter in oracle_parameters(ours):
        value = parameter.detach().unsqueeze(1) if name.endswith("conv_weight") else parameter.detach()
        name = "backbone.norm_f.weight" if name == "norm.weight" else name
        for one, other in names.items():
            name = name.replace(one, other)
        weights[name] = value
    theirs.load_state_dict(weights)
    tokens = torch.randint(37, (2, 21))
    wanted = theirs(tokens).logits
    assert (ours(tokens) - wanted).abs().max() <= 1e-5 * wanted.abs().max()


@both_arms
def test_without_rotation_attention_has_no_positions(arm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paper, "rope", lambda x, base: x)
    c = make_hybrid_case(arm, "MA-", rope="none")
    assert_near(c.model(c.tokens), c.forward(c.weights, c.shape, c.tokens), 1e-12)
    turned = make_hybrid_case(arm, "MA-").model
    assert (turned(c.tokens) - c.model(c.tokens)).abs().max() > 1e-6


@pytest.mark.parametrize("pattern", ["MAM-", "-MA", "A-M", "M", "OAM"])
@both_arms
def test_cached_decoding_is_the_full_pass(arm: str, pattern: str) -> None:
    c = make_hybrid_case(arm, pattern)
    whole, cache = c.model(c.tokens), c.model.new_cache()
    pieces = [c.model(piece, cache) for piece in c.tokens.split((4, 1, 1, 3), 1)]
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-10, atol=1e-12)
    assert cache.length == 9


@both_arms
def test_rows_of_any_length_go_on_as_they_would_alone(arm: str) -> None:
    model = make_hybrid_case(arm, "MAM-").model
    rows = [[1, 2, 3, 4, 5, 6, 7], [9], [8, 8, 3]]
    together = generate(model, rows, 40, temperature=0.7, seed=5, window=True)
    for i, row in enumerate(rows):
        alone = generate(model, [row], 40, temperature=0.7, seed=5 + i, window=True)
        # A window slides for all rows at once, so that after a while a row alone is read from elsewhere.
        assert together[i][:32] == alone[0][:32]


@both_arms
def test_a_pass_that_is_broken_off_is_undone(arm: str) -> None:
    """In the middle of the layers: some states have moved on, others have not."""
    model = make_hybrid_case(arm, "MAMM").model
    text, wanted = (Continuation(model, [[1, 2, 3]], Sampling(temperature=0), [0]) for _ in range(2))
    for continuation in (text, wanted):
        continuation.step()
        continuation.step()
    handle = model.blocks[2].register_forward_hook(lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        text.step()
    handle.remove()
    for _ in range(3):
        assert text.step().tolist() == wanted.step().tolist()


@both_arms
def test_beam_search_finds_what_a_search_without_a_cache_finds(arm: str) -> None:
    """The hypotheses' states change places with them: every log probability is that of the text, read anew."""
    model = make_hybrid_case(arm, "MA-M").model
    prompts = [[1, 2, 3], [5, 4, 3]]
    for prompt, found in zip(prompts, beam_search(model, prompts, 6, 0, BeamSettings(3)), strict=True):
        for text in found:
            row = torch.tensor([prompt + text.tokens])
            logs = model(row[:, :-1])[0].log_softmax(-1)[len(prompt) - 1 :]
            wanted = logs.gather(1, row[0, len(prompt) :].unsqueeze(1)).sum().item()
            assert text.log_probability == pytest.approx(wanted, rel=1e-5)


@both_arms
def test_documents_in_a_row_are_worth_what_they_are_alone(arm: str) -> None:
    model = make_hybrid_case(arm, "MAM-").model
    tokens, targets = torch.randint(36, (1, 17)), torch.randint(36, (1, 17))
    tokens[0, [3, 4, 12]] = 36
    whole = model.loss(tokens, targets, *separate_documents(tokens, 36))
    starts = (0, 4, 5, 13, 17)
    parts = [model.loss(tokens[:, a:b], targets[:, a:b]) * (b - a) for a, b in pairwise(starts)]
    assert whole.item() == pytest.approx(sum(parts).item() / 17, rel=1e-12)  # type: ignore[union-attr]
    assert abs(model.loss(tokens, targets).item() - whole.item()) > 1e-6
    mask, _ = separate_documents(tokens, 36)
    with pytest.raises(ValueError, match="does not read the mask: give positions"):
        model.loss(tokens, targets, mask)
    assert make_hybrid_case(arm, "A-").model.loss(tokens, targets, mask).isfinite()


@both_arms
def test_what_makes_no_hybrid(arm: str) -> None:
    wrong: dict[str, dict[str, Any]] = {
        "pattern 'MX' has 'X': a layer is one of M, A, -, O": {"pattern": "MX"},
        "pattern 'MA' has 2 letters for n_layers=3: one for each layer": {"pattern": "MA", "n_layers": 3},
        "mamba_d_head=7 does not divide mamba_expand \\* d_model = 48: choose a divisor": {"mamba_d_head": 7},
        "mamba_groups=3 does not divide the 4 heads of a mixer": {"mamba_groups": 3},
        "mamba_conv must be at least 2, got 1": {"mamba_conv": 1},
        "mamba_chunk must be more than 0, got 0": {"mamba_chunk": 0},
        "mamba_expand must be a valid integer, got 1.5": {"mamba_expand": 1.5},
        "pattern must be a valid string, got 3": {"pattern": 3},
        "experts_per_token must be more than 0, got 0": {"pattern": "MO", "experts_per_token": 0},
        "experts_per_token=9 of n_experts=4 cannot be picked": {
            "pattern": "MO",
            "n_experts": 4,
            "experts_per_token": 9,
        },
        "balance must be 'bias', 'loss' or 'none', got 'scales'": {"pattern": "MO", "balance": "scales"},
        "d_ff=1 is too narrow for 2 experts a token: give d_expert": {"pattern": "MO", "d_ff": 1, "d_expert": None},
    }
    for message, fields in wrong.items():
        with pytest.raises(ValueError, match=message):
            hybrid_config(arm, **{"pattern": "MA", **fields})


def test_the_scale_of_a_mixer_must_be_positive() -> None:
    with pytest.raises(ValueError, match=r"init must be more than 0, got 0"):
        hybrid_config("ngpt", **{"s_mamba.init": 0})
