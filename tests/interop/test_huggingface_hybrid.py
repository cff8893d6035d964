"""Hybrids as transformers knows models: logits, its caches with our states in them, generation, folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from cases import ARMS, hybrid_config

from spherelm.generation.generate import generate
from spherelm.models import LanguageModel, build

transformers = pytest.importorskip("transformers")
from spherelm.interop.huggingface import to_hf  # noqa: E402

both_arms = pytest.mark.parametrize("arm", ARMS)
every_pattern = pytest.mark.parametrize("pattern", ["MA-M", "-MA", "AO", "M"])


@pytest.fixture(autouse=True)
def _no_gradients() -> Any:
    with torch.no_grad():
        yield


def make_model(arm: str, pattern: str, **fields: Any) -> LanguageModel:
    model = build(hybrid_config(arm, pattern, **fields)).eval()
    assert isinstance(model, LanguageModel)
    return model


def some_tokens(*shape: int) -> torch.Tensor:
    """None of them 0, which stands for padding below."""
    return torch.randint(1, 37, shape)


def close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@both_arms
@every_pattern
def test_logits_and_every_cache_are_those_of_the_bare_model(arm: str, pattern: str) -> None:
    model, tokens = make_model(arm, pattern), some_tokens(2, 12)
    hf, wanted = to_hf(model), model(tokens)
    close(hf(tokens).logits, wanted)
    for cache in (transformers.DynamicCache(config=hf.config), transformers.DynamicCache()):
        pieces = [hf(part, cache=cache).logits for part in tokens.split([5, 1, 4, 1, 1], 1)]
        close(torch.cat(pieces, 1), wanted)
        assert cache.get_seq_length() == 12


@both_arms
def test_the_biases_of_routers_go_with_the_weights(arm: str, tmp_path: Path) -> None:
    model, tokens = make_model(arm, "AO"), some_tokens(2, 12)
    router = model.get_submodule("blocks.1.experts.part.router")
    router.score_bias.copy_(torch.randn(4))  # type: ignore[operator, union-attr]
    to_hf(model).save_pretrained(tmp_path)
    read = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    close(read(tokens).logits, model(tokens))
    read.train()(tokens)
    assert read.get_submodule("model.blocks.1.experts.part.router").load.sum() == 2 * tokens.numel(), (
        "counted from 0 on"
    )


@both_arms
def test_padding_on_either_side_changes_nothing(arm: str) -> None:
    model, tokens = make_model(arm, "MAM-"), some_tokens(2, 9)
    mask, padded = torch.ones(2, 12, dtype=torch.int64), torch.zeros(2, 12, dtype=torch.int64)
    mask[0, :3] = mask[1, 9:] = 0
    padded[0, 3:], padded[1, :9] = tokens[0], tokens[1]
    logits = to_hf(model)(padded, attention_mask=mask).logits
    close(torch.stack([logits[0, 3:], logits[1, :9]]), model(tokens))


@both_arms
def test_packed_sequences_do_not_see_each_other(arm: str) -> None:
    model, tokens = make_model(arm, "MA"), some_tokens(1, 12)
    positions = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5, 6]])
    alone = torch.cat([model(tokens[:, :5]), model(tokens[:, 5:])], 1)
    close(to_hf(model)(tokens, position_ids=positions).logits, alone)


@both_arms
@every_pattern
def test_generate_is_ours(arm: str, pattern: str) -> None:
    """Also for a row that is padded on the left, and with beams, which change places."""
    model, tokens = make_model(arm, pattern), some_tokens(2, 8)
    hf = to_hf(model)
    greedy: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(hf.generate(tokens, **greedy), generate(model, tokens, 6, temperature=0))
    mask = torch.ones(2, 8, dtype=torch.int64)
    mask[0, :3] = 0
    written = hf.generate(tokens.masked_fill(mask == 0, 0), attention_mask=mask, **greedy)
    assert torch.equal(written[:1, 8:], generate(model, tokens[:1, 3:], 6, temperature=0)[:, 5:])
    beams = [hf.generate(tokens, num_beams=3, use_cache=use, **greedy) for use in (True, False)]
    assert torch.equal(*beams)


@both_arms
def test_what_a_state_cannot_do_is_refused(arm: str) -> None:
    hf, tokens = to_hf(make_model(arm, "MA")), some_tokens(1, 5)
    static = transformers.StaticCache(config=hf.config, max_cache_len=16)
    with pytest.raises(ValueError, match="keeps states in a DynamicCache, not in a StaticCache: pass one, or none"):
        hf(tokens, cache=static)
    cache = hf(tokens, use_cache=True)[1]
    with pytest.raises(ValueError, match="a recurrent state cannot be cropped: leave out assisted decoding"):
        cache.crop(-2)
    cache.reset()
    close(hf(tokens, cache=cache).logits, hf(tokens).logits)


@both_arms
def test_what_is_saved_is_loaded_bitwise(arm: str, tmp_path: Path) -> None:
    hf, tokens = to_hf(make_model(arm, "MA-", rope="none")), some_tokens(2, 9)
    hf.save_pretrained(tmp_path)
    again, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert again.config.arm_config().pattern == "MA-"
    assert torch.equal(again(tokens).logits, hf(tokens).logits)
